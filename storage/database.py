"""Connections: a pool per role, with the settings every connection of ours needs."""

import asyncio
import os
import select
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, TypeAlias

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.pq import PipelineStatus
from psycopg_pool import AsyncConnectionPool

from runtime.tasks import carried_out
from storage.errors import StorageUnavailable, translated

Connection: TypeAlias = psycopg.AsyncConnection[tuple[Any, ...]]


RECONNECT_S: Final = 1.0
"""How often a pool tries to connect to a server that is down. The driver's own way doubles its pauses, so that after a
failover of a minute another one would pass before anybody looks."""


class Pool(AsyncConnectionPool[Connection]):
    """Connections to one server for one purpose; whoever waits for one waits `timeout_s` seconds at most.

    Not yet open: `await pool.open()` opens it, and the event loop must run by then.
    """

    def __init__(
        self, info: str, *, name: str, min_size: int = 1, max_size: int, timeout_s: float, autocommit: bool = False
    ) -> None:
        super().__init__(
            info,
            connection_class=psycopg.AsyncConnection[tuple[Any, ...]],
            min_size=min_size,
            max_size=max_size,
            timeout=timeout_s,
            name=f"atlasco-{name}",
            open=False,
            # Statements are few and repeat for ever: prepare at once.
            kwargs={"prepare_threshold": 0, "autocommit": autocommit},
            check=_check_idle,
            reconnect_timeout=RECONNECT_S,
            reconnect_failed=_connect_anew,
        )

    async def getconn(self, timeout: float | None = None) -> Connection:  # noqa: ASYNC109 - the driver's
        """As the driver does it, but who is cancelled gets no connection.

        Python's wait_for(), up to 3.11, returns what arrives together with a cancellation and forgets the latter: work
        that is to end would go on, and a process wait for it for ever.
        """
        task = asyncio.current_task()
        before = 0 if task is None else task.cancelling()
        connection = await super().getconn(timeout)
        if task is not None and task.cancelling() > before:
            await self.putconn(connection)
            raise asyncio.CancelledError
        return connection

    async def putconn(self, conn: Connection) -> None:
        """As the driver does it, but a caller who is cancelled meanwhile has given the connection back all the same.

        He does so under a lock, which is held for some turns of the loop where many wait and give up. His connection
        would be nobody's, and never be replaced: where clients come and go, a crowded pool would lose one after the
        other until it has none.
        """
        await carried_out(super().putconn(conn))


class Role(StrEnum):
    """What a connection is for; becomes part of `application_name`."""

    INGEST = "ingest"
    QUERY = "query"
    MAINTAIN = "maintain"


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """How a pool is made. Times in seconds."""

    dsn: str
    role: Role
    # Shown in the pool's metrics and thread names.
    name: str = ""
    min_size: int = 1
    max_size: int = 4
    # How long a caller waits for a free connection.
    timeout_s: float = 30.0
    # 0: no limit.
    statement_timeout_s: float = 0.0


def connection_info(dsn: str, role: Role, *, statement_timeout_s: float = 0.0) -> str:
    """A connection string with our settings added to a caller's `dsn`.

    Raises:
        psycopg.ProgrammingError: the dsn is not a connection string or URI.
    """
    options = ["-c timezone=UTC", f"-c statement_timeout={int(statement_timeout_s * 1000)}"]
    if role is Role.QUERY:
        # The views of tenant_data have the names of the tables and show one tenant: a statement that forgets its
        # tenant condition then finds nothing instead of everything.
        options.append("-c search_path=tenant_data,public")
    if role is Role.INGEST:
        # An idle open transaction holds back vacuum and the completeness watermark of everything after it.
        options.append("-c idle_in_transaction_session_timeout=60000")
    given = psycopg.conninfo.conninfo_to_dict(dsn).get("options")
    return make_conninfo(
        dsn,
        application_name=f"atlasco-{role}",
        options=" ".join(filter(None, [str(given) if given else "", *options])),
        # A peer that vanished without a word must not hold a connection for the kernel's two hours.
        keepalives_idle=30,
        keepalives_interval=10,
        keepalives_count=3,
        # Nor one that vanished with something on its way to it, for a quarter of an hour. In milliseconds.
        tcp_user_timeout=60_000,
        connect_timeout=10,
    )


def make_pool(settings: PoolSettings) -> Pool:
    """A pool with a role's settings, not yet open."""
    return Pool(
        connection_info(settings.dsn, settings.role, statement_timeout_s=settings.statement_timeout_s),
        name=settings.name or settings.role,
        min_size=settings.min_size,
        max_size=settings.max_size,
        timeout_s=settings.timeout_s,
    )


@asynccontextmanager
async def bounded_connection(pool: Pool, *, wait_s: float, use_s: float) -> AsyncIterator[Connection]:
    """A connection of `pool`, waited for at most `wait_s` seconds and cut when it is not given back within `use_s`.

    Cancelling alone does not end the use of a server that hangs: the driver first asks the server to cancel, and a
    rollback waits for its answer.

    Raises:
        StorageBusy: no connection became free.
        StorageUnavailable: the connection was cut.
        StorageError: what else went wrong in the database.
    """
    is_late = False

    def end(connection: Connection) -> None:
        nonlocal is_late
        is_late = True
        cut(connection)

    try:
        with translated(), ExitStack() as timer:
            async with pool.connection(timeout=wait_s) as connection:
                timer.callback(asyncio.get_running_loop().call_later(use_s, end, connection).cancel)
                yield connection
    except StorageUnavailable as error:
        if is_late:
            raise StorageUnavailable(f"no answer within {use_s:.3f} s") from error
        raise


def cut(connection: Connection) -> None:
    """End a connection without a word to its server; whoever waits for an answer on it gets an OperationalError.

    Closing it instead would leave them waiting for a descriptor that is gone, or is somebody else's by then.
    """
    # Closed by now, or by the other side: then there is nothing to end.
    with suppress(psycopg.OperationalError, OSError), socket.socket(fileno=os.dup(connection.fileno())) as peer:
        peer.shutdown(socket.SHUT_RDWR)


async def _connect_anew(pool: AsyncConnectionPool[Any]) -> None:
    """Begin again to connect, where there is no connection; where there is one, the pool grows as it is used."""
    if not pool.get_stats()["pool_available"]:
        # Looks at no connection then, and makes the pool grow.
        await pool.check()


async def _check_idle(connection: Connection) -> None:
    """Raise OperationalError when a connection that lay in the pool is no good any more.

    Without a word to the server, as it is asked before every use. A server that hangs would not answer, and nothing
    bounds how long a pool waits here.
    """
    arrived = select.poll()
    arrived.register(connection.fileno(), select.POLLIN)
    problem = ""
    if connection.pgconn.pipeline_status != PipelineStatus.OFF:
        # A caller who is cancelled while the driver switches the mode on leaves it on, and the pool, which looks at the
        # transaction only, takes the connection back. Statements on it would end without a result.
        problem = "the connection was left in pipeline mode"
    elif arrived.poll(0):
        # A server says that it ends a connection before it hangs up, and hardly anything else on an idle one.
        problem = "the server has ended the connection"
    if problem:
        # Or the pool would take it back as a good one.
        await connection.close()
        raise psycopg.OperationalError(problem)
