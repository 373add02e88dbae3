"""The schema's versions: which a database has, which the program knows, and how the one becomes the other.

Migrations are the files `storage/sql/migrations/NNNN_name.sql`, applied in order of their number, each in a
transaction of its own together with its row in `schema_migrations`. `storage/sql/schema.sql` is the sum of them all,
for people who load it by hand; a test compares the catalogs of a database made either way.

To change the schema:

1. Write `storage/sql/migrations/NNNN_what_changes.sql`, with the next number and without BEGIN and COMMIT. Processes
   of the version before keep running while it is applied: add, do not rename; take no long lock (a NOT NULL column
   needs a default, an index on a table in use belongs into several steps); revoke execution from public for every
   new function. Lock in the order of those who read meanwhile, else they and the migration are a deadlock: where a
   view has to be replaced, LOCK TABLE the view first, which then locks what it reads, and only then ALTER the table.
   What changes two tables that others use together, or changes a table and then writes its rows, is several files: a
   lock is held until its file ends. Each of them must leave a database that may stay as it is, for a run can stop
   there; triggers that keep a column up to date come before the UPDATE that fills it.
2. A migration is *compatible* when every program that works on the schema before it works on the schema after it. One
   that is not says so in a line of its own, `-- compatible: no`, and what it takes away must have been unused for a
   release.
3. Make the same change in `schema.sql`, as if it had always been so, and add the version to its last INSERT.
4. Run `tests/storage/test_migrations.py`, which says where the two differ.

A program older than the database works on it as long as every migration that it does not know is compatible, which the
database records: so pods of the release before can restart while the new one rolls out, and a rollout can be undone.

A migration that was released is never edited. One that was not may be: there and in `schema.sql` alike.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import LiteralString, TypeAlias

import psycopg
from psycopg import sql

from storage.database import Connection, Role, connection_info
from storage.errors import StorageError, translated

GROUPS = {name: f"atlasco_{name}" for name in ("ingest", "query", "relay", "loader", "rollup")}
"""The group roles of the schema, by what their members do."""

Progress: TypeAlias = Callable[[str], None]

_FILE_NAME = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql")
_COMPATIBLE = re.compile(r"^-- compatible: *(\S*) *$", re.MULTILINE)
_LOCK = "SELECT {}(hashtext('atlasco.migrations'))"


class SchemaMismatch(StorageError):
    """The database's schema is not one this program can work with or bring up to date."""


class SchemaTooNew(SchemaMismatch):
    """A newer program migrated the database in a way that this one cannot work with."""


