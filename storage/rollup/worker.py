"""What the worker does under its lease: rounds over the outbox, back-fills, deletions, housekeeping."""

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, Literal

from runtime.metrics import Metrics
from storage.database import Connection, Pool
from storage.deletion import DueDeletion, delete_step, due_deletion, forget_deletions, note_problem
from storage.errors import StorageError, StorageUnavailable, TransactionConflict, translated
from storage.model import ValueType
from storage.relay.cursor import Recovery
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
from storage.rollup.isolation import Isolation, Kind, Part
from storage.rollup.projection import refresh
from storage.rollup.rests import Rests
from storage.statements import statements
from storage.times import microseconds

log = logging.getLogger(__name__)

_SQL = statements("rollup.sql")

# Also how soon the name of a dropped projection is free.
_HOUSEKEEPING_S: Final = 60.0

SHORTEST_PAUSE_S: Final = 0.2
"""The pause after a failure."""

LONGEST_PAUSE_S: Final = 10.0
"""The pause after many failures in a row."""

LONGEST_READ_S: Final = 60.0
"""How long the table of a dropped projection is kept for reads that had begun before; more than a gateway gives a read,
which is `QueryLimits.longest_s`."""


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
        self._failing = Rests(clock, SHORTEST_PAUSE_S, LONGEST_PAUSE_S)
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
        steps = {"round": self.round, "fill": self.fill, "delete": self.delete}
        if self._clock() - self._housekept_s >= _HOUSEKEEPING_S:
            steps["housekeeping"] = self.housekeeping
        more = False
        for name, step in steps.items():
            if not self._failing.is_due(name):
                continue
            try:
                more = await step() or more
            except (StorageUnavailable, follow.LeaseLost):
                raise
            except StorageError as error:
                self._failing.failed(name)
                report(self._metrics, error)
            else:
                self._failing.succeeded(name)
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
            if found.batches:
                declarations = await declared(connection)
                await self._apply(connection, dirty(found.batches, declarations), declarations)
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
        """A step of the deletion that is due first; one that fails says so, and the others go before it."""
        due: DueDeletion | None = None
        try:
            async with self._transaction() as connection:
                due = await due_deletion(connection, self._settle_s)
                if due is None:
                    return False
                readings = await delete_step(connection, due)
        except (StorageUnavailable, TransactionConflict, follow.LeaseLost):
            raise
        except StorageError as error:
            if due is None:
                raise
            # One device's trouble must not stop the rollups of all.
            self._metrics.count("atlasco_rollup_failures", source="data")
            about = {"operation": str(due.operation_id), "tenant": due.tenant, "step": due.step}
            log.error("a deletion cannot go on yet", extra={**about, "error": f"{type(error).__name__}: {error}"})
            async with self._transaction() as connection:
                await note_problem(connection, due.operation_id, str(error))
            return False
        self._metrics.count("atlasco_deletion_readings", readings)
        return True

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
