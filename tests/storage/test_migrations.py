"""Migrations: equal to schema.sql, in order, once, by one migrator at a time."""

import asyncio
import subprocess
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from embedded.binaries import bin_dir, clean_environment
from embedded.postgres import EmbeddedPostgres
from storage.errors import StorageDefect, StorageUnavailable, TransactionConflict
from storage.migrations import (
    GROUPS,
    Migration,
    Recorded,
    RoleMissing,
    SchemaMismatch,
    SchemaTooNew,
    grant_logins,
    known_migrations,
    migrate,
    plan,
    schema_state,
)
from storage.statements import statements
from tests.storage.conftest import QUERY_LOGIN, Database, NewDatabase
from tests.waiting import PATIENCE_S, until

SCHEMA = Path(str(resources.files("storage").joinpath("sql", "schema.sql")))

# Everything the catalogs say about our schemas, one query per kind of object.
CATALOG = {
    "schemas": "SELECT nspname, nspacl::text FROM pg_namespace WHERE nspname = ANY (%(schemas)s)",
    "relations": """
        SELECT n.nspname, c.relname, c.relkind, c.relpersistence, c.reloptions::text, c.relacl::text, c.relispartition,
               c.relrowsecurity, c.relreplident, pg_get_userbyid(c.relowner), a.amname,
               pg_get_expr(c.relpartbound, c.oid), pg_get_partkeydef(c.oid), i.inhparent::regclass::text,
               obj_description(c.oid, 'pg_class')
          FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
          LEFT JOIN pg_inherits i ON i.inhrelid = c.oid LEFT JOIN pg_am a ON a.oid = c.relam
         WHERE n.nspname = ANY (%(schemas)s)""",
    "columns": """
        SELECT a.attrelid::regclass::text, a.attnum, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
               a.attstorage, a.attcompression, a.attstattarget, a.attoptions::text, a.attidentity, a.attgenerated,
               a.attacl::text, a.attinhcount, a.attislocal, co.collname, pg_get_expr(d.adbin, d.adrelid),
               col_description(a.attrelid, a.attnum)
          FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
          LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
          LEFT JOIN pg_collation co ON co.oid = a.attcollation
         WHERE n.nspname = ANY (%(schemas)s) AND a.attnum > 0""",
    "constraints": """
        SELECT co.conrelid::regclass::text, co.conname, co.contype, pg_get_constraintdef(co.oid), co.convalidated,
               co.coninhcount, co.conislocal, co.connoinherit, obj_description(co.oid, 'pg_constraint')
          FROM pg_constraint co JOIN pg_namespace n ON n.oid = co.connamespace WHERE n.nspname = ANY (%(schemas)s)""",
    "indexes": """
        SELECT i.indrelid::regclass::text, pg_get_indexdef(i.indexrelid), i.indisvalid, i.indisprimary
          FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname = ANY (%(schemas)s)""",
    "functions": """
        SELECT pg_get_functiondef(p.oid), p.proacl::text, pg_get_userbyid(p.proowner), obj_description(p.oid, 'pg_proc')
          FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname = ANY (%(schemas)s)""",
    "views": """
        SELECT c.oid::regclass::text, pg_get_viewdef(c.oid)
          FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname = ANY (%(schemas)s) AND c.relkind IN ('v', 'm')""",
    "types": """
        SELECT t.typname, t.typtype, t.typacl::text, e.enumlabel, e.enumsortorder
          FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace LEFT JOIN pg_enum e ON e.enumtypid = t.oid
         WHERE n.nspname = ANY (%(schemas)s) AND t.typtype IN ('e', 'd', 'c')""",
    "sequences": """
        SELECT s.seqrelid::regclass::text, s.seqtypid::regtype::text, s.seqstart, s.seqincrement, s.seqmax, s.seqmin,
               s.seqcache, s.seqcycle FROM pg_sequence s""",
    "triggers": "SELECT tgrelid::regclass::text, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal",
    "policies": "SELECT polname, polrelid::regclass::text FROM pg_policy",
    "extensions": "SELECT extname FROM pg_extension",
    "default privileges": "SELECT defaclrole::regrole::text, defaclobjtype, defaclacl::text FROM pg_default_acl",
    "statistics": "SELECT pg_get_statisticsobjdef(oid) FROM pg_statistic_ext",
    "settings": "SELECT * FROM settings",
    "versions": "SELECT version, name, compatible FROM schema_migrations",
}