class RoleMissing(StorageError):
    """A login role that was to be granted something does not exist."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One step of the schema's history."""

    version: int
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.version:04d}_{self.name}"

    @property
    def compatible(self) -> bool:
        """Whether programs that work on the schema before this step work on the one after it."""
        return "no" not in _COMPATIBLE.findall(self.text)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A row of `schema_migrations`: a step that a database has taken."""

    version: int
    name: str
    compatible: bool = True

    def __str__(self) -> str:
        return f"{self.version:04d}_{self.name}"


@dataclass(frozen=True, slots=True)
class SchemaState:
    """Where a database stands: what was applied to it, and what this program would still apply, in order.

    `newer` is what a newer program applied beyond that; this one works on it all the same.
    """

    applied: tuple[Migration, ...]
    pending: tuple[Migration, ...]
    newer: tuple[Recorded, ...] = ()


def known_migrations() -> tuple[Migration, ...]:
    """Every migration this program has, in order.

    Raises:
        ValueError: a file is misnamed, says something else than yes or no of its compatibility, or the numbers are
            not 1, 2, 3, …
    """
    found = []
    for file in resources.files("storage").joinpath("sql", "migrations").iterdir():
        match = _FILE_NAME.fullmatch(file.name)
        if match is None:
            raise ValueError(f"{file.name}: a migration is named NNNN_name.sql")
        text = file.read_text("utf-8")
        # A misspelt "no" would count as yes, and let old programs loose on a schema they do not fit.
        if not {"yes", "no"}.issuperset(said := _COMPATIBLE.findall(text)) or len(said) > 1:
            raise ValueError(f"{file.name}: compatible is said once, and is yes or no")
        found.append(Migration(int(match[1]), match[2], text))
    found.sort(key=lambda migration: migration.version)
    if [migration.version for migration in found] != list(range(1, len(found) + 1)):
        raise ValueError("migrations must be numbered 1, 2, 3, … without gaps")
    return tuple(found)


def plan(recorded: Sequence[Recorded], known: Sequence[Migration]) -> SchemaState:
    """What is left to apply, from the rows of a database's `schema_migrations`, in order.

    Raises:
        SchemaTooNew: the database has a migration that this program does not know and that is not compatible.
        SchemaMismatch: the database's history is not the beginning of this program's, nor this program's the
            beginning of the database's.
    """
    for row, migration in zip(recorded, known, strict=False):
        if (row.version, row.name) != (migration.version, migration.name):
            raise SchemaMismatch(
                f"the database has migration {row} where this program has {migration}: "
                "it was not made by a release of this program"
            )
    newer = tuple(recorded[len(known) :])
    breaking = [str(row) for row in newer if not row.compatible]
    if breaking:
        raise SchemaTooNew(
            f"this program knows schema versions up to {len(known)}, and the database has {', '.join(breaking)}, which "
            "older programs cannot work with: run the newer program"
        )
    return SchemaState(tuple(known[: len(recorded)]), tuple(known[len(recorded) :]), newer)


async def schema_state(dsn: str, *, known: Sequence[Migration] | None = None) -> SchemaState:
    """Where the database at `dsn` stands. Changes nothing; needs no more than the query role.

    Raises:
        SchemaMismatch: see `plan`.
        StorageError: the database cannot be reached or read.
    """
    with translated():
        async with await _connect(dsn) as connection:
            return plan(await _recorded(connection), known_migrations() if known is None else known)


async def migrate(
    dsn: str,
    *,
    progress: Progress = lambda _: None,
    lock_timeout_s: float = 30.0,
    known: Sequence[Migration] | None = None,
) -> tuple[Migration, ...]:
    """Bring the database at `dsn` to this program's schema version, or leave it at a newer one; returns what was done.

    The login needs the right to create in the database, and CREATEROLE unless the group roles exist. Of several
    migrators at once one works while the others wait; they then find nothing left to do. A migration that fails
    leaves no trace; those before it stay. `lock_timeout_s` bounds how long a statement waits for a lock, for
    everything that comes after a waiting ALTER TABLE waits too.

    Raises:
        SchemaMismatch: see `plan`.
        TransactionConflict: a lock was not had in time; try again when the database is less busy.
        StorageError: the database cannot be reached, or refused a statement.
    """
    known = known_migrations() if known is None else known
    with translated():
        async with await _connect(dsn) as connection:
            # 1. Be the only migrator. The lock is the session's: it outlives each migration's transaction and ends
            #    with the connection, also when this process is killed.
            if not await _scalar(connection, _LOCK.format("pg_try_advisory_lock")):
                progress("waiting for another migration of this database")
                await connection.execute(_LOCK.format("pg_advisory_lock"))
            # 2. Look only now: whoever had the lock may have done the work.
            pending = plan(await _recorded(connection), known).pending
            # 3. Apply, one transaction each.
            for migration in pending:
                progress(f"applying {migration}")
                await _apply(connection, migration, lock_timeout_s)
            return pending


async def grant_logins(dsn: str, logins: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Make existing login roles members of group roles; returns a line for each grant that was new.

    `logins` has the names of login roles by the keys of `GROUPS`.

    Raises:
        RoleMissing: there is no such login role.
        StorageError: the database refused, for example because `dsn` names a user without the right to grant.
    """
    granted = []
    with translated():
        async with await _connect(dsn) as connection:
            for group, login in [(GROUPS[key], login) for key, names in logins.items() for login in names]:
                member = await (
                    await connection.execute(
                        "SELECT pg_has_role(oid, %s, 'MEMBER') FROM pg_roles WHERE rolname = %s", [group, login]
                    )
                ).fetchone()
                if member is None:
                    raise RoleMissing(f"there is no login role {login!r}: create it first, then grant again")
                if not member[0]:
                    await connection.execute(
                        sql.SQL("GRANT {} TO {}").format(sql.Identifier(group), sql.Identifier(login))
                    )
                    granted.append(f"{login} is now a member of {group}")
    return tuple(granted)


async def _connect(dsn: str) -> Connection:
    return await psycopg.AsyncConnection.connect(connection_info(dsn, Role.MAINTAIN), autocommit=True)


async def _scalar(connection: Connection, query: LiteralString) -> object:
    row = await (await connection.execute(query)).fetchone()
    return row[0] if row else None


async def _recorded(connection: Connection) -> list[Recorded]:
    if await _scalar(connection, "SELECT to_regclass('public.schema_migrations')") is None:
        return []
    cursor = await connection.execute("SELECT version, name, compatible FROM public.schema_migrations ORDER BY version")
    return [Recorded(*row) for row in await cursor.fetchall()]


async def _apply(connection: Connection, migration: Migration, lock_timeout_s: float) -> None:
    async with connection.transaction():
        await connection.execute("SET LOCAL search_path = public, pg_temp")
        await connection.execute(
            "SELECT set_config('lock_timeout', %s, true)", [str(max(1, round(lock_timeout_s * 1000)))]
        )
        await connection.execute(migration.text)
        await connection.execute(
            "INSERT INTO schema_migrations (version, name, compatible) VALUES (%s, %s, %s)",
            [migration.version, migration.name, migration.compatible],
        )
