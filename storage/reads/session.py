"""One read: a read-only snapshot of one tenant with a deadline that ends the statement in the database too."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any, LiteralString, TypeVar
from uuid import UUID

import psycopg
from psycopg import AsyncCursor, IsolationLevel, sql

from runtime.tasks import carried_out, retrieve
from storage.database import Connection, Pool, bounded_connection, cut
from storage.errors import QueryCanceled, StorageBusy, StorageUnavailable
from storage.reads.tenants import NO_TENANT, TenantDirectory
from storage.reads.wire import MicrosLoader
from storage.statements import statements

T = TypeVar("T")

# How long a read waits for a connection. Less than its time: a database that is down must show as that, not as a
# query that was too slow. Of a read that has hardly any time it cannot be told which of them it is.
_WAIT_SHARE = 0.8
_LONGEST_WAIT_S = 5.0
_TELLING_S = 0.25

# A statement that is to end is asked so often, and for so long, before its connection is cut instead. It then ends by
# its own timeout, which is no later than the read's.
_CANCEL_AGAIN_S = 0.05
_LONGEST_CANCEL_S = 2.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the data's own snapshot proves. Times are microseconds since 1970."""

    # Every change committed before this moment of the primary's clock is in the snapshot.
    as_of_us: int
    # Readings before this time are past the tenant's retention and not shown; None: the tenant does not exist.
    complete_from_us: int | None
    # Transactions below xmin have ended; those from xmax on had not begun, or were not known here.
    xmin: int
    xmax: int


class NotThePrimary(StorageUnavailable):
    """A server that should take the writes is a standby: what it lacks, its clock does not tell."""


class NotACopy(StorageUnavailable):
    """A server that should be a copy of the primary does not hold the primary's heartbeat: it is another database."""


class ReadSession:
    """A transaction that is under way; every statement in it sees the same snapshot."""

    def __init__(self, connection: Connection, tenant_id: int, snapshot: Snapshot) -> None:
        self._connection = connection
        self.tenant_id = tenant_id
        self.snapshot = snapshot

    @property
    def as_of_us(self) -> int:
        """The answer includes everything committed before this time on the primary's clock."""
        return self.snapshot.as_of_us

    @property
    def oldest_us(self) -> int:
        """Readings before this time, in microseconds, are past the tenant's retention and not shown."""
        return self.snapshot.complete_from_us or 0

    async def run(self, name: str, parameters: Mapping[str, Any] | None = None) -> AsyncCursor[tuple[Any, ...]]:
        """Run a statement of reads.sql; `tenant` is filled in. Timestamps come as microseconds."""
        return await self.run_text(statements("reads.sql")[name], parameters)

    async def run_text(
        self, statement: LiteralString | sql.Composed, parameters: Mapping[str, Any] | None = None
    ) -> AsyncCursor[tuple[Any, ...]]:
        """As `run`, for a statement composed from parts."""
        cursor = _cursor(self._connection)
        return await _whole(
            self._connection, cursor.execute(statement, {"tenant": self.tenant_id, **(parameters or {})})
        )


@asynccontextmanager
async def read_session(
    pool: Pool, tenants: TenantDirectory, tenant: str, timeout_s: float, *, copy_of: UUID | None = None
) -> AsyncIterator[ReadSession]:
    """A read-only, repeatable-read transaction on a connection of `pool`, for the tenant of that name.

    `copy_of`: the pool leads to a replica of that database (`heartbeat.database_id`); as_of is then what the heartbeat
    in the snapshot proves, not the server's clock.

    The time covers everything, the wait for a connection included. When it is over, or the caller is cancelled, the
    running statement is cancelled in the database, and has ended there before the connection goes back.

    Raises:
        QueryCanceled: `timeout_s` seconds have passed, or, where that is very little, most of them.
        StorageBusy: no connection became free well before that, or the database is down.
        NotACopy: the snapshot has no heartbeat of `copy_of`.
        NotThePrimary: without `copy_of`, the server is a standby.
        StorageError: what else went wrong in the database.
    """
    ends = monotonic() + timeout_s
    begun = False
    try:
        async with asyncio.timeout(timeout_s):
            wait_s = min(_LONGEST_WAIT_S, timeout_s * _WAIT_SHARE)
            async with bounded_connection(pool, wait_s=wait_s, use_s=timeout_s + _LONGEST_CANCEL_S) as connection:
                if connection.read_only is not True:
                    # Kept for the life of the connection: the pool serves nothing but reads.
                    await connection.set_isolation_level(IsolationLevel.REPEATABLE_READ)
                    await connection.set_read_only(True)
                entering = _enter(connection, tenants, tenant, ends - monotonic(), copy_of)
                session = await _whole(connection, entering)
                begun = True
                yield session
    except TimeoutError as error:
        raise QueryCanceled(f"the read took longer than the {timeout_s:.3f} s it had") from error
    except StorageBusy as error:
        if timeout_s < _TELLING_S and not begun:
            raise QueryCanceled(f"no connection became free within the {timeout_s:.3f} s that the read had") from error
        raise


