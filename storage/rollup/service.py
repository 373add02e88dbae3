"""The process: of all the workers that run, the one with the lease works, the others stand by."""

import asyncio
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import psycopg
from google.protobuf.message import DecodeError
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg_pool import AsyncConnectionPool

from runtime.metrics import Metrics
from runtime.process import DependencyUnreachable, Shutdown
from storage.database import Connection, Pool, Role, connection_info
from storage.deletion import delete_some, forget_deletions, note_problem
from storage.errors import StorageError, StorageUnavailable, TransactionConflict, translated
from storage.leases import Lease, Leases
from storage.model import ValueType
from storage.relay.cursor import Recovery, microseconds
from storage.relay.drain import PageLimits
from storage.rollup import follow
from storage.rollup.backfill import (
    StepLimits,
    dropped_projections,
    fill_projection,
    fill_rollup,
    remove_dropped,
    remove_projection,
)
from storage.rollup.buckets import compute
from storage.rollup.config import RollupConfig
from storage.rollup.dirty import Declarations, Dirty, Keys, ProjectionTable, dirty
from storage.rollup.isolation import Isolation, Kind, Part, Rests
from storage.rollup.projection import refresh
from storage.statements import statements

log = logging.getLogger(__name__)

_SQL = statements("rollup.sql")

SCOPE: Final = "rollup"

_STATEMENT_TIMEOUT_S: Final = 300.0
_START_TIMEOUT_S: Final = 30.0
# After a failure, and after many in a row.
_SHORTEST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 10.0
# Also how soon the name of a dropped projection is free.
_HOUSEKEEPING_S: Final = 60.0

LONGEST_READ_S: Final = 60.0
"""How long the table of a dropped projection is kept for reads that had begun before; more than a gateway gives a read,
which is `QueryLimits.longest_s`."""


def rollup_pool(dsn: str) -> Pool:
    """A worker's connections, not yet open; they commit each statement by itself unless told otherwise."""
    info = connection_info(dsn, Role.MAINTAIN, statement_timeout_s=_STATEMENT_TIMEOUT_S)
    options = conninfo_to_dict(info)["options"]
    # What is computed commits together with how far it is: a crash that loses the last moments loses both, and the
    # worker does them again. So no commit need wait for the disk.
    return AsyncConnectionPool(
        make_conninfo(
            info, application_name="atlasco-rollup", options=f"{options} -c synchronous_commit=off -c jit=off"
        ),
        connection_class=psycopg.AsyncConnection[tuple[Any, ...]],
        min_size=1,
        max_size=3,
        timeout=10.0,
        name="atlasco-rollup",
        open=False,
        kwargs={"prepare_threshold": 0, "autocommit": True},
    )


