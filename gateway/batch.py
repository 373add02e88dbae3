"""From received messages to a committed transaction: what lanes and unary writes share."""

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np

from gateway.aliases import brief
from gateway.decode import Received, count_by_type, decode
from runtime.metrics import Metrics
from storage.commit import UnaryRequest, Writer
from storage.database import Pool
from storage.errors import DataRefused, NoPartition
from storage.model import BatchMessage, Bools, Columns, Names, Outcome, Reason, RejectedReading, WriteBatch, Written
from storage.outbox import ensure_outbox
from storage.partitions import HistoryCoverage, HistoryLimitReached, OutsideClockWindow, days_of
from storage.registry import Registry

log = logging.getLogger(__name__)


def wall_clock_us() -> int:
    """The server's clock, microseconds since 1970."""
    return time.time_ns() // 1_000


class Committer:
    """Turns messages into batches and batches into commits, whatever is wrong with some of the readings."""

    def __init__(
        self,
        registry: Registry,
        coverage: HistoryCoverage,
        pool: Pool,
        metrics: Metrics,
        *,
        max_string_bytes: int,
        now_us: Callable[[], int] = wall_clock_us,
    ) -> None:
        self._registry = registry
        self._coverage = coverage
        self._pool = pool
        self._metrics = metrics
        self._max_string_bytes = max_string_bytes
        self._now_us = now_us

    def assemble(self, received: Sequence[Received], lane: int) -> WriteBatch:
        """Decode and check the messages; the bad readings are in the batch's rejections already."""
        decoded = decode(received, now_us=self._now_us(), max_string_bytes=self._max_string_bytes)
        for value_type, count in count_by_type(received).items():
            self._metrics.count("atlasco_readings_received", count, type=value_type)
        return WriteBatch(
            lane=lane,
            messages=[
                BatchMessage(m.tenant.tenant_id, m.entity_id, m.session_id, m.epoch, m.sequence, rejections)
                for m, rejections in zip(received, decoded.rejections, strict=True)
            ],
            readings=decoded.readings,
            quarantined=decoded.quarantined,
            names=Names(
                tenants={m.tenant.tenant_id: m.tenant.name for m in received},
                entities={m.entity_id: m.entity_name for m in received},
                attributes=self._registry.attributes_by_id,
            ),
        )

    async def commit(self, writer: Writer, batch: WriteBatch, request: UnaryRequest | None = None) -> Written:
        """Write the batch: readings that the database refuses are rejected, the others commit.

        Raises:
            StorageError: nothing is wrong with the data as far as is known; `retriable` says whether to call
                again with the same batch, which is safe.
        """
        await self._place(batch)
        try:
            written = await writer.write(batch, request)
        except NoPartition:
            # The range was dropped or retired since the cache was filled: look again, and judge again.
            for tenant_id in batch.names.tenants:
                await self._coverage.refresh(tenant_id)
            await self._place(batch)
            await ensure_outbox(self._pool)
            written = await self._write_rest(writer, batch, request)
        except DataRefused:
            written = await self._write_rest(writer, batch, request)
        self._count(batch, written)
        return written

    async def _write_rest(self, writer: Writer, batch: WriteBatch, request: UnaryRequest | None) -> Written:
        refused = await writer.find_refused(batch)
        for value_type, found in refused.items():
            columns = batch.readings[value_type]
            for position, text in found:
                log.warning(
                    "the database refused a reading",
                    extra={"entity_id": int(columns.entity[position]), "problem": text},
                )
                batch.messages[int(columns.source[position])].rejections.append(
                    RejectedReading(int(columns.index[position]), Reason.STORAGE_REFUSED, brief(text))
                )
            bad = np.zeros(len(columns), bool)
            bad[[position for position, _ in found]] = True
            batch.readings[value_type] = columns.take(~bad)
        return await writer.write(batch, request)

    async def _place(self, batch: WriteBatch) -> None:
        """Make the partitions that the batch needs; reject what lies in a retired range or has no room.

        A row without a partition would fail the COPY of the whole batch.
        """
        for tenant_id in batch.names.tenants:
            parts = [
                columns if len(batch.names.tenants) == 1 else columns.take(columns.tenant == tenant_id)
                for columns in batch.readings.values()
            ]
            days = np.unique(np.concatenate([days_of(part.time_us) for part in parts] or [np.empty(0, np.int64)]))
            why, homeless_text = Reason.STORAGE_REFUSED, ""
            try:
                await self._coverage.ensure(tenant_id, days)
            except HistoryLimitReached as error:
                homeless_text = str(error)
            except OutsideClockWindow:
                # The tenant's window was narrowed after the message had been judged by the wider one. Without a word
                # here the lane would try the same batch for ever.
                why, homeless_text = Reason.TIMESTAMP_TOO_OLD, "it lies outside the tenant's clock window"
            for value_type, columns in list(batch.readings.items()):
                ours = columns.tenant == tenant_id
                retired = ours & self._coverage.retired(tenant_id, columns.time_us)
                text = "its time range has been retired"
                bad = self._reject(batch, columns, retired, Reason.TIMESTAMP_TOO_OLD, text)
                if homeless_text:
                    day = columns.time_us // 86_400_000_000
                    homeless = ours & ~retired & ~self._coverage.covered(tenant_id, day)
                    # Not in place: `bad` and `retired` may be one array.
                    bad = bad | self._reject(batch, columns, homeless, why, brief(homeless_text))
                if bad.any():
                    batch.readings[value_type] = columns.take(~bad)

    @staticmethod
    def _reject(batch: WriteBatch, columns: Columns, bad: Bools, why: Reason, text: str) -> Bools:
        for position in np.flatnonzero(bad).tolist():
            batch.messages[int(columns.source[position])].rejections.append(
                RejectedReading(int(columns.index[position]), why, text)
            )
        return bad

    def _count(self, batch: WriteBatch, written: Written) -> None:
        # What a stale stream sent was not written; what is REPEATED was, by a try that did not live to count it.
        live = np.array([outcome is not Outcome.STALE for outcome in written.outcomes], bool)
        for value_type, columns in batch.readings.items():
            count = len(columns) if live.all() else int(np.count_nonzero(live[columns.source]))
            self._metrics.count("atlasco_readings_committed", count, type=value_type)
            if written.copied:
                self._metrics.count("atlasco_copy_rows", count, type=value_type)
            if written.merged and count:
                self._metrics.count("atlasco_copy_conflicts", type=value_type)
        for value_type, count in written.corrected.items():
            self._metrics.count("atlasco_readings_corrected", count, type=value_type)
        for message, outcome in zip(batch.messages, written.outcomes, strict=True):
            if outcome is not Outcome.STALE:
                for rejection in message.rejections:
                    self._metrics.count("atlasco_readings_rejected", reason=rejection.reason.name)
                    if rejection.quarantined:
                        self._metrics.count("atlasco_readings_quarantined", reason=rejection.reason.name)
