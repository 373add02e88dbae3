"""Lanes: where messages of many devices wait, become one batch, and are written.

A device hashes to one lane, a lane writes one batch at a time: a device's messages commit in order. Lanes run side by
side. A batch is what waits when the lane is free: under load batches grow by themselves, and the age bound only
matters when little arrives.
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from atlasco.telemetry.v1 import ingest_pb2
from opentelemetry.trace import NoOpTracerProvider, Tracer

from gateway.batch import Committer
from gateway.decode import Received
from gateway.room import Bound, Room
from runtime.metrics import Metrics
from storage.commit import Writer
from storage.errors import StorageError
from storage.model import Outcome, RejectedReading, WriteBatch, Written, lane_of
from storage.registry import FixedSettings

log = logging.getLogger(__name__)

_SILENT = NoOpTracerProvider().get_tracer(__name__)

_FIRST_RETRY_S = 0.05
_LONGEST_RETRY_S = 2.0


@dataclass(frozen=True, slots=True)
class FlushLimits:
    """When a lane flushes: at so many readings or bytes, or when the oldest message has waited so long (seconds)."""

    readings: int = 20_000
    bytes: int = 4 * 1024 * 1024
    age_s: float = 0.02


# Told what became of a message: outcome, rejections, the writing transaction.
Settled = Callable[[Outcome, list[RejectedReading], int | None], None]


@dataclass(slots=True)
class _Waiting:
    message: Received
    settled: Settled
    since: float


class _Queue:
    """What waits in one lane. Tenants take turns, so that one tenant's backlog does not hold up another's."""

    def __init__(self) -> None:
        self._tenants: dict[int, deque[_Waiting]] = {}
        self.readings = 0
        self.bytes = 0

    def put(self, waiting: _Waiting) -> None:
        self._tenants.setdefault(waiting.message.tenant.tenant_id, deque()).append(waiting)
        self.readings += waiting.message.count
        self.bytes += waiting.message.size

    @property
    def oldest(self) -> float | None:
        """When the message that has waited longest came; None when nothing waits."""
        return min((waiting[0].since for waiting in self._tenants.values()), default=None)

    def take(self, limits: FlushLimits) -> list[_Waiting]:
        """The next batch: at least one message if any waits, otherwise within the limits."""
        taken: list[_Waiting] = []
        readings = size = 0
        while self._tenants:
            for tenant in list(self._tenants):
                queue = self._tenants[tenant]
                message = queue[0].message
                if taken and (readings + message.count > limits.readings or size + message.size > limits.bytes):
                    self.readings -= readings
                    self.bytes -= size
                    return taken
                taken.append(queue.popleft())
                readings += message.count
                size += message.size
                # Behind the others for the next batch too.
                del self._tenants[tenant]
                if queue:
                    self._tenants[tenant] = queue
        self.readings -= readings
        self.bytes -= size
        return taken


class Lane:
    """One lane: a queue and the task that empties it."""

    def __init__(
        self,
        number: int,
        committer: Committer,
        writer: Writer,
        room: Room,
        limits: FlushLimits,
        metrics: Metrics,
        tracer: Tracer,
    ) -> None:
        self.number = number
        self.queue = _Queue()
        # Why the lane cannot write at present; None when it can.
        self.trouble: str | None = None
        self._committer = committer
        self._writer = writer
        self._room = room
        self._limits = limits
        self._metrics = metrics
        self._tracer = tracer
        self._arrived = asyncio.Event()
        self._closing = False

    def put_nowait(self, message: Received, settled: Settled) -> None:
        """Queue a message for which room has been taken; `settled` is called once it is written or dropped."""
        self.queue.put(_Waiting(message, settled, asyncio.get_running_loop().time()))
        self._arrived.set()

    def close(self) -> None:
        """Flush at once from now on; `run` returns when nothing waits any more."""
        self._closing = True
        self._arrived.set()

    async def run(self) -> None:
        """Write batches until closed and empty."""
        loop = asyncio.get_running_loop()
        while True:
            oldest = self.queue.oldest
            if oldest is None:
                if self._closing:
                    return
                self._arrived.clear()
                await self._arrived.wait()
                continue
            wait_s = oldest + self._limits.age_s - loop.time()
            full = self.queue.readings >= self._limits.readings or self.queue.bytes >= self._limits.bytes
            if wait_s > 0 and not full and not self._closing:
                self._arrived.clear()
                try:
                    async with asyncio.timeout(wait_s):
                        await self._arrived.wait()
                except TimeoutError:
                    pass
                continue
            await self._flush(self.queue.take(self._limits))

    async def _flush(self, taken: list[_Waiting]) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        with self._tracer.start_as_current_span("flush") as span:
            batch = self._committer.assemble([waiting.message for waiting in taken], self.number)
            rows = sum(len(columns) for columns in batch.readings.values())
            self._metrics.observe("atlasco_flush_rows", rows)
            span.set_attributes({"atlasco.lane": self.number, "atlasco.messages": len(taken), "atlasco.readings": rows})
            written = await self._write(batch)
            span.set_attributes({"atlasco.changes": written.changes, "atlasco.merged": written.merged})
        self._metrics.observe("atlasco_flush_duration_seconds", loop.time() - started)
        for waiting, message, outcome in zip(taken, batch.messages, written.outcomes, strict=True):
            self._room.leave(waiting.message.tenant.tenant_id, waiting.message.count)
            waiting.settled(outcome, message.rejections, written.xid)

    async def _write(self, batch: WriteBatch) -> Written:
        """Write a batch, however long that takes: what was received is never dropped.

        Also an error that is not `retriable` is tried again: it is a defect, of the schema or of ours, that somebody
        has to mend; until then the lane stands still, its streams with it, and readiness says why.
        """
        delay_s = _FIRST_RETRY_S
        while True:
            try:
                written = await self._committer.commit(self._writer, batch)
            except StorageError as error:
                self.trouble = f"{type(error).__name__}: {error}"
                log.log(
                    logging.WARNING if error.retriable else logging.ERROR,
                    "a batch could not be written and will be tried again",
                    extra={"lane": self.number, "problem": str(error), "sqlstate": error.sqlstate, "retry_s": delay_s},
                )
                self._metrics.count("atlasco_commit_retries", sqlstate=error.sqlstate or "CONNECTION")
                # Full jitter: lanes and gateways that failed together must not come back together.
                await asyncio.sleep(random.uniform(0, delay_s))
                delay_s = min(2 * delay_s, _LONGEST_RETRY_S)
            else:
                self.trouble = None
                return written


class Lanes:
    """All lanes of a gateway."""

    def __init__(
        self,
        settings: FixedSettings,
        committer: Committer,
        writers: Callable[[], Writer],
        room: Room,
        limits: FlushLimits,
        metrics: Metrics,
        tracer: Tracer = _SILENT,
    ) -> None:
        self._settings = settings
        self.room = room
        self._lanes = [
            Lane(number, committer, writers(), room, limits, metrics, tracer) for number in range(settings.lanes)
        ]
        for lane in self._lanes:
            queue = lane.queue
            metrics.gauge("atlasco_lane_queue_readings", lambda q=queue: q.readings, lane=str(lane.number))  # type: ignore[misc]
            metrics.gauge("atlasco_lane_queue_bytes", lambda q=queue: q.bytes, lane=str(lane.number))  # type: ignore[misc]

    @property
    def trouble(self) -> str | None:
        """Why some lane cannot write at present; None when all can."""
        return next((lane.trouble for lane in self._lanes if lane.trouble is not None), None)

    def put_nowait(self, message: Received, settled: Settled) -> None:
        """Queue a message in its device's lane; room for it has been taken from `room`."""
        number = lane_of(message.entity_id, self._settings.buckets, self._settings.lanes)
        self._lanes[number].put_nowait(message, settled)

    async def run(self) -> None:
        """Run until `close`, and then until everything queued is written."""
        async with asyncio.TaskGroup() as group:
            for lane in self._lanes:
                group.create_task(lane.run(), name=f"lane-{lane.number}")

    def close(self) -> None:
        """Take no more; see `run`."""
        for lane in self._lanes:
            lane.close()


def throttle_message(lanes: Lanes, bound: Bound | None, retry_after_s: float) -> ingest_pb2.Throttle:
    """Why a message waits for room in the lanes, as its client is told; `bound` is the one that keeps it waiting."""
    throttle = ingest_pb2.Throttle(retry_after_ms=int(retry_after_s * 1000))
    if (trouble := lanes.trouble) is not None:
        throttle.limit = ingest_pb2.Throttle.LIMIT_STORAGE
        throttle.text = "the database does not take writes at present"
        log.debug("throttled by storage", extra={"problem": trouble})
    elif bound is Bound.TENANT:
        throttle.limit = ingest_pb2.Throttle.LIMIT_TENANT_QUEUE
        throttle.limit_value = lanes.room.per_tenant
        throttle.text = "readings of this tenant wait in the gateway"
    else:
        throttle.limit = ingest_pb2.Throttle.LIMIT_GATEWAY_QUEUE
        throttle.limit_value = lanes.room.total
        throttle.text = "readings of all tenants wait in the gateway"
    return throttle
