"""A read that is given up, at whatever moment, leaves a connection that the next one can use."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from psycopg.pq import PipelineStatus

from storage.database import Pool, PoolSettings, Role, make_pool
from storage.errors import QueryCanceled, StorageBusy, StorageError
from storage.reads.session import read_session
from storage.reads.tenants import TenantDirectory
from tests.storage.reads_database import Known, known_database
from tests.waiting import PATIENCE_S, until

MOMENTS = 150
"""More turns of the event loop than a read takes to begin."""


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Known]:
    with known_database(tmp_path_factory.mktemp("read_session")) as made:
        yield made


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a cancellation takes, it is waited for: its connection is not cut."""
    monkeypatch.setattr("storage.reads.session._LONGEST_CANCEL_S", PATIENCE_S)


@pytest.fixture
async def pool(known: Known) -> AsyncIterator[Pool]:
    async with make_pool(PoolSettings(known.dsn("reader"), Role.QUERY, max_size=1)) as opened:
        await opened.wait(PATIENCE_S)
        yield opened


async def one(pool: Pool, directory: TenantDirectory) -> Any:
    async with read_session(pool, directory, "acme", PATIENCE_S) as session:
        cursor = await session.run_text("SELECT 1")
        # As pages of series read it.
        assert cursor.pgresult is not None
        return await cursor.fetchone()


async def backend(pool: Pool) -> int:
    async with pool.connection() as connection:
        return connection.info.backend_pid


async def test_a_caller_may_leave_at_any_moment_of_a_reads_beginning(
    pool: Pool, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a busy process, where the driver lets others have their turn after each of its steps.
    monkeypatch.setattr("psycopg.waiting.MAX_BUSY_TIME", -1.0)
    pid = await backend(pool)
    left_early = 0
    for moment in range(MOMENTS):
        # Unknown to half of the reads: they look it up first.
        directory = TenantDirectory()
        if moment % 2:
            assert await one(pool, directory) == (1,)
        reading = asyncio.create_task(one(pool, directory))
        for _ in range(moment // 2):
            await asyncio.sleep(0)
        reading.cancel()
        with suppress(asyncio.CancelledError):
            await reading
        left_early += reading.cancelled()
        assert await one(pool, directory) == (1,), moment
    assert left_early > MOMENTS / 4
    assert await backend(pool) == pid, "no connection was lost"


async def test_a_connection_left_in_pipeline_mode_is_not_given_out(known: Known) -> None:
    for role, user in ((Role.QUERY, "reader"), (Role.INGEST, "writer")):
        async with make_pool(PoolSettings(known.dsn(user), role, max_size=1)) as pool:
            async with pool.connection() as connection:
                left = connection.info.backend_pid
                await connection.commit()
                connection.pgconn.enter_pipeline_mode()
            async with pool.connection(timeout=PATIENCE_S) as connection:
                assert connection.info.backend_pid != left
                assert connection.pgconn.pipeline_status == PipelineStatus.OFF
                cursor = await connection.execute("SELECT 1")
                assert await cursor.fetchone() == (1,)


async def test_a_deadline_of_a_moment_is_a_deadline_and_not_a_database_that_is_down(pool: Pool) -> None:
    directory = TenantDirectory()

    async def ends_in(timeout_s: float) -> type[StorageError]:
        with pytest.raises(StorageError) as caught:
            async with read_session(pool, directory, "acme", timeout_s):
                raise AssertionError("there is no connection")
        return type(caught.value)

    async def is_busy() -> bool:
        return await ends_in(0.5) is StorageBusy

    async with pool.connection():
        assert await ends_in(0.01) is QueryCanceled
        # Where the machine stands still for longer than the rest of its time, the read is out of time instead.
        await until(is_busy, "a read that has the time to tell says that no connection is free")


async def test_a_time_that_ends_while_a_read_begins_costs_no_connection(
    known: Known, pool: Pool, patient: None
) -> None:
    pid = await backend(pool)
    directory = TenantDirectory()
    assert await one(pool, directory) == (1,)
    with psycopg.connect(known.dsn()) as owner:
        owner.execute("LOCK TABLE tenants IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(QueryCanceled):
            async with read_session(pool, directory, "acme", 0.3):
                raise AssertionError("it cannot begin")
    assert await one(pool, directory) == (1,)
    assert await backend(pool) == pid