class Worker:
    """What is done under one lease. Not for several tasks at once.

    Every method may end in a StorageError, after which it may be called again; `follow.LeaseLost` among them ends the
    lease. `clock`: seconds of a clock that is never set.
    """

    def __init__(
        self,
        pool: Pool,
        epoch: int,
        config: RollupConfig,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._epoch = epoch
        self._metrics = metrics
        self._settle_s = config.settle_s
        self._limits = PageLimits(config.page_rows, config.page_bytes)
        self._steps = StepLimits(rollup_devices=config.backfill_devices)
        self._clock = clock
        # Dropped projections, and when they were first seen to be: their drop is no younger.
        self._dropped: dict[int, float] = {}
        self._housekept_s = float("-inf")
        self._failing = Rests(clock, _SHORTEST_PAUSE_S, _LONGEST_PAUSE_S)
        self._isolation = Isolation(metrics, clock)

    async def adopt(self) -> None:
        """The first act under the lease."""
        await follow.adopt(self._pool, self._epoch)

    async def turn(self) -> bool:
        """A round over the outbox and one step of everything else that is due; whether there may be more at once.

        What fails is reported, rests for a while, and keeps nothing else from going on: readings must be deleted, and
        new rollups filled, even if no round can be finished.

        Raises:
            StorageUnavailable, LeaseLost: nothing can go on.
        """
        more = False
        for step in (self.round, self.fill, self.delete, self.housekeeping):
            if step == self.housekeeping and self._clock() - self._housekept_s < _HOUSEKEEPING_S:
                continue
            if not self._failing.is_due(step.__name__):
                continue
            try:
                more = await step() or more
            except (StorageUnavailable, follow.LeaseLost):
                raise
            except (StorageError, DecodeError) as error:
                self._failing.failed(step.__name__)
                report(self._metrics, error)
            else:
                self._failing.succeeded(step.__name__)
        return more

    async def round(self) -> bool:
        """Compute what the next pages make stale, and move the cursors, in one transaction."""
        found = await follow.read(self._pool, self._epoch, self._limits)
        async with self._transaction() as connection:
            if isinstance(found, Recovery):
                log.warning("the outbox's cursors begin anew", extra={"recovery": found.value})
                await follow.recover(connection, self._epoch, found)
                self._metrics.count("atlasco_rollup_rewinds", reason=found.value)
                return True
            payloads = found.payloads
            if payloads:
                declarations = await declared(connection)
                await self._apply(connection, dirty(payloads, declarations), declarations)
                self._metrics.count("atlasco_rollup_rounds")
            await follow.store(connection, self._epoch, found)
        return not found.last

    async def fill(self) -> bool:
        """A step of the back-fills, and of removing what was dropped."""
        async with self._transaction() as connection:
            more = await fill_rollup(connection, self._steps, self._isolation)
            declarations = await declared(connection)
            rows = await fill_projection(connection, declarations, self._steps, self._isolation)
            self._metrics.count("atlasco_rollup_rows_refreshed", rows or 0)
            dropped = await remove_dropped(connection, self._steps)
        return more or rows is not None or dropped

    async def delete(self) -> bool:
        """A step of the deletions."""
        try:
            async with self._transaction() as connection:
                readings = await delete_some(connection, self._settle_s)
        except (StorageUnavailable, TransactionConflict, follow.LeaseLost):
            raise
        except StorageError as error:
            # One device's trouble must not stop the rollups of all.
            self._metrics.count("atlasco_rollup_failures", source="data")
            log.error("a deletion cannot go on yet", extra={"error": f"{type(error).__name__}: {error}"})
            async with self._transaction() as connection:
                await note_problem(connection, self._settle_s, str(error))
            return False
        self._metrics.count("atlasco_deletion_readings", readings or 0)
        return readings is not None

    async def housekeeping(self) -> bool:
        """Forget what is past its term, and remove the tables of dropped projections; never is there more at once.

        What fails is reported, is tried again with the next housekeeping, and keeps nothing else from going on.
        """
        # Before anything is tried: what fails each time must not be tried in each turn.
        self._housekept_s = self._clock()
        async with self._reported("operations are not forgotten"), self._transaction() as connection:
            await forget_deletions(connection)
        async with self._reported("rollups are not retired"), self._connection() as connection:
            await connection.execute(_SQL["retire_rollups"])
        await self._remove_projections()
        return False

    async def _remove_projections(self) -> None:
        now_s = self._clock()
        async with self._connection() as connection:
            dropped = await dropped_projections(connection)
        self._dropped = {number: self._dropped.get(number, now_s) for number in dropped}
        for number, since_s in self._dropped.items():
            if now_s - since_s > LONGEST_READ_S:
                # Each by itself: an operator's view over one table must not keep those of all the others.
                async with (
                    self._reported("a dropped projection is not removed", projection=number),
                    self._connection() as connection,
                ):
                    await remove_projection(connection, number)

    @asynccontextmanager
    async def _reported(self, what: str, **about: object) -> AsyncIterator[None]:
        """Something that may fail by itself: it is counted and logged. Raises StorageUnavailable, LeaseLost."""
        try:
            yield
        except (StorageUnavailable, follow.LeaseLost):
            raise
        except StorageError as error:
            self._metrics.count("atlasco_rollup_failures", source=_source(error))
            log.error(what, extra={**about, "error": f"{type(error).__name__}: {error}"})

    async def _apply(self, connection: Connection, stale: Dirty, declarations: Declarations) -> None:
        works: dict[Part, list[Callable[[], Awaitable[None]]]] = {}
        if stale.minutes:
            floors = await _floors(connection, sorted({tenant for tenant, _ in stale.minutes}))
            for (tenant, value_type), minutes in stale.minutes.items():
                work = partial(self._compute, connection, tenant, value_type, minutes, floors[tenant])
                works.setdefault(Part(Kind.ROLLUPS, tenant), []).append(work)
        for table in declarations.projections:
            if table.projection_id in stale.devices:
                devices = stale.devices[table.projection_id].tolist()
                work = partial(self._refresh, connection, table, devices)
                works[Part(Kind.PROJECTION, table.projection_id)] = [work]
        await self._isolation.attempt_all(connection, works)

    async def _compute(
        self, connection: Connection, tenant: int, value_type: ValueType, minutes: Keys, floor_us: int
    ) -> None:
        count = await compute(connection, tenant, value_type, minutes, floor_us)
        self._metrics.count("atlasco_rollup_minutes_computed", count)

    async def _refresh(self, connection: Connection, table: ProjectionTable, devices: list[int]) -> None:
        await refresh(connection, table, devices)
        self._metrics.count("atlasco_rollup_rows_refreshed", len(devices))

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        with translated():
            async with self._pool.connection() as connection:
                yield connection

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[Connection]:
        async with self._connection() as connection, connection.transaction():
            await follow.hold(connection, self._epoch)
            yield connection


async def declared(connection: Connection) -> Declarations:
    """What is to be kept, at this moment."""
    rolled: dict[int, set[int]] = {}
    for tenant, attribute, _ in await (await connection.execute(_SQL["declared_rollups"])).fetchall():
        rolled.setdefault(tenant, set()).add(attribute)
    rows = await (await connection.execute(_SQL["declared_projections"])).fetchall()
    return Declarations(
        {tenant: frozenset(attributes) for tenant, attributes in rolled.items()},
        [
            ProjectionTable(number, tenant, kind, dict(zip(ids, map(ValueType, types), strict=True)))
            for number, tenant, kind, ids, types in rows
        ],
    )


async def _floors(connection: Connection, tenants: list[int]) -> dict[int, int]:
    rows = await (await connection.execute(_SQL["floors"], {"tenants": tenants})).fetchall()
    return {tenant: microseconds(floor) for tenant, floor in rows}


def report(metrics: Metrics, error: Exception) -> None:
    """Count and log what keeps the worker from going on with something; it is tried again."""
    source = _source(error)
    metrics.count("atlasco_rollup_failures", source=source)
    log.log(
        logging.WARNING if getattr(error, "retriable", False) else logging.ERROR,
        "the worker cannot go on yet",
        extra={"source": source, "error": f"{type(error).__name__}: {error}"},
    )


def _source(error: Exception) -> Literal["lease", "database", "data"]:
    if isinstance(error, follow.LeaseLost):
        return "lease"
    return "database" if getattr(error, "retriable", False) else "data"


@dataclass(frozen=True, slots=True)
class _Measured:
    """The state of the work, for the gauges. Seconds and counts."""

    lag_s: float = 0.0
    backfills: int = 0
    failed: int = 0
    deletions: int = 0
    deletions_failing: int = 0
    oldest_deletion_s: float = 0.0


class RollupProcess:
    """Everything that runs in a process of `atlasco rollup`. `run` is its life."""

    def __init__(self, config: RollupConfig, metrics: Metrics) -> None:
        self._config = config
        self._metrics = metrics
        self._label = f"{socket.gethostname()}:{os.getpid()}"
        self._lease: Lease | None = None
        self._renewed = False
        self._measured = _Measured()

    async def database_ready(self) -> str | None:
        """For /readyz: why the lease could not be renewed; None when it could. Standing by is ready."""
        return None if self._renewed else "the database does not renew the lease"

    async def run(self, stopping: Shutdown) -> None:
        """Work, or stand by, until `stopping` is asked for; the transaction under way is finished first.

        Raises:
            DependencyUnreachable: the database cannot be reached at the start. Later it is waited for.
            StorageError: the database has not the schema, or not the privileges.
        """
        pool = rollup_pool(self._config.dsn)
        await pool.open()
        try:
            await self._prepare(pool)
            leases = Leases(pool, SCOPE, 1, self._config.lease_s, self._label)
            await leases.open()
            self._add_gauges()
            async with asyncio.TaskGroup() as tasks:
                keeping = tasks.create_task(self._keep_lease(leases, stopping))
                tasks.create_task(self._measure(pool, stopping))
                await self._work(pool, leases, stopping)
                await keeping
        finally:
            await pool.close()

    async def _prepare(self, pool: Pool) -> None:
        try:
            with translated():
                await pool.wait(_START_TIMEOUT_S)
        except StorageUnavailable as error:
            raise DependencyUnreachable(f"the database cannot be reached: {error}") from error

    async def _keep_lease(self, leases: Leases, stopping: Shutdown) -> None:
        interval = self._config.lease_s / 3
        while not stopping.requested:
            try:
                async with asyncio.timeout(interval):
                    standing = await leases.renew()
                self._renewed = True
                self._lease = standing.held.get(0)
            except (StorageError, TimeoutError) as error:
                self._renewed = False
                self._metrics.count("atlasco_rollup_failures", source="database")
                log.warning("lease not renewed", extra={"error": f"{type(error).__name__}: {error}"})
            await _wait(stopping, interval)
        self._lease = None
        try:
            async with asyncio.timeout(interval):
                await leases.leave()
        except (StorageError, TimeoutError) as error:
            log.warning("the lease runs out by itself", extra={"error": f"{type(error).__name__}: {error}"})

    async def _work(self, pool: Pool, leases: Leases, stopping: Shutdown) -> None:
        worker: Worker | None = None
        adopted: Lease | None = None
        failures = 0
        while not stopping.requested:
            lease = self._lease
            if lease is None or not leases.holds(lease):
                adopted = None
                await _wait(stopping, min(self._config.poll_s, self._config.lease_s / 6))
                continue
            try:
                if worker is None or adopted != lease:
                    worker = Worker(pool, lease.epoch, self._config, self._metrics)
                    await worker.adopt()
                    adopted = lease
                more = await worker.turn()
                failures = 0
                pause = 0.0 if more else self._config.poll_s
            except StorageError as error:
                failures += 1
                pause = min(_LONGEST_PAUSE_S, _SHORTEST_PAUSE_S * 2.0 ** min(failures - 1, 20))
                report(self._metrics, error)
                adopted = None if isinstance(error, follow.LeaseLost) else adopted
            await _wait(stopping, pause)

    def _add_gauges(self) -> None:
        self._metrics.gauge("atlasco_rollup_active", lambda: float(self._lease is not None))
        self._metrics.gauge("atlasco_rollup_lag_seconds", lambda: self._measured.lag_s)
        self._metrics.gauge("atlasco_rollup_backfills_pending", lambda: float(self._measured.backfills))
        self._metrics.gauge("atlasco_rollup_failed", lambda: float(self._measured.failed))
        self._metrics.gauge("atlasco_deletions_open", lambda: float(self._measured.deletions))
        self._metrics.gauge("atlasco_deletions_failing", lambda: float(self._measured.deletions_failing))
        self._metrics.gauge("atlasco_deletion_oldest_seconds", lambda: self._measured.oldest_deletion_s)

    async def _measure(self, pool: Pool, stopping: Shutdown) -> None:
        while not stopping.requested:
            try:
                with translated():
                    async with pool.connection() as connection:
                        row = await (await connection.execute(_SQL["measure"])).fetchone()
                if row is not None:
                    self._measured = _Measured(max(row[0] or 0.0, 0.0), *row[1:])
            except StorageError as error:
                log.warning("not measured", extra={"error": f"{type(error).__name__}: {error}"})
            await _wait(stopping, self._config.measure_interval_s)


async def _wait(stopping: Shutdown, seconds: float) -> None:
    """Wait for the end to be asked for, `seconds` at most."""
    if seconds <= 0:
        await asyncio.sleep(0)
        return
    try:
        async with asyncio.timeout(seconds):
            await stopping.wait()
    except TimeoutError:
        pass