def catalog(dsn: str) -> dict[str, list[str]]:
    with psycopg.connect(dsn) as connection:
        rows = connection.execute(
            "SELECT nspname FROM pg_namespace WHERE nspname NOT LIKE 'pg\\_%' AND nspname <> 'information_schema'"
        ).fetchall()
        schemas = {"schemas": [name for (name,) in rows]}
        return {kind: sorted(map(str, connection.execute(query, schemas))) for kind, query in CATALOG.items()}


def run_tool(name: str, database: Database, *arguments: str) -> str:
    """A client program of the server, its connection given by the environment as an operator's would be."""
    where = {
        "PGHOST": "127.0.0.1",
        "PGPORT": str(database.postgres.port),
        "PGUSER": "postgres",
        "PGPASSWORD": database.postgres.password,
        "PGDATABASE": database.name,
    }
    done = subprocess.run(
        [str(bin_dir() / name), *arguments],
        env=clean_environment(where),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    assert "ERROR" not in done.stderr, done.stderr
    return done.stdout


def dump(database: Database) -> list[str]:
    # \restrict and \unrestrict carry a random key; the data's times of creation differ.
    text = run_tool("pg_dump", database, "--schema-only")
    return [line for line in text.splitlines() if "restrict " not in line]


@pytest.fixture
async def migrated(empty_database: Database) -> Database:
    await migrate(empty_database())
    return empty_database


@pytest.fixture
def by_psql(new_database: NewDatabase) -> Iterator[Database]:
    with new_database("template0") as made:
        # As a newcomer would: no flags but the file.
        run_tool("psql", made, "--no-psqlrc", "-f", str(SCHEMA))
        yield made


def test_the_program_and_psql_make_the_same_database(migrated: Database, by_psql: Database) -> None:
    ours, theirs = catalog(migrated()), catalog(by_psql())
    assert len(ours["relations"]) > 80, "the comparison must see the schema"
    for kind in CATALOG:
        assert ours[kind] == theirs[kind], kind
    assert dump(migrated) == dump(by_psql)


def test_partitions_made_later_are_the_same_too(migrated: Database, by_psql: Database) -> None:
    for database in (migrated, by_psql):
        with psycopg.connect(database()) as connection:
            connection.execute("SELECT register_tenant('acme'), register_tenant('large', true)")
            connection.execute(
                "SELECT ensure_history(tenant_id, now() - interval '1 day', now()), ensure_outbox(now(), now())"
                "  FROM tenants"
            )
    assert dump(migrated) == dump(by_psql)


@pytest.mark.parametrize("autocommit", [True, False], ids=["autocommit", "in-a-transaction"])
def test_the_schema_loads_by_psycopg(empty_database: Database, by_psql: Database, autocommit: bool) -> None:
    with psycopg.connect(empty_database(), autocommit=autocommit) as connection:
        connection.execute(SCHEMA.read_bytes())
    assert catalog(empty_database()) == catalog(by_psql())


def test_loading_the_schema_twice_changes_nothing(by_psql: Database) -> None:
    before = catalog(by_psql())
    with psycopg.connect(by_psql(), autocommit=True) as connection, pytest.raises(psycopg.errors.DuplicateTable):
        connection.execute(SCHEMA.read_bytes())
    assert catalog(by_psql()) == before


async def test_a_database_made_by_hand_has_nothing_pending(by_psql: Database) -> None:
    assert (await schema_state(by_psql())).pending == ()
    assert await migrate(by_psql()) == ()


@pytest.mark.usefixtures("template")  # makes the group roles: that would need CREATEROLE
async def test_an_owner_who_is_no_superuser_can_migrate(postgres: EmbeddedPostgres, new_database: NewDatabase) -> None:
    postgres.ensure_login("plain_owner")
    with new_database("template0") as made:
        with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
            connection.execute(sql.SQL("ALTER DATABASE {} OWNER TO plain_owner").format(sql.Identifier(made.name)))
        assert await migrate(made(user="plain_owner"))
        with psycopg.connect(made(user="plain_owner")) as connection:
            connection.execute("SELECT ensure_history(register_tenant('acme'), now(), now() + interval '1 day')")


async def test_applied_once_in_order_with_its_row(empty_database: Database) -> None:
    said: list[str] = []
    known = (
        *known_migrations(),
        Migration(len(known_migrations()) + 1, "more", "CREATE TABLE more (a int); INSERT INTO more VALUES (1)"),
    )
    assert len((await schema_state(empty_database())).pending) == len(known) - 1
    assert await migrate(empty_database(), known=known, progress=said.append) == known
    assert said == [f"applying {migration}" for migration in known]
    assert await migrate(empty_database(), known=known) == ()
    state = await schema_state(empty_database(), known=known)
    assert (state.applied, state.pending) == (known, ())


async def test_a_projection_made_before_gets_the_indexes_of_one_made_now(empty_database: Database) -> None:
    await migrate(empty_database(), known=[m for m in known_migrations() if m.version < 5])
    with psycopg.connect(empty_database(), autocommit=True) as connection:
        row = connection.execute("SELECT register_tenant('acme')").fetchone()
        assert row is not None
        kinds = ["double", "bigint", "boolean", "text", "text"]
        names = [f"a{number}" for number in range(len(kinds))]
        declared = "SELECT create_projection(%s, %s, '', ARRAY(SELECT attribute_id FROM attributes ORDER BY 1))"
        connection.execute(
            "SELECT FROM register_attributes(%s, %s, %s::attribute_type[], %s)",
            [row[0], names, kinds, [""] * len(kinds)],
        )
        connection.execute(declared, [row[0], "before"])
        await migrate(empty_database())
        connection.execute(declared, [row[0], "now"])
        before, now = (
            connection.execute(
                "SELECT replace(c.relname, %(table)s, ''), replace(pg_get_indexdef(c.oid), %(table)s, ''), "
                "array(SELECT attstattarget FROM pg_attribute WHERE attrelid = c.oid) "
                "FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid "
                "WHERE i.indrelid = ('projections.' || %(table)s)::regclass UNION ALL "
                "SELECT attname, '', ARRAY[attstattarget] FROM pg_attribute "
                "WHERE attrelid = ('projections.' || %(table)s)::regclass AND attnum > 0 ORDER BY 1, 2",
                {"table": table},
            ).fetchall()
            for table in ("p1", "p2")
        )
    assert before == now
    assert len([name for name, definition, _ in now if definition]) == 2 + len(kinds)


async def until_waiting(
    connection: psycopg.Connection,
    table: str,
    mode: str,
    count: int = 1,
    *,
    beside: "asyncio.Task[Any] | None" = None,
) -> None:
    """Until that many wait for a lock of this mode on the table."""
    query = (
        "SELECT count(*) FROM pg_locks WHERE NOT granted AND mode = %s AND relation = to_regclass(%s) AND database = "
        "(SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    await until(
        lambda: connection.execute(query, [mode, table]).fetchone() == (count,),
        f"{count} wait for {mode} on {table}",
        beside=beside,
    )


async def test_readers_go_on_after_a_migration_that_waits_for_them(
    postgres: EmbeddedPostgres, empty_database: Database
) -> None:
    """One read is open when the migration comes, others come while it waits; nobody is a deadlock's victim."""
    await migrate(empty_database(), known=[m for m in known_migrations() if m.version < 7])
    postgres.ensure_login(QUERY_LOGIN)
    reader = empty_database(user=QUERY_LOGIN, options="-c search_path=tenant_data,public")

    def read() -> None:
        with psycopg.connect(reader) as connection:
            connection.execute("SELECT retention FROM tenants")

    with psycopg.connect(empty_database(), autocommit=True) as owner:
        owner.execute(sql.SQL("GRANT atlasco_query TO {}").format(sql.Identifier(QUERY_LOGIN)))
        with psycopg.connect(reader) as open_read:
            open_read.execute("SELECT retention FROM tenants")
            migration = asyncio.create_task(migrate(empty_database()))
            found: list[tuple[str]] = []

            def waits() -> bool:
                # On the view or on the table: that is what this is about.
                query = (
                    "SELECT relation::regclass::text FROM pg_locks JOIN pg_database d ON d.oid = database "
                    "WHERE NOT granted AND mode = %s AND d.datname = current_database()"
                )
                found[:] = owner.execute(query, ["AccessExclusiveLock"]).fetchall()
                return bool(found)

            await until(waits, "the migration waits for the reader", beside=migration)
            readers = [asyncio.create_task(asyncio.to_thread(read)) for _ in range(3)]
            await until_waiting(owner, found[0][0], "AccessShareLock", len(readers), beside=readers[0])
        await asyncio.gather(migration, *readers)
    assert (await schema_state(empty_database())).pending == ()


async def test_maintenance_goes_on_beside_a_migration_that_waits_for_it(empty_database: Database) -> None:
    """It has retired ranges when the migration comes, and reads tenants then."""
    await migrate(empty_database(), known=[m for m in known_migrations() if m.version < 7])
    with psycopg.connect(empty_database(), autocommit=True) as owner, psycopg.connect(empty_database()) as maintenance:
        owner.execute("SELECT register_tenant('acme')")
        owner.execute("SELECT ensure_history(tenant_id, now() - interval '3 days', now()) FROM tenants")
        maintenance.execute("UPDATE history_partitions SET retired_at = now() WHERE ts_to < now() - interval '1 day'")
        migration = asyncio.create_task(migrate(empty_database()))
        await until_waiting(owner, "history_partitions", "ShareRowExclusiveLock", beside=migration)
        maintenance.execute(f"SET LOCAL lock_timeout = '{PATIENCE_S:g}s'".encode())
        maintenance.execute(statements("maintenance.sql")["retire_ranges"])
        maintenance.execute("SELECT FROM tenants")
        maintenance.commit()
        await migration
        rows = owner.execute(
            "SELECT kept_from = (SELECT max(ts_to) FROM history_partitions WHERE retired_at IS NOT NULL) FROM tenants"
        ).fetchall()
    assert rows == [(True,)], "what was retired before the trigger was there is found after it"


@pytest.mark.parametrize("stopped_at", [6, 7, 8])
async def test_retired_ranges_say_from_when_on_readings_are_kept(empty_database: Database, stopped_at: int) -> None:
    """Of a database whose retention was raised before anybody noted what the shorter one had given up; whatever step
    the migration stopped at when ranges were retired for the last time."""
    retire = (
        "UPDATE history_partitions SET retired_at = now() "
        "WHERE tenant_from = 0 AND retired_at IS NULL AND ts_to < now() - %s::interval"
    )
    await migrate(empty_database(), known=[m for m in known_migrations() if m.version < 7])
    with psycopg.connect(empty_database(), autocommit=True) as connection:
        connection.execute("UPDATE settings SET shared_slots = 1")
        connection.execute("SELECT register_tenant('acme'), register_tenant('globex'), register_tenant('other', true)")
        connection.execute(
            "SELECT ensure_history(tenant_id, now() - interval '3 days', now()) FROM tenants WHERE name <> 'globex'"
        )
        connection.execute(retire, ["2 days"])
        await migrate(empty_database(), known=[m for m in known_migrations() if m.version <= stopped_at])
        connection.execute(retire, ["1 day"])
        if stopped_at >= 7:
            connection.execute("UPDATE tenants SET kept_from = now() WHERE name = 'globex'")
        await migrate(empty_database())
        rows = connection.execute(
            "SELECT name, kept_from = (SELECT max(ts_to) FROM history_partitions WHERE retired_at IS NOT NULL), "
            "kept_from = '-infinity' FROM tenants ORDER BY 1"
        ).fetchall()
    assert rows == [("acme", True, False), ("globex", stopped_at < 7, False), ("other", False, True)]


async def test_of_many_migrators_one_works(empty_database: Database) -> None:
    results = await asyncio.gather(*(migrate(empty_database()) for _ in range(6)))
    assert sorted(map(len, results)) == [0] * 5 + [len(known_migrations())]


async def test_a_migration_that_fails_leaves_no_trace_and_those_before_it_stay(empty_database: Database) -> None:
    base = known_migrations()
    number = len(base) + 1
    bad = Migration(number, "bad", "CREATE TABLE trace (a int); SELECT 1 / 0")
    with pytest.raises(Exception, match="division by zero"):
        await migrate(empty_database(), known=(*base, bad))
    with psycopg.connect(empty_database()) as connection:
        assert connection.execute("SELECT to_regclass('trace')").fetchone() == (None,)
    assert (await schema_state(empty_database(), known=(*base, bad))).pending == (bad,)
    good = Migration(number, "bad", "CREATE TABLE trace (a int)")
    assert await migrate(empty_database(), known=(*base, good)) == (good,)


async def test_a_lock_is_not_waited_for_for_ever(database: Database) -> None:
    base = known_migrations()
    wants = Migration(len(base) + 1, "wants", "ALTER TABLE tenants ADD COLUMN colour text")
    with psycopg.connect(database()) as connection:
        connection.execute("SELECT FROM tenants")
        with pytest.raises(TransactionConflict):
            await migrate(database(), known=(*base, wants), lock_timeout_s=0.05)
    assert await migrate(database(), known=(*base, wants)) == (wants,)


BREAKING = "-- Drops what the release before stopped reading.\n-- compatible: no\nCREATE TABLE more (a int)"


@pytest.mark.parametrize("text", ["CREATE TABLE more (a int)", BREAKING], ids=["compatible", "not-compatible"])
async def test_an_older_program_works_where_the_newer_one_said_so(migrated: Database, text: str) -> None:
    """Pods of the release before restart during a rollout, and a rollout is undone, by what the database recorded."""
    base = known_migrations()
    newer = Migration(len(base) + 1, "more", text)
    assert await migrate(migrated(), known=(*base, newer)) == (newer,)
    for work in (migrate, schema_state):
        if newer.compatible:
            await work(migrated())
        else:
            with pytest.raises(SchemaTooNew, match=str(newer)):
                await work(migrated())
    if newer.compatible:
        state = await schema_state(migrated())
        assert (state.applied, state.pending, state.newer) == (base, (), (Recorded(len(base) + 1, "more"),))


KNOWN = tuple(Migration(number, f"m{number}", "SELECT 1") for number in (1, 2, 3))
ROWS = [Recorded(number, f"m{number}") for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("recorded", "pending", "newer"),
    [
        pytest.param([], 3, 0, id="fresh"),
        pytest.param(ROWS[:1], 2, 0, id="behind"),
        pytest.param(ROWS, 0, 0, id="current"),
        pytest.param([*ROWS, Recorded(4, "m4"), Recorded(5, "m5")], 0, 2, id="newer-and-compatible"),
    ],
)
def test_plan(recorded: list[Recorded], pending: int, newer: int) -> None:
    state = plan(recorded, KNOWN)
    assert state.applied + state.pending == KNOWN
    assert (len(state.pending), len(state.newer)) == (pending, newer)


@pytest.mark.parametrize(
    ("recorded", "error"),
    [
        pytest.param([*ROWS, Recorded(4, "m4", compatible=False)], SchemaTooNew, id="newer"),
        # What comes after a step that broke cannot mend it for a program that knows neither.
        pytest.param([*ROWS, Recorded(4, "m4", compatible=False), Recorded(5, "m5")], SchemaTooNew, id="newer-twice"),
        pytest.param([Recorded(1, "other")], SchemaMismatch, id="another-name"),
        pytest.param([Recorded(1, "m1"), Recorded(3, "m3")], SchemaMismatch, id="a-gap"),
        pytest.param(
            [*ROWS[:2], Recorded(9, "m9"), Recorded(10, "m10")], SchemaMismatch, id="newer-of-another-program"
        ),
    ],
)
def test_plan_refuses(recorded: list[Recorded], error: type[Exception]) -> None:
    with pytest.raises(error):
        plan(recorded, KNOWN)


@pytest.mark.parametrize(
    ("text", "compatible"),
    [
        pytest.param("SELECT 1", True, id="not said"),
        pytest.param("-- compatible: yes\nSELECT 1", True, id="yes"),
        pytest.param(BREAKING, False, id="no"),
        pytest.param("SELECT 1 -- compatible: no", True, id="not a line of its own"),
    ],
)
def test_compatible(text: str, compatible: bool) -> None:
    assert Migration(1, "x", text).compatible is compatible


async def test_the_query_role_may_look(database: Database) -> None:
    assert (await schema_state(database(user=QUERY_LOGIN))).pending == ()
    with pytest.raises(StorageDefect):
        await migrate(database(user=QUERY_LOGIN), known=(*known_migrations(), Migration(99, "x", "CREATE TABLE x ()")))


async def test_logins_are_granted_once(database: Database) -> None:
    database.postgres.ensure_login("new_gateway")
    wanted = {group: ["new_gateway"] for group in GROUPS}
    first = await grant_logins(database(), wanted)
    assert [line.split()[-1] for line in first] == list(GROUPS.values())
    assert await grant_logins(database(), wanted) == ()
    with pytest.raises(RoleMissing, match="nobody"):
        await grant_logins(database(), {"query": ["nobody"]})


async def test_no_server_is_unavailable() -> None:
    with pytest.raises(StorageUnavailable):
        await migrate("host=127.0.0.1 port=1 dbname=x user=x")
