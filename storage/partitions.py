"""Which ranges of history exist, and how a writer gets the ones it needs.

The layout, customer first and then time, is made in one place: `ensure_history()` in `sql/schema.sql`, which the
gateway (through `HistoryCoverage`) and maintenance both call. Its two levels are `tenant_slot()` (which customers
share a partition) and the days or months within it; the catalog of ranges is `history_partitions`. Where only one
level is possible, as on a cluster distributed by tenant id, the tables are partitioned by time alone: there
`tenant_slot()` gives one range for everybody and `ensure_history()` attaches the leaves to the root; nothing outside
these two functions, and no statement that reads or writes, knows the difference.

Days are counted from 1970-01-01 in UTC. Every range begins and ends at midnight UTC.
"""

import asyncio
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
import psycopg
from numpy.typing import NDArray

from storage.database import Connection, Pool
from storage.errors import DataRefused, StorageError, translated
from storage.statements import statements
from storage.times import DAY_US, EPOCH

# A statement makes at most so many days at once: each range takes some ten locks until the transaction ends, and the
# server's lock table is shared by everybody.
_DAYS_PER_CALL = 31


class HistoryLimitReached(StorageError):
    """The tenant's customer partition has as many time ranges as it may; what has a range is still written.

    `HistoryCoverage.covered` says which days have one. An operator shortens a retention or a clock window.
    """


class OutsideClockWindow(DataRefused):
    """Days were asked for that lie outside the tenant's clock window as the database's clock has it."""


def tenant_slot(tenant_id: int) -> tuple[int, int]:
    """The ids [from, to) that share a customer partition with a tenant; the same as tenant_slot() in SQL."""
    if tenant_id >= 1 << 30:
        return tenant_id, tenant_id + 1
    slot = tenant_id >> 20
    return slot << 20, (slot + 1) << 20


