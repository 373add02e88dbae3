"""Driver errors become ours by SQLSTATE and type, never by their text; checked on the real server where it can be."""

import asyncio

import psycopg
import pytest
from psycopg import errors
from psycopg_pool import PoolClosed, PoolTimeout, TooManyRequests

from storage.database import PoolSettings, Role, make_pool
from storage.errors import (
    DataRefused,
    DuplicateKey,
    NoPartition,
    QueryCanceled,
    StorageBusy,
    StorageDefect,
    StorageError,
    StorageUnavailable,
    TransactionConflict,
    translate,
    translated,
)
from tests.storage.conftest import Database


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ("22001", DataRefused),
        ("22003", DataRefused),
        ("22021", DataRefused),
        ("23502", DataRefused),
        ("23503", DataRefused),
        ("23505", DuplicateKey),
        ("40001", TransactionConflict),
        ("40P01", TransactionConflict),
        ("55P03", TransactionConflict),
        ("57014", QueryCanceled),
        ("57P01", StorageUnavailable),
        ("57P02", StorageUnavailable),
        ("57P03", StorageUnavailable),
        ("08006", StorageUnavailable),
        ("53100", StorageUnavailable),
        ("53300", StorageUnavailable),
        ("58030", StorageUnavailable),
        ("25006", StorageUnavailable),
        ("25P03", StorageUnavailable),
        ("42P01", StorageDefect),
        ("42501", StorageDefect),
        ("25P02", StorageDefect),
        ("XX000", StorageDefect),
    ],
)
def test_an_error_is_known_by_its_code(state: str, kind: type[StorageError]) -> None:
    error = translate(errors.lookup(state)("the text does not matter"))
    assert (type(error), error.sqlstate) == (kind, state)
    assert error.retriable is (kind in (StorageUnavailable, TransactionConflict))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (psycopg.OperationalError("gone"), StorageUnavailable),
        (PoolTimeout("none free"), StorageBusy),
        (TooManyRequests("queue full"), StorageBusy),
        (PoolClosed("closed"), StorageUnavailable),
        (psycopg.ProgrammingError("ours"), StorageDefect),
        (psycopg.DataError("ours"), StorageDefect),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value.__name__,
)
def test_an_error_of_the_driver_is_known_by_its_type(error: psycopg.Error, kind: type[StorageError]) -> None:
    assert type(translate(error)) is kind
    with pytest.raises(kind) as raised, translated():
        raise error
    assert raised.value.__cause__ is error


def test_other_errors_pass() -> None:
    with pytest.raises(KeyError), translated():
        raise KeyError


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("INSERT INTO entity_attributes_double VALUES (1, 1, 1, '1970-01-01', 1)", NoPartition),
        ("INSERT INTO outbox (created_at, lane, batch_id, changes, tenant_ids, min_ts, max_ts, payload) "
         "VALUES ('1970-01-01', 0, gen_random_uuid(), 0, '{}', '{}', '{}', '')", NoPartition),
        ("INSERT INTO tenants (tenant_id, name) VALUES (1, '')", DataRefused),
        ("CREATE DOMAIN small AS integer CHECK (VALUE < 3); SELECT 5::small", DataRefused),
        ("INSERT INTO entities (tenant_id, external_id) VALUES (12345, 'x')", DataRefused),
        ("INSERT INTO tenants (tenant_id, name) VALUES (7, NULL)", DataRefused),
        ("INSERT INTO settings DEFAULT VALUES", DuplicateKey),
        ("SELECT 1/0", DataRefused),
        ("SELECT 'infinity'::timestamptz + '300000 years'::interval, '300000-01-01'::timestamptz", DataRefused),
        ("SELECT * FROM nowhere", StorageDefect),
        ("SET LOCAL statement_timeout = 1; SELECT count(*) FROM generate_series(1, 1000000000)", QueryCanceled),
        ("SET TRANSACTION READ ONLY; CREATE TABLE t ()", StorageUnavailable),
        ("SELECT pg_terminate_backend(pg_backend_pid())", StorageUnavailable),
    ],
    ids=["no-range", "no-outbox-hour", "check", "domain", "foreign-key", "not-null", "unique", "division", "time",
         "table", "timeout", "standby", "killed"],
)  # fmt: skip
def test_what_the_server_says(module_database: Database, statement: str, kind: type[StorageError]) -> None:
    with pytest.raises(StorageError) as raised, translated(), psycopg.connect(module_database()) as connection:
        connection.execute(statement.encode())
    assert type(raised.value) is kind


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(StorageUnavailable), translated():
        psycopg.connect("host=127.0.0.1 port=1 connect_timeout=2")


async def test_a_pool_without_a_free_connection(module_database: Database) -> None:
    settings = PoolSettings(module_database(), Role.INGEST, max_size=1, timeout_s=0.05)
    async with make_pool(settings) as pool, pool.connection():
        with pytest.raises(StorageBusy), translated():
            async with pool.connection():
                pass


async def test_a_lock_that_is_not_had(module_database: Database) -> None:
    async with await psycopg.AsyncConnection.connect(module_database()) as holder:
        await holder.execute("LOCK TABLE tenants")
        with pytest.raises(TransactionConflict), translated():
            async with await psycopg.AsyncConnection.connect(module_database()) as other:
                await other.execute("SET lock_timeout = '10ms'")
                await other.execute("SELECT count(*) FROM tenants")


async def test_a_deadlock(module_database: Database) -> None:
    async def lock(first: int, second: int, mine: asyncio.Event, theirs: asyncio.Event) -> None:
        with translated():
            async with await psycopg.AsyncConnection.connect(module_database()) as connection:
                await connection.execute("SET deadlock_timeout = '10ms'")
                await connection.execute("SELECT pg_advisory_xact_lock(%s)", [first])
                mine.set()
                await theirs.wait()
                await connection.execute("SELECT pg_advisory_xact_lock(%s)", [second])

    one, two = asyncio.Event(), asyncio.Event()
    results = await asyncio.gather(lock(1, 2, one, two), lock(2, 1, two, one), return_exceptions=True)
    assert TransactionConflict in {type(result) for result in results}
