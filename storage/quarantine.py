"""Releasing readings from quarantine: what was set aside becomes history, by the rules of any write.

A released reading is a write that happens now. Where history holds another value for its key, that value is corrected
and takes the next revision, whichever of the two was received first: history does not record when a value came, and
"the newest write wins" has no exceptions that a consumer would have to know. Of two quarantined values for one key
the one that was set aside last wins. The latest value does not move, save where it holds the very reading that is
corrected.

A reading that cannot be released stays where it is, and the others are released all the same:

    - outside the tenant's clock window as it stands now (an operator widens it first);
    - in a time range that has been retired, or that the customer partition has no room for;
    - of a device or an attribute that was deleted since;
    - refused by the database.

Readings are released in batches, each in one transaction with the change record and the deletion from quarantine: a
release that is interrupted is simply started again, and any number of them may run at once.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

import numpy as np

from storage.administration import NotFound, no_tenant
from storage.binary import Int8Array
from storage.commit import Writer
from storage.database import Connection, Pool, PoolSettings, Role, make_pool
from storage.errors import DataRefused, NoPartition, StorageError, TransactionConflict, translated
from storage.model import Attribute, BatchMessage, Columns, Names, Outcome, ValueType, WriteBatch, lane_of
from storage.outbox import ensure_outbox
from storage.partitions import HistoryCoverage, HistoryLimitReached, OutsideClockWindow
from storage.statements import statements
from storage.times import DAY_US

_ROWS_PER_BATCH = 2_000
# Tries of a batch that lost a race with other writers or with maintenance.
_TRIES = 5

_SQL = statements("quarantine.sql")
_DTYPES: Mapping[ValueType, Any] = {
    ValueType.DOUBLE: np.float64,
    ValueType.BIGINT: np.int64,
    ValueType.BOOLEAN: np.bool_,
    ValueType.TEXT: object,
}


class NotReleased(StorageError):
    """Readings stayed in quarantine; the others were released."""


class Kept(StrEnum):
    """Why a reading stays in quarantine."""

    TOO_OLD = "older than the clock window"
    TOO_NEW = "ahead of the clock window"
    RETIRED = "in a time range that has been retired"
    NO_ROOM = "in a time range that the customer partition has no room for"
    DELETED = "of a device or an attribute that was deleted"
    REFUSED = "refused by the database"


@dataclass(frozen=True, slots=True)
class Selection:
    """Which quarantined readings to release; None does not limit."""

    received_before: datetime | None = None
    device: str | None = None
    attribute: str | None = None
    # At most so many are released, those that were set aside first.
    limit: int | None = None


@dataclass(slots=True)
class Released:
    """What a release did."""

    # Taken out of quarantine: `changed` of them changed history (`corrections` by replacing another value), the
    # others said what history says already.
    released: int = 0
    changed: int = 0
    corrections: int = 0
    # Still in quarantine, by why.
    kept: Counter[Kept] = field(default_factory=Counter)
    # How far back the window would have to reach to release those that are TOO_OLD, in seconds; 0 when none is.
    window_needed_s: float = 0.0

    def check(self, tenant: str) -> None:
        """Say why readings stayed, and what an operator can do.

        Raises:
            NotReleased: some did.
        """
        lines = [f"{count:,} readings stay in quarantine: {why}" for why, count in self.kept.items() if count]
        if self.window_needed_s:
            days = math.ceil(self.window_needed_s / 86400)
            lines.append(
                f"the window reaches all of them after `atlasco tenant set {tenant} --window-past {days}d`"
                " (with a --retention at least as long)"
            )
        if lines:
            raise NotReleased("\n".join(lines))


@dataclass(frozen=True, slots=True)
class _Row:
    quarantine_id: int
    entity_id: int
    device: str | None
    attribute_id: int
    attribute: Attribute | None
    time_us: int
    value: Any
    # -1 and 1: before and after the clock window.
    outside: int


async def release_quarantined(
    dsn: str,
    tenant: str,
    selection: Selection | None = None,
    *,
    rows_per_batch: int = _ROWS_PER_BATCH,
    progress: Callable[[Released], None] = lambda _: None,
) -> Released:
    """Release a tenant's quarantined readings, as the owner of the schema. `progress` is told after each batch.

    What is set aside while this runs stays.

    Raises:
        NotFound: no such tenant, device or attribute.
        StorageError: the database cannot be reached, or refuses; what was released so far stays released.
    """
    async with make_pool(PoolSettings(dsn, Role.MAINTAIN, "release")) as pool:
        return await _Release(pool, tenant, selection or Selection(), rows_per_batch, progress).run()


class _Release:
    def __init__(
        self,
        pool: Pool,
        tenant: str,
        selection: Selection,
        rows_per_batch: int,
        progress: Callable[[Released], None],
    ) -> None:
        self._pool = pool
        self._tenant = tenant
        self._selection = selection
        self._rows_per_batch = rows_per_batch
        self._progress = progress
        self._coverage = HistoryCoverage(pool)
        self._result = Released()

    async def run(self) -> Released:
        found = await self._rows("tenant", name=self._tenant)
        if not found:
            raise no_tenant(self._tenant)
        self._tenant_id, self._started = found[0]
        [(self._buckets, self._lanes)] = await self._rows("fixed_settings")
        asked = await self._asked()
        writer = Writer(self._pool, buckets=self._buckets)
        await ensure_outbox(self._pool)
        after = 0
        while limit := self._most_rows():
            rows = [_row(row) for row in await self._rows("candidates", **asked, after=after, limit=limit)]
            if not rows:
                break
            after = rows[-1].quarantine_id
            await self._release(writer, rows)
            self._progress(self._result)
        return self._result

    def _most_rows(self) -> int:
        if self._selection.limit is None:
            return self._rows_per_batch
        return min(self._rows_per_batch, self._selection.limit - self._result.released)

    async def _asked(self) -> dict[str, object]:
        wanted = {"device": self._selection.device, "attribute": self._selection.attribute}
        [ids] = await self._rows("named", tenant=self._tenant_id, **wanted)
        for (what, name), known in zip(wanted.items(), ids, strict=True):
            if name is not None and known is None:
                raise NotFound(
                    f"tenant {self._tenant!r} has no {what} {name!r}; `atlasco tenant {what} list` shows them"
                )
        # What is set aside from now on waits for the next release.
        before = self._selection.received_before or self._started
        return {"tenant": self._tenant_id, "before": before, "entity": ids[0], "attribute": ids[1]}

    async def _release(self, writer: Writer, rows: Sequence[_Row]) -> None:
        """Release what can be of one batch, and count what cannot."""
        rows = self._in_order(rows)
        for attempt in range(_TRIES):
            rows = await self._placed(rows)
            if not rows:
                return
            batch = self._batch(rows)
            try:
                written = await writer.write(batch, fence=self._take)
            except NoPartition:
                # The range was retired since it was looked up, or the hour of the outbox has changed.
                await self._coverage.refresh(self._tenant_id)
                await ensure_outbox(self._pool)
                if attempt == _TRIES - 1:
                    raise
            except DataRefused:
                refused = await self._refused(writer, batch)
                if not refused or attempt == _TRIES - 1:
                    raise
                self._result.kept[Kept.REFUSED] += len(refused)
                rows = [row for row in rows if row.quarantine_id not in refused]
            except TransactionConflict:
                if attempt == _TRIES - 1:
                    raise
            else:
                self._result.released += written.outcomes.count(Outcome.COMMITTED)
                self._result.changed += written.changes
                self._result.corrections += written.corrections
                return

    def _in_order(self, rows: Sequence[_Row]) -> list[_Row]:
        """Those that are inside the window and whose names are known."""
        good = []
        for row in rows:
            if row.outside:
                self._result.kept[Kept.TOO_OLD if row.outside < 0 else Kept.TOO_NEW] += 1
                if row.outside < 0:
                    # An hour more: the window moves on while an operator types.
                    age_s = self._started.timestamp() - row.time_us / 1e6 + 3600
                    self._result.window_needed_s = max(self._result.window_needed_s, age_s)
            elif row.device is None or row.attribute is None or row.value is None:
                self._result.kept[Kept.DELETED] += 1
            else:
                good.append(row)
        return good

    async def _placed(self, rows: Sequence[_Row]) -> list[_Row]:
        """Make the partitions that the readings need; those that live ranges take."""
        times = np.array([row.time_us for row in rows], np.int64)
        days = times // DAY_US
        missing = Kept.NO_ROOM
        try:
            await self._coverage.ensure(self._tenant_id, days)
        except HistoryLimitReached:
            pass
        except OutsideClockWindow:
            # Narrowed a moment ago.
            missing = Kept.TOO_OLD
        covered = self._coverage.covered(self._tenant_id, days)
        retired = self._coverage.retired(self._tenant_id, times)
        self._result.kept[missing] += int(np.count_nonzero(~covered))
        self._result.kept[Kept.RETIRED] += int(np.count_nonzero(retired))
        return [row for row, good in zip(rows, (covered & ~retired).tolist(), strict=True) if good]

    def _batch(self, rows: Sequence[_Row]) -> WriteBatch:
        """A message for each reading: its sequence is the id in quarantine, by which `_take` knows it."""
        attributes = {row.attribute_id: row.attribute for row in rows if row.attribute is not None}
        sources: dict[ValueType, list[int]] = {}
        for position, row in enumerate(rows):
            sources.setdefault(attributes[row.attribute_id].type, []).append(position)
        return WriteBatch(
            lane=lane_of(rows[0].entity_id, self._buckets, self._lanes),
            messages=[BatchMessage(self._tenant_id, row.entity_id, None, None, row.quarantine_id) for row in rows],
            readings={
                value_type: self._columns(value_type, rows, positions) for value_type, positions in sources.items()
            },
            quarantined={},
            names=Names(
                tenants={self._tenant_id: self._tenant},
                entities={row.entity_id: row.device or "" for row in rows},
                attributes=attributes,
            ),
        )

    def _columns(self, value_type: ValueType, rows: Sequence[_Row], positions: Sequence[int]) -> Columns:
        chosen = [rows[position] for position in positions]
        values = np.empty(len(chosen), _DTYPES[value_type])
        values[:] = [row.value for row in chosen]
        return Columns(
            tenant=np.full(len(chosen), self._tenant_id, np.int32),
            entity=np.array([row.entity_id for row in chosen], np.int64),
            attribute=np.array([row.attribute_id for row in chosen], np.int32),
            time_us=np.array([row.time_us for row in chosen], np.int64),
            value=values,
            source=np.array(positions, np.int32),
            index=np.zeros(len(chosen), np.int32),
            historical=np.ones(len(chosen), bool),
        )

    async def _take(self, connection: Connection, messages: Sequence[BatchMessage]) -> list[Outcome]:
        """The fence of a release: deletes the readings from quarantine; one that is gone, another has released."""
        ids = Int8Array([message.sequence for message in messages])
        cursor = await connection.execute(_SQL["take"], {"tenant": self._tenant_id, "ids": ids})
        taken = {row[0] for row in await cursor.fetchall()}
        return [Outcome.COMMITTED if message.sequence in taken else Outcome.REPEATED for message in messages]

    async def _refused(self, writer: Writer, batch: WriteBatch) -> set[int]:
        found = await writer.find_refused(batch)
        return {
            batch.messages[int(batch.readings[value_type].source[position])].sequence
            for value_type, refused in found.items()
            for position, _ in refused
        }

    async def _rows(self, statement: str, **parameters: object) -> list[tuple[Any, ...]]:
        with translated():
            async with self._pool.connection() as connection:
                return await (await connection.execute(_SQL[statement], parameters)).fetchall()


def _row(row: tuple[Any, ...]) -> _Row:
    quarantine_id, entity_id, device, attribute_id, name, type_name, keeps_latest, time_us, *values, outside = row
    attribute = value = None
    if type_name is not None:
        attribute = Attribute(attribute_id, name, ValueType(type_name), keeps_latest)
        value = dict(zip(_VALUE_ORDER, values, strict=True))[attribute.type]
    return _Row(quarantine_id, entity_id, device, attribute_id, attribute, time_us, value, outside)


_VALUE_ORDER = (ValueType.DOUBLE, ValueType.BIGINT, ValueType.BOOLEAN, ValueType.TEXT)
