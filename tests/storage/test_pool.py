"""A pool stays whole, whoever gives up and when."""

import asyncio
import os
import random
import select
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg_pool import AsyncConnectionPool

from runtime.tasks import carried_out
from storage.database import Pool, PoolSettings, Role, make_pool
from storage.relay.service import relay_pool
from storage.rollup.service import rollup_pool
from tests.gateway.faulty_link import FaultyLink
from tests.storage.conftest import QUERY_LOGIN, Database
from tests.waiting import PATIENCE_S, until

SIZE = 3


@pytest.fixture
async def pool(module_database: Database) -> AsyncIterator[Pool]:
    settings = PoolSettings(module_database(user=QUERY_LOGIN), Role.QUERY, max_size=SIZE, timeout_s=PATIENCE_S)
    async with make_pool(settings) as opened:
        yield opened


async def selected(pool: Pool) -> Any:
    async with pool.connection() as connection:
        return await (await connection.execute("SELECT 1")).fetchone()


async def assert_whole(pool: Pool) -> None:
    """As many connections as there may be can be had at once."""
    async with AsyncExitStack() as held:
        for _ in range(SIZE):
            connection = await held.enter_async_context(pool.connection(timeout=PATIENCE_S))
            await connection.execute("SELECT 1")


async def test_a_caller_who_is_cancelled_while_he_gives_a_connection_back_has_given_it_back(pool: Pool) -> None:
    for _ in range(SIZE):
        inside, leave = asyncio.Event(), asyncio.Event()

        async def use(inside: asyncio.Event = inside, leave: asyncio.Event = leave) -> None:
            async with pool.connection():
                inside.set()
                await leave.wait()

        using = asyncio.create_task(use())
        await inside.wait()
        # As it is held, for a turn of the loop or two, where many wait for a connection and give up.
        async with pool._lock:
            leave.set()
            await until(lambda: pool._lock._waiters, "it gives the connection back")
            using.cancel()
            await asyncio.sleep(0)
        await asyncio.wait({using})
        assert using.cancelled()
    await assert_whole(pool)


async def test_who_is_cancelled_as_a_connection_arrives_gets_none(pool: Pool) -> None:
    went_on = False

    async def use() -> None:
        nonlocal went_on
        async with pool.connection():
            went_on = True

    held = [await pool.getconn() for _ in range(SIZE)]
    waiting = asyncio.create_task(use())
    await until(lambda: pool.get_stats()["requests_waiting"], "it waits")
    # Both before the loop has another turn.
    await AsyncConnectionPool.putconn(pool, held.pop())
    waiting.cancel()
    await asyncio.wait({waiting})
    assert waiting.cancelled()
    assert not went_on
    for connection in held:
        await pool.putconn(connection)
    await assert_whole(pool)


async def test_clients_who_come_and_go_leave_the_pool_whole(pool: Pool) -> None:
    chance = random.Random(1)

    async def use() -> None:
        async with pool.connection() as connection:
            await connection.execute("SELECT 1")

    waiting: set[asyncio.Task[None]] = set()
    for _ in range(3_000):
        waiting.add(asyncio.create_task(use()))
        if len(waiting) > 30:
            for task in chance.sample(sorted(waiting, key=id), 10):
                task.cancel()
        await asyncio.sleep(0)
        waiting = {task for task in waiting if not task.done()}
    await asyncio.gather(*waiting, return_exceptions=True)
    await assert_whole(pool)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda dsn: make_pool(PoolSettings(dsn, Role.QUERY)), id="query"),
        pytest.param(lambda dsn: make_pool(PoolSettings(dsn, Role.INGEST)), id="ingest"),
        pytest.param(relay_pool, id="relay"),
        pytest.param(rollup_pool, id="rollup"),
    ],
)
async def test_a_connection_that_the_server_has_ended_is_not_given_out(
    module_database: Database, make: Callable[[str], Pool]
) -> None:
    """As after a failover: nobody's first work is to fail for it."""
    async with make(module_database()) as pool:
        async with pool.connection() as connection:
            descriptor, backend = connection.fileno(), connection.info.backend_pid
        async with await psycopg.AsyncConnection.connect(module_database(), autocommit=True) as owner:
            await owner.execute("SELECT pg_terminate_backend(%s)", [backend])
        arrived = select.poll()
        arrived.register(descriptor, select.POLLIN)
        await until(lambda: arrived.poll(0), "the server's last word")
        async with pool.connection(timeout=PATIENCE_S) as connection:
            assert connection.info.backend_pid != backend
            await connection.execute("SELECT 1")


async def test_a_pool_looks_again_and_again_whether_the_server_is_back(module_database: Database) -> None:
    """With pauses that double, a minute would be over after six tries, and any failover before that."""
    given = psycopg.conninfo.conninfo_to_dict(module_database())
    async with FaultyLink.to(str(given["host"]), int(str(given["port"]))) as link:
        dsn = make_conninfo(module_database(), host="127.0.0.1", port=link.port, sslmode="disable")
        link.cut()
        async with make_pool(PoolSettings(dsn, Role.INGEST, max_size=1, timeout_s=PATIENCE_S)) as pool:
            waiting = asyncio.create_task(selected(pool))
            # Nobody else asks meanwhile, and nobody asks again.
            await until(lambda: link.refused >= 8, "the eighth try", beside=waiting)
            link.resume()
            assert await waiting == (1,)


async def test_a_peer_that_vanishes_is_noticed(module_database: Database) -> None:
    async with (
        make_pool(PoolSettings(module_database(), Role.INGEST)) as pool,
        pool.connection() as connection,
    ):
        with socket.socket(fileno=os.dup(connection.fileno())) as peer:
            assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000


async def test_what_is_carried_out_ends_before_the_caller_is_cancelled() -> None:
    goes_on, ended = asyncio.Event(), False

    async def work() -> None:
        nonlocal ended
        await goes_on.wait()
        ended = True

    task = asyncio.create_task(carried_out(work()))
    for _ in range(3):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended
