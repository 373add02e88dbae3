"""Lanes: batches within their limits, a device's messages in order, trouble retried, nothing dropped at the close.

The writer is a stand-in with the contract of the real one: an outcome for every message, or StorageError and nothing
is known. The real one is in the other tests of this directory.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast
from uuid import UUID

import numpy as np
import pytest
from atlasco.telemetry.v1 import ingest_pb2
from numpy.typing import NDArray
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gateway.aliases import AliasTable
from gateway.batch import Committer
from gateway.decode import Received, count_readings
from gateway.lanes import FlushLimits, Lanes
from gateway.room import Room
from runtime.metrics import MemoryMetrics
from storage.commit import Writer
from storage.errors import DataRefused, StorageDefect, StorageError, StorageUnavailable
from storage.model import Attribute, Outcome, Reason, RejectedReading, ValueType, WriteBatch, Written
from storage.partitions import HistoryLimitReached, OutsideClockWindow
from storage.registry import FixedSettings, Tenant
from tests.waiting import PATIENCE_S, until

NOW = 1_800_000_000_000_000
TABLE = AliasTable().with_aliases({1: ("a", ValueType.DOUBLE)}, {1: Attribute(1, "a", ValueType.DOUBLE, True)}, {})


class Registered:
    attributes_by_id: dict[int, Attribute] = {}  # noqa: RUF012


class Coverage:
    """History that is all there, unless told otherwise."""

    def __init__(self) -> None:
        self.error: StorageError | None = None
        self.missing: set[int] = set()

    async def ensure(self, tenant_id: int, days: NDArray[np.int64]) -> None:
        if self.error is not None:
            raise self.error

    def covered(self, tenant_id: int, days: NDArray[np.int64]) -> NDArray[np.bool_]:
        return ~np.isin(days, list(self.missing))

    def retired(self, tenant_id: int, time_us: NDArray[np.int64]) -> NDArray[np.bool_]:
        return np.zeros(time_us.shape, bool)


@dataclass
class FakeWriter:
    """Commits in memory. `errors` are raised first, one for each write; `gate` holds every write up."""

    batches: list[WriteBatch] = field(default_factory=list)
    errors: list[StorageError] = field(default_factory=list)
    gate: asyncio.Event | None = None
    refused: set[float] = field(default_factory=set)
    # The next write commits and fails all the same.
    lose_commit: bool = False
    committed: dict[int, int] = field(default_factory=dict)
    # Stored with the message and told again, as the real writer does.
    told: dict[tuple[int, int], list[RejectedReading]] = field(default_factory=dict)

    async def write(self, batch: WriteBatch, request: Any = None) -> Written:
        if self.gate is not None:
            await self.gate.wait()
        if self.errors:
            raise self.errors.pop(0)
        if any(self.refused & set(columns.value.tolist()) for columns in batch.readings.values()):
            raise DataRefused("some value", "23514")
        self.batches.append(batch)
        outcomes = []
        for message in batch.messages:
            again = message.sequence <= self.committed.get(message.entity_id, 0)
            outcomes.append(Outcome.REPEATED if again else Outcome.COMMITTED)
        if self.lose_commit:
            self.lose_commit = False
            self.committed |= {message.entity_id: message.sequence for message in batch.messages}
            self.told |= {(m.entity_id, m.sequence): list(m.rejections) for m in batch.messages}
            raise StorageUnavailable("the connection was lost during COMMIT")
        for message, outcome in zip(batch.messages, outcomes, strict=True):
            if outcome is Outcome.REPEATED:
                message.rejections = self.told.get((message.entity_id, message.sequence), [])
            self.committed[message.entity_id] = max(message.sequence, self.committed.get(message.entity_id, 0))
        return Written(outcomes, len(self.batches), 0, 0, 0, {})

    async def find_refused(self, batch: WriteBatch) -> dict[ValueType, list[tuple[int, str]]]:
        return {
            value_type: [(i, "refused") for i, value in enumerate(columns.value.tolist()) if value in self.refused]
            for value_type, columns in batch.readings.items()
        }


@dataclass
class Bench:
    lanes: Lanes
    room: Room
    writers: list[FakeWriter]
    coverage: Coverage
    metrics: MemoryMetrics
    settled: list[tuple[int, int, Outcome, list[RejectedReading]]]

    def put(self, entity: int, sequence: int, *values: float, tenant: int = 1, size: int = 10) -> None:
        what = ingest_pb2.Readings(base_time_us=NOW)
        what.doubles.aliases.extend([1] * len(values))
        what.doubles.time_deltas_us.extend(range(len(values)))
        what.doubles.values.extend(values)
        count = max(1, count_readings(what))
        who = Tenant(tenant, f"t{tenant}", 10**12, 10**12, False)
        message = Received(who, entity, f"d{entity}", TABLE, what, size, count, UUID(int=entity), 1, sequence)
        assert self.room.enter_nowait(tenant, count)

        def settled(outcome: Outcome, rejections: list[RejectedReading], xid: int | None) -> None:
            self.settled.append((entity, sequence, outcome, rejections))

        self.lanes.put_nowait(message, settled)

    def sequences(self, entity: int) -> list[int]:
        return [sequence for owner, sequence, _, _ in self.settled if owner == entity]


@asynccontextmanager
async def bench(
    limits: FlushLimits,
    configure: Callable[[FakeWriter], None] = lambda _: None,
    lanes: int = 2,
    spans: InMemorySpanExporter | None = None,
) -> AsyncIterator[Bench]:
    writers: list[FakeWriter] = []

    def new_writer() -> Writer:
        writers.append(FakeWriter())
        configure(writers[-1])
        return cast("Writer", writers[-1])

    metrics, coverage = MemoryMetrics(), Coverage()
    parts: tuple[Any, Any, Any] = Registered(), coverage, None
    committer = Committer(*parts, metrics, max_string_bytes=100, now_us=lambda: NOW)
    room = Room(per_tenant=10_000, total=10_000)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans or InMemorySpanExporter()))
    settings, tracer = FixedSettings(buckets=16, lanes=lanes), provider.get_tracer("test")
    made = Lanes(settings, committer, new_writer, room, limits, metrics, tracer)
    running = asyncio.create_task(made.run())
    found = Bench(made, room, writers, coverage, metrics, [])
    yield found
    made.close()
    await asyncio.wait_for(running, PATIENCE_S)
    assert room.used == 0


async def test_a_batch_stays_within_its_limits() -> None:
    async with bench(FlushLimits(readings=10, bytes=1_000, age_s=0.01), lanes=1) as lane:
        for sequence in range(1, 31):
            lane.put(1, sequence, 1.0, 2.0, 3.0)
        lane.put(1, 31, *[1.0] * 50)
        lane.put(1, 32, 1.0, size=5_000)
        lane.put(1, 33, 1.0)
        await until(lambda: len(lane.settled) == 33)
    sizes = [sum(map(len, batch.readings.values())) for batch in lane.writers[0].batches]
    # A message above a limit goes alone.
    assert sizes == [9] * 10 + [50, 1, 1]
    assert lane.sequences(1) == list(range(1, 34))


async def test_little_waits_for_its_age_and_much_does_not() -> None:
    async with bench(FlushLimits(readings=4, age_s=3600.0), lanes=1) as lane:
        lane.put(1, 1, 1.0)
        lane.put(2, 1, 1.0)
        assert lane.metrics.value("atlasco_lane_queue_readings", lane="0") == 2
        lane.put(3, 1, 1.0, 2.0)
        await until(lambda: len(lane.settled) == 3)
        assert len(lane.writers[0].batches) == 1
        lane.put(1, 2, 1.0)
    # The close flushes what had not come of age.
    assert lane.sequences(1) == [1, 2]


async def test_tenants_take_turns_in_a_lane() -> None:
    gate = asyncio.Event()
    async with bench(FlushLimits(readings=4, age_s=0.0), lambda writer: setattr(writer, "gate", gate), lanes=1) as lane:
        for sequence in range(1, 21):
            lane.put(1, sequence, 1.0, tenant=1)
        lane.put(2, 1, 1.0, tenant=2)
        gate.set()
        await until(lambda: len(lane.settled) == 21)
    assert lane.sequences(1) == list(range(1, 21))
    # Behind one batch at most, not behind the whole backlog.
    assert [entity for entity, *_ in lane.settled].index(2) < 8


async def test_lanes_do_not_wait_for_each_other() -> None:
    async with bench(FlushLimits(age_s=0.0)) as lane:
        held = asyncio.Event()
        lane.writers[0].gate = held
        lane.put(2, 1, 1.0)
        lane.put(3, 1, 1.0)
        await until(lambda: lane.sequences(3) == [1])
        assert lane.sequences(2) == []
        held.set()


@pytest.mark.parametrize(
    "error", [StorageUnavailable("down"), StorageDefect("no such column")], ids=["retriable", "a defect"]
)
async def test_trouble_is_tried_again_and_nothing_is_dropped(
    error: StorageError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.lanes._LONGEST_RETRY_S", 0.05)
    async with bench(FlushLimits(age_s=0.0), lanes=1) as lane:
        lane.writers[0].errors = [error] * 3
        lane.put(1, 1, 1.0)
        await until(lambda: lane.lanes.trouble is not None)
        lane.put(1, 2, 2.0)
        await until(lambda: len(lane.settled) == 2)
        assert lane.lanes.trouble is None
    assert lane.sequences(1) == [1, 2]
    assert lane.metrics.value("atlasco_commit_retries", sqlstate="CONNECTION") == 3


async def test_a_value_that_is_refused_costs_no_other() -> None:
    async with bench(FlushLimits(age_s=0.0), lanes=1) as lane:
        lane.writers[0].refused = {666.0}
        lane.put(1, 1, 1.0, 666.0, 2.0)
        lane.put(2, 1, 3.0)
        await until(lambda: len(lane.settled) == 2)
    [(_, _, outcome, rejections)] = [one for one in lane.settled if one[0] == 1]
    assert outcome is Outcome.COMMITTED
    assert [(one.index, one.reason) for one in rejections] == [(1, Reason.STORAGE_REFUSED)]
    stored = [value for batch in lane.writers[0].batches for part in batch.readings.values() for value in part.value]
    assert sorted(stored) == [1.0, 2.0, 3.0]


async def test_rejections_survive_a_commit_whose_answer_was_lost() -> None:
    async with bench(FlushLimits(age_s=0.0), lanes=1) as lane:
        lane.writers[0].refused = {666.0}
        lane.writers[0].lose_commit = True
        lane.put(1, 1, 1.0, 666.0)
        await until(lambda: len(lane.settled) == 1)
    [(_, _, outcome, rejections)] = lane.settled
    assert outcome is Outcome.REPEATED
    assert [one.index for one in rejections] == [1]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OutsideClockWindow("the window was narrowed"), Reason.TIMESTAMP_TOO_OLD),
        (HistoryLimitReached("2000 ranges"), Reason.STORAGE_REFUSED),
    ],
    ids=["window", "ranges"],
)
async def test_readings_that_get_no_partition_are_rejected_and_the_lane_goes_on(
    error: StorageError, reason: Reason
) -> None:
    async with bench(FlushLimits(age_s=0.0), lanes=1) as lane:
        lane.coverage.error = error
        lane.coverage.missing = {NOW // 86_400_000_000}
        lane.put(1, 1, 1.0)
        await until(lambda: len(lane.settled) == 1)
    assert [(one.index, one.reason) for one in lane.settled[0][3]] == [(0, reason)]
    assert all(not len(part) for batch in lane.writers[0].batches for part in batch.readings.values())


async def test_a_flush_is_a_span() -> None:
    spans = InMemorySpanExporter()
    async with bench(FlushLimits(age_s=0.0), lanes=1, spans=spans) as lane:
        lane.put(1, 1, 1.0, 2.0)
        await until(lambda: len(lane.settled) == 1)
    [span] = spans.get_finished_spans()
    assert span.name == "flush"
    found = dict(span.attributes or {})
    assert (found["atlasco.lane"], found["atlasco.messages"], found["atlasco.readings"]) == (0, 1, 2)


async def test_empty_messages_pass() -> None:
    async with bench(FlushLimits(age_s=0.0), lanes=1) as lane:
        for sequence in range(1, 4):
            lane.put(1, sequence)
        await until(lambda: lane.sequences(1) == [1, 2, 3])