def days_of(time_us: NDArray[np.int64]) -> NDArray[np.int64]:
    """The distinct days, ascending, that timestamps (microseconds since 1970, any sign) fall on."""
    return np.unique(time_us // DAY_US)


def contiguous_runs(days: NDArray[np.int64], longest: int = _DAYS_PER_CALL) -> list[tuple[int, int]]:
    """Distinct ascending days as runs [from, to) without a gap, none longer than `longest` days."""
    if days.size == 0:
        return []
    breaks = np.flatnonzero(np.diff(days) != 1) + 1
    runs = []
    for part in np.split(days, breaks):
        first, end = int(part[0]), int(part[-1]) + 1
        runs += [(at, min(at + longest, end)) for at in range(first, end, longest)]
    return runs


@dataclass(frozen=True, slots=True)
class _Ranges:
    """The ranges of one customer partition, ascending and without overlap, as days."""

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    retired: NDArray[np.bool_]
    # The unbroken stretch of live ranges that ends last, [from, to): where nearly every reading lies.
    live_from: int
    live_to: int

    def covers(self, days: NDArray[np.int64]) -> NDArray[np.bool_]:
        return self._find(days)[1]

    def is_retired(self, days: NDArray[np.int64]) -> NDArray[np.bool_]:
        place, inside = self._find(days)
        return inside & self.retired[place] if self.retired.size else inside

    def _find(self, days: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The place of the last range that begins at or before each day, and whether the day is inside it."""
        place = np.searchsorted(self.starts, days, side="right") - 1
        if self.starts.size == 0:
            return place, np.zeros(days.shape, np.bool_)
        return place, (place >= 0) & (days < self.ends[place])


class HistoryCoverage:
    """What a writer knows of the ranges of history: a cache over `history_partitions`, filled as needed.

    Ranges are made by any process and retired by maintenance, so what the cache says can be out of date in one way
    only: a range it calls live may be retired by now. The write then ends in `NoPartition`; the writer calls
    `refresh`, looks at `retired` again and rejects what it marks.

    Used by one event loop. Takes a connection of the pool only to look or to make something, never on the usual path.
    """

    def __init__(self, pool: Pool, *, lock_timeout_s: float = 5.0) -> None:
        """`lock_timeout_s`: how long making a range may wait behind maintenance that detaches an old one."""
        self._pool = pool
        self._lock_timeout_ms = max(1, round(lock_timeout_s * 1000))
        self._slots: dict[int, _Ranges] = {}
        self._statements = statements("maintenance.sql")
        # One maker per slot in this process: without it every lane would queue on the database's lock with a
        # connection in hand. (A Lock binds to its loop at first use, so it may be made here.)
        self._making: dict[int, asyncio.Lock] = {}

    async def ensure(self, tenant_id: int, days: NDArray[np.int64]) -> None:
        """Make sure that every one of `days` (distinct or not, any order) has a range: live or retired.

        Returns at once when the cache knows them all. Returning does not promise that they are live: ask `retired`.
        On an error what could be made was made: `covered` tells.

        Raises:
            HistoryLimitReached: some days have no range and get none.
            OutsideClockWindow: some days lie outside the clock window.
            TransactionConflict: making a range waited too long for a lock; try again.
            StorageError: the database cannot be reached, or has no such tenant.
        """
        if days.size == 0:
            return
        slot = tenant_slot(tenant_id)[0]
        known = self._slots.get(slot)
        if known is not None and known.live_from <= days.min() and days.max() < known.live_to:
            return
        if known is not None and known.covers(days).all():
            return
        async with self._making.setdefault(slot, asyncio.Lock()):
            with translated():
                async with self._pool.connection() as connection:
                    await self._make(connection, tenant_id, slot, np.unique(days))

    def covered(self, tenant_id: int, days: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of `days` have a range, live or retired, as far as the cache knows."""
        return self._slots.get(tenant_slot(tenant_id)[0], _NO_RANGES).covers(days)

    def retired(self, tenant_id: int, time_us: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which timestamps (microseconds since 1970) lie in a retired range: they are too old for ever."""
        ranges = self._slots.get(tenant_slot(tenant_id)[0])
        if ranges is None or not ranges.retired.any():
            return np.zeros(time_us.shape, np.bool_)
        return ranges.is_retired(time_us // DAY_US)

    async def refresh(self, tenant_id: int) -> None:
        """Read the ranges of a tenant's customer partition again.

        Raises:
            StorageError: the database cannot be reached.
        """
        with translated():
            async with self._pool.connection() as connection:
                await self._read(connection, tenant_slot(tenant_id)[0])

    async def _make(self, connection: Connection, tenant_id: int, slot: int, days: NDArray[np.int64]) -> None:
        # Another process, or a caller before us, may have made them.
        ranges = await self._read(connection, slot)
        failure: StorageError | None = None
        # Contiguous days only: between two far-apart readings there may be years.
        for first, end in contiguous_runs(days[~ranges.covers(days)]):
            try:
                async with connection.transaction():
                    await connection.execute(self._statements["set_lock_timeout"], [str(self._lock_timeout_ms)])
                    await connection.execute(
                        self._statements["ensure_history"], [tenant_id, _midnight(first), _midnight(end)]
                    )
            # The other runs are none the worse for an error of one: a bad reading must not cost a good one.
            except psycopg.errors.ProgramLimitExceeded as error:
                failure = HistoryLimitReached(error.diag.message_primary or str(error), error.sqlstate)
            except psycopg.errors.InvalidParameterValue as error:
                failure = failure or OutsideClockWindow(error.diag.message_primary or str(error), error.sqlstate)
            except OverflowError:
                failure = failure or OutsideClockWindow(f"day {first} since 1970 has no date")
        await self._read(connection, slot)
        if failure is not None:
            raise failure

    async def _read(self, connection: Connection, slot: int) -> _Ranges:
        cursor = await connection.execute(self._statements["ranges_of_slot"], [slot])
        ranges = self._slots[slot] = _ranges(await cursor.fetchall())
        # Ends the transaction that the read began; the connection may be kept for a while.
        await connection.commit()
        return ranges


def _ranges(rows: list[tuple[int, int, bool]]) -> _Ranges:
    starts, ends = (np.array([row[column] for row in rows], np.int64) for column in (0, 1))
    retired = np.array([row[2] for row in rows], np.bool_)
    live_from = live_to = 0
    for start, end, gone in reversed(rows):
        if gone:
            if live_to:
                break
        elif not live_to:
            live_from, live_to = start, end
        elif end == live_from:
            live_from = start
        else:
            break
    return _Ranges(starts, ends, retired, live_from, live_to)


_NO_RANGES = _ranges([])


def _midnight(day: int) -> datetime:
    return EPOCH + timedelta(days=day)