async def _enter(
    connection: Connection, tenants: TenantDirectory, tenant: str, left_s: float, copy_of: UUID | None
) -> ReadSession:
    cursor = _cursor(connection)
    tenant_id = tenants.known(tenant)
    if tenant_id is None:
        # In the transaction of the data: its snapshot is taken here.
        await cursor.execute(statements("reads.sql")["find_tenant"], {"name": tenant})
        found = await cursor.fetchone()
        tenant_id = NO_TENANT if found is None else int(found[0])
        if found is not None:
            tenants.remember(tenant, tenant_id)
    # 0 would mean no limit at all.
    timeout_ms = max(1, int(left_s * 1000))
    parameters = {"tenant": str(tenant_id), "timeout_ms": str(timeout_ms), "database": copy_of}
    # The driver's BEGIN goes along with it, in one round trip.
    async with connection.pipeline():
        await cursor.execute(
            statements("reads.sql")["enter_tenant" if copy_of is None else "enter_tenant_on_copy"], parameters
        )
    row = await cursor.fetchone()
    assert row is not None
    as_of_us, complete_from_us, xmin, xmax = row[:4]
    if copy_of is None and row[4]:
        # So that the name is looked up again: it may lead to the new primary by now.
        await connection.close()
        raise NotThePrimary("the server behind the query DSN is a standby, not the primary")
    if as_of_us is None:
        raise NotACopy("the replica does not hold the heartbeat of the primary: it is a copy of something else")
    return ReadSession(connection, tenant_id, Snapshot(as_of_us, complete_from_us, int(xmin), int(xmax)))


async def _whole(connection: Connection, work: Coroutine[Any, Any, T]) -> T:
    """What `work` on a connection returns; where its caller is cancelled, it has ended in the database first.

    The driver must not be cancelled itself: between two of its steps it would leave the connection in a mode in which
    the pool takes it back, and nobody can use it.
    """
    execution = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(execution)
    except asyncio.CancelledError:
        await carried_out(_end(connection, execution))
        raise


async def _end(connection: Connection, execution: asyncio.Future[Any]) -> None:
    """End what runs on a connection; returns when it is over, or the connection is closed.

    Asks again and again: the server ignores a cancel request that arrives between two messages, such as after
    the preparation of a statement and before its execution. The driver's own way asks once, waits for long, then
    closes the connection, and the statement would run on to its timeout.
    """
    gives_up = monotonic() + _LONGEST_CANCEL_S
    while not execution.done() and monotonic() < gives_up:
        # Whatever is wrong with one request, the next one, or the end of the connection, settles it.
        with suppress(psycopg.Error):
            await connection.cancel_safe(timeout=1.0)
        await asyncio.wait({execution}, timeout=_CANCEL_AGAIN_S)
    if not execution.done():
        cut(connection)
    await asyncio.wait({execution})
    # That it was cancelled is no news.
    retrieve(execution)


def _cursor(connection: Connection) -> AsyncCursor[tuple[Any, ...]]:
    cursor = connection.cursor(binary=True)
    cursor.adapters.register_loader("timestamptz", MicrosLoader)
    return cursor
