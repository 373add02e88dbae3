"""The schema's promises that no other test covers: who sees what, who may do what, what is refused."""

import threading

import psycopg
import pytest

from tests.storage.conftest import INGEST_LOGIN, QUERY_LOGIN, Database, NewDatabase

VIEWS = (
    "tenants",
    "entities",
    "attributes",
    "latest_values",
    "quarantine",
    "entity_attributes",
    "entity_attributes_double",
    "entity_attributes_bigint",
    "entity_attributes_boolean",
    "entity_attributes_text",
)


@pytest.fixture(scope="module")
def populated(module_database: Database) -> Database:
    """Two tenants with one row in every table that queries may see."""
    with psycopg.connect(module_database()) as connection:
        for name in ("acme", "globex"):
            row = connection.execute("SELECT register_tenant(%s)", [name]).fetchone()
            assert row
            tenant = row[0]
            connection.execute(
                "SELECT ensure_history(%s, now() - interval '1 hour', now() + interval '1 hour')", [tenant]
            )
            connection.execute("SELECT register_entity(%s, 'pump', '', '{}')", [tenant])
            connection.execute("SELECT register_attributes(%s, '{speed}', '{double}', '{\"\"}')", [tenant])
            for table, value in (("double", "1.5"), ("bigint", "2"), ("boolean", "true"), ("text", "'x'")):
                connection.execute(f"INSERT INTO entity_attributes_{table} VALUES (%s, 1, 1, now(), {value})", [tenant])
            connection.execute("INSERT INTO latest_values VALUES (%s, 1, 1, now(), 1.5)", [tenant])
            connection.execute(
                "INSERT INTO quarantine (tenant_id, entity_id, attribute_id, ts, reason)"
                " VALUES (%s, 1, 1, now(), 'too old')",
                [tenant],
            )
    return module_database


def tenant_id(database: Database, name: str) -> int:
    with psycopg.connect(database()) as connection:
        row = connection.execute("SELECT tenant_id FROM tenants WHERE name = %s", [name]).fetchone()
    assert row
    return int(row[0])


@pytest.mark.parametrize("view", VIEWS)
def test_a_query_sees_the_tenant_it_names_and_nothing_when_it_names_none(populated: Database, view: str) -> None:
    acme = tenant_id(populated, "acme")
    with psycopg.connect(populated(user=QUERY_LOGIN, options="-c search_path=tenant_data,public")) as connection:
        assert connection.execute(f"SELECT * FROM {view}").fetchall() == []
        connection.execute("SELECT set_config('atlasco.tenant_id', %s, true)", [str(acme)])
        seen = connection.execute(f"SELECT DISTINCT tenant_id FROM {view}").fetchall()
        assert seen == [(acme,)]
        connection.rollback()
        assert connection.execute(f"SELECT * FROM {view}").fetchall() == []


@pytest.mark.parametrize("view", VIEWS)
def test_a_query_cannot_reach_the_tables_behind(populated: Database, view: str) -> None:
    with (
        psycopg.connect(populated(user=QUERY_LOGIN)) as connection,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        connection.execute(f"SELECT * FROM public.{view}")


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE public.mine ()",
        "DROP TABLE tenants",
        "UPDATE tenants SET retention = '1 hour'",
        "DELETE FROM quarantine",
        "DELETE FROM entity_attributes_double",
        "DELETE FROM outbox",
        "INSERT INTO history_partitions VALUES (1, 2, now(), now() + '1 day', 'x')",
        "INSERT INTO schema_migrations VALUES (2, 'x')",
    ],
)
def test_ingest_may_not(populated: Database, statement: str) -> None:
    with (
        psycopg.connect(populated(user=INGEST_LOGIN)) as connection,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        connection.execute(statement)


def test_ingest_may_make_partitions_and_register(populated: Database) -> None:
    with psycopg.connect(populated(user=INGEST_LOGIN)) as connection:
        row = connection.execute("SELECT register_tenant('initech')").fetchone()
        assert row
        made = connection.execute("SELECT ensure_history(%s, now(), now() + interval '1 second')", [row[0]]).fetchone()
        assert made is not None
        assert made[0] in (0, 1)  # another tenant of the slot may have needed the day before


def test_with_tenant_and_time_a_query_is_planned_for_one_leaf(populated: Database) -> None:
    acme = tenant_id(populated, "acme")
    with psycopg.connect(populated(user=QUERY_LOGIN, options="-c search_path=tenant_data,public")) as connection:
        connection.execute("SELECT set_config('atlasco.tenant_id', %s, true)", [str(acme)])
        connection.execute("SELECT now()::date::timestamptz")
        plan = connection.execute(
            f"EXPLAIN SELECT * FROM entity_attributes_double WHERE tenant_id = {acme} AND entity_id = 1"
            " AND attribute_id = 1 AND ts >= date_trunc('day', now(), 'UTC')"
        ).fetchall()
    leaves = {word for (line,) in plan for word in line.split() if word.startswith("entity_attributes_double_s")}
    assert leaves
    assert all(f"_s{acme >> 20:03d}_" in leaf for leaf in leaves), "another customer's partition is planned for"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param("window_past = '0'", id="no-window"),
        pytest.param("window_past = '101 years', retention = '100 years'", id="window-beyond-an-era"),
        pytest.param("retention = '101 years'", id="retention"),
        pytest.param("retention = '1 day'", id="retention-below-window"),
        pytest.param("window_future = '8 days'", id="future"),
        pytest.param("outside_window = 'drop'", id="silent-drop"),
        pytest.param("name = ''", id="empty-name"),
        pytest.param("name = E'a\\nb'", id="control-character"),
    ],
)
def test_a_tenant_out_of_bounds_is_refused(populated: Database, change: str) -> None:
    with psycopg.connect(populated()) as connection, pytest.raises(psycopg.errors.CheckViolation):
        connection.execute(f"UPDATE tenants SET {change} WHERE name = 'acme'")


def test_two_databases_may_be_set_up_at_once(new_database: NewDatabase, template: str) -> None:
    from tests.storage.test_migrations import SCHEMA

    schema = SCHEMA.read_text().replace("atlasco_ingest", "racing_ingest").replace("atlasco_query", "racing_query")
    errors: list[Exception] = []

    def load(dsn: str) -> None:
        try:
            with psycopg.connect(dsn, autocommit=True) as connection:
                connection.execute(schema.encode())
        except psycopg.Error as error:
            errors.append(error)

    with new_database("template0") as one, new_database("template0") as two:
        threads = [threading.Thread(target=load, args=[made()]) for made in (one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
