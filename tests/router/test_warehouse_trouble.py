"""A warehouse in trouble: it may not be read, hangs, is damaged or ends questions, and what that costs others."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from router.breaker import FAILURES
from router.clock import PrimaryClock
from router.database import DatabaseSource
from router.execute import Router
from router.outcome import FallbackBusy, NoSource, RangeRetired
from router.plan import Need, Shape, SourceKind
from router.questions import Aggregates, SeriesRange
from router.tiers import DegradedReason, Question, Requirement
from router.warehouse import WarehouseSource
from storage.aggregate.model import AggregateQuestion, Function, Selection
from storage.database import PoolSettings, Role, make_pool
from storage.errors import QueryCanceled, StorageBusy, StorageDefect, StorageUnavailable
from storage.reads.model import SeriesQuestion
from storage.reads.session import ReadSession
from storage.reads.tenants import TenantDirectory
from storage.reads.warehouse import warehouse_names
from storage.warehouse.local import LocalWarehouse
from storage.warehouse.local_limits import LocalLimits
from storage.warehouse.port import EVERYTHING, Completeness, Scope
from storage.warehouse.reader import WarehouseReader
from tests.router.platform import DAY_US, DEVICES, HOUR_US, TENANT, Platform
from tests.router.router_support import DATABASE
from tests.waiting import PATIENCE_S, until

CRITICAL = Need(0)
ANALYTICS = Need(900_000_000)


class Forbidden(LocalWarehouse):
    """Its catalog may not be read."""

    def completeness(self, scope: Scope = EVERYTHING) -> Completeness:
        raise StorageDefect("permission denied for table watermarks")


async def test_a_warehouse_that_may_not_be_read_is_left_alone(platform: Platform, tmp_path: Path) -> None:
    source = WarehouseSource(Forbidden(tmp_path, platform.server.dsn(DATABASE)))
    for _ in range(FAILURES):
        await source.measure()
    assert not source.standing.available
    assert "permission denied" in source.standing.reason
    source.close()


class TooLarge(Question[int]):
    """More than the warehouse has the memory for."""

    shape = Shape.SCAN
    able = frozenset({SourceKind.WAREHOUSE})

    async def from_database(self, session: ReadSession, needed_as_of_us: int | None) -> int:
        raise NotImplementedError

    def from_warehouse(self, reader: WarehouseReader, tenant: str) -> tuple[int, Completeness]:
        answer = reader.query("SELECT length(CAST(array_agg(n) AS VARCHAR)) FROM range(500000000) r (n)")
        return answer.rows[0][0], answer.completeness


async def test_a_question_too_large_for_the_warehouse_shuts_it_to_nobody(platform: Platform) -> None:
    limits = LocalLimits(query_memory_bytes=32 * 1024 * 1024)
    small = LocalWarehouse(platform.directory, platform.server.dsn(DATABASE), limits=limits)
    source = WarehouseSource(small)
    await source.measure()
    for _ in range(FAILURES):
        with pytest.raises(StorageBusy):
            await source.answer(TENANT, TooLarge(), Requirement(Need(900_000_000), 0), PATIENCE_S)
    assert source.standing.available
    source.close()
    small.close()


async def measured_available(source: WarehouseSource) -> None:
    async def available() -> bool:
        await source.measure()
        return source.standing.available

    await until(available, "the warehouse is asked again")


class Hanging(LocalWarehouse):
    """It does not answer until it is told to."""

    def __init__(self, directory: Path, dsn: str) -> None:
        super().__init__(directory, dsn)
        self.began = threading.Event()
        self.answers = threading.Event()
        self.asked = 0

    def completeness(self, scope: Scope = EVERYTHING) -> Completeness:
        self.asked += 1
        self.began.set()
        assert self.answers.wait(PATIENCE_S)
        return super().completeness(scope)


class Broken(LocalWarehouse):
    """It fails in a way that nobody thought of, until it is mended."""

    mended = False

    def completeness(self, scope: Scope = EVERYTHING) -> Completeness:
        if not self.mended:
            raise RuntimeError("a surprise")
        return super().completeness(scope)


async def test_whatever_is_wrong_with_a_warehouse_it_is_left_alone_and_measured_again(
    platform: Platform, tmp_path: Path
) -> None:
    broken = Broken(tmp_path, platform.server.dsn(DATABASE))
    source = WarehouseSource(broken)
    for _ in range(FAILURES):
        await source.measure()
    assert not source.standing.available
    assert source.standing.reason == "RuntimeError: a surprise"
    broken.mended = True
    await measured_available(source)
    source.close()
    broken.close()


async def test_a_warehouse_that_hangs_is_left_alone_until_it_answers(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = Hanging(tmp_path, platform.server.dsn(DATABASE))
    source = WarehouseSource(hanging)
    # While it hangs only: an answer may take its time.
    with monkeypatch.context() as impatient:
        impatient.setattr("router.warehouse._PATIENCE_S", 0.05)
        for _ in range(FAILURES):
            await source.measure()
    assert not source.standing.available
    assert await asyncio.to_thread(hanging.began.wait, PATIENCE_S)
    assert hanging.asked == 1, "no second one is begun beside one that hangs"
    hanging.answers.set()
    await measured_available(source)
    source.close()
    hanging.close()


class Endless(Question[int]):
    """Keeps the warehouse busy for hours."""

    shape = Shape.SCAN
    able = frozenset({SourceKind.WAREHOUSE})

    def __init__(self) -> None:
        self.began = threading.Event()
        self.ended = threading.Event()

    async def from_database(self, session: ReadSession, needed_as_of_us: int | None) -> int:
        raise NotImplementedError

    def from_warehouse(self, reader: WarehouseReader, tenant: str) -> tuple[int, Completeness]:
        self.began.set()
        try:
            answer = reader.query("SELECT count(*) FROM range(1000000000000) r (n) WHERE n * n %% 7 = 9")
        finally:
            self.ended.set()
        return answer.rows[0][0], answer.completeness


async def test_a_question_that_is_given_up_ends_in_the_warehouse(
    platform: Platform, router: tuple[Router, WarehouseSource]
) -> None:
    _, source = router
    platform.write([("d0", "temperature", platform.now_us - HOUR_US, 1.0)])
    platform.load()
    requirement = Requirement(Need(900_000_000), 0)
    late: list[Endless] = []

    async def ends_late() -> bool:
        late.append(Endless())
        with pytest.raises(QueryCanceled):
            await source.answer(TENANT, late[-1], requirement, 2.0)
        return late[-1].began.is_set()

    # On a busy machine its time may be over before it has begun.
    await until(ends_late, "a question that has begun runs out of time")
    left = Endless()
    caller = asyncio.create_task(source.answer(TENANT, left, requirement, PATIENCE_S))
    assert await asyncio.to_thread(left.began.wait, PATIENCE_S)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    for question in (late[-1], left):
        assert await asyncio.to_thread(question.ended.wait, PATIENCE_S)
    # Every place is free again: as many questions as may run and wait are answered.
    day = SeriesRange(SeriesQuestion(["d0"], ["temperature"], platform.now_us - DAY_US, platform.now_us), 10, None)

    async def all_answered() -> bool:
        asked = (source.answer(TENANT, day, requirement, PATIENCE_S) for _ in range(6))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, BaseException)]
        # A question has ended a moment before its place is free.
        assert all(isinstance(error, StorageBusy) for error in refused), refused
        return not refused

    await until(all_answered, "every place is free again")


def of_temperature(platform: Platform) -> SeriesQuestion:
    return SeriesQuestion(list(DEVICES), ["temperature"], platform.now_us - 19 * DAY_US, platform.now_us + 1)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
async def test_a_damaged_file_sends_its_questions_elsewhere(
    platform: Platform, router: tuple[Router, WarehouseSource], damage: str
) -> None:
    routing, source = router
    platform.write([("d0", "temperature", platform.now_us - 2 * DAY_US, 1.0)])
    platform.load()
    await source.measure()
    question = of_temperature(platform)
    whole = await routing.read(TENANT, SeriesRange(question, 1_000, None), ANALYTICS, PATIENCE_S)
    assert whole.proof.kind is SourceKind.WAREHOUSE
    file = next(path for path in sorted(platform.directory.rglob("*.parquet")) if "double" in str(path))
    good = file.read_bytes()
    file.write_bytes({"truncated": good[: len(good) // 2], "garbage": b"x" * len(good), "empty": b""}[damage])
    try:
        routed = await routing.read(TENANT, SeriesRange(question, 1_000, None), ANALYTICS, PATIENCE_S)
        assert routed.proof.kind is SourceKind.PRIMARY
        assert [d.reason for d in routed.proof.degraded] == [DegradedReason.NO_WAREHOUSE]
        assert source.standing.available, "other files are whole"
    finally:
        file.write_bytes(good)


async def test_a_question_that_the_warehouse_ends_goes_elsewhere(
    platform: Platform, router: tuple[Router, WarehouseSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    routing, source = router
    platform.load()
    await source.measure()

    def ended(*_: object, **__: object) -> Any:
        raise QueryCanceled("cancelled by a rule of the workload manager", "57014")

    monkeypatch.setattr(platform.warehouse, "query", ended)
    routed = await routing.read(TENANT, SeriesRange(of_temperature(platform), 10, None), ANALYTICS, PATIENCE_S)
    assert routed.proof.kind is SourceKind.PRIMARY
    assert source.standing.available


@contextmanager
def kept_for_a_week(platform: Platform) -> Iterator[None]:
    """Within the block, PostgreSQL has retired what is older."""
    retention = "UPDATE tenants SET window_past = %s, retention = %s WHERE tenant_id = %s"
    platform.owner.execute(retention, ["1 day", "7 days", platform.tenant])
    try:
        yield
    finally:
        platform.owner.execute(retention, ["60 days", "60 days", platform.tenant])


async def test_while_the_warehouse_is_down_an_old_range_is_not_said_to_be_retired(
    platform: Platform, router: tuple[Router, WarehouseSource]
) -> None:
    routing, source = router
    at_us = platform.now_us - 14 * DAY_US - 4321
    platform.write([("d2", "temperature", at_us, 7.0)])
    platform.load()
    await source.measure()
    question = SeriesRange(SeriesQuestion(["d2"], ["temperature"], at_us, at_us + 1), 10, None)
    with kept_for_a_week(platform):
        for need in (CRITICAL, ANALYTICS):
            assert (await routing.read(TENANT, question, need, PATIENCE_S)).answer.parts
        for _ in range(FAILURES):
            source.breaker.failed("it is down")
        for need in (CRITICAL, ANALYTICS, replace(ANALYTICS, allow_degraded=True)):
            with pytest.raises(StorageUnavailable, match="the warehouse may hold the range"):
                await routing.read(TENANT, question, need, PATIENCE_S)
        alone = Router(routing.database("primary"), PrimaryClock())
        with pytest.raises(RangeRetired):
            await alone.read(TENANT, question, CRITICAL, PATIENCE_S)


async def test_a_range_that_only_a_stale_warehouse_holds_is_not_said_to_be_retired(
    platform: Platform, router: tuple[Router, WarehouseSource]
) -> None:
    routing, source = router
    at_us = platform.now_us - 13 * DAY_US - 77
    platform.write([("d1", "temperature", at_us, 7.0)])
    platform.load()
    await source.measure()
    question = SeriesRange(SeriesQuestion(["d1"], ["temperature"], at_us, at_us + 1), 10, None)
    # Not loaded: the seam lies below the range, and all of it is the database's.
    platform.write([("d0", "temperature", platform.now_us - 18 * DAY_US, 1.0)])
    with kept_for_a_week(platform):
        with pytest.raises(NoSource) as caught:
            await routing.read(TENANT, question, CRITICAL, PATIENCE_S)
        assert "no longer kept" in caught.value.reasons["primary"]
        assert "short of what is needed" in caught.value.reasons["warehouse"]
        routed = await routing.read(TENANT, question, ANALYTICS, PATIENCE_S)
        assert (routed.proof.kind, [len(part.times_us) for part in routed.answer.parts]) == (SourceKind.WAREHOUSE, [1])


async def test_a_stopped_loader_cannot_crowd_the_primary(
    platform: Platform, router: tuple[Router, WarehouseSource]
) -> None:
    routing, source = router
    platform.load()
    await source.measure()
    # Late and not loaded: nothing from 19 days ago on may be read from the warehouse.
    platform.write([("d0", "temperature", platform.now_us - 19 * DAY_US, 1.0)])
    primary = routing.database("primary")
    shut = Router(primary, PrimaryClock(), warehouse=source, policy=routing.policy, fallback_limit=0)
    question = SeriesRange(of_temperature(platform), 1_000, None)
    with pytest.raises(FallbackBusy):
        await shut.read(TENANT, question, Need(1), PATIENCE_S)
    assert (await shut.read(TENANT, question, CRITICAL, PATIENCE_S)).proof.kind is SourceKind.PRIMARY
    platform.load()
    # The last hours of a split are nobody else's.
    platform.write([("d0", "temperature", platform.now_us - HOUR_US, 1.0)])
    await source.measure()
    assert (await shut.read(TENANT, question, Need(1), PATIENCE_S)).proof.kind is SourceKind.SPLIT


async def test_splits_of_broken_replicas_reach_the_primary_in_limited_numbers(
    platform: Platform, router: tuple[Router, WarehouseSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One too many is refused before it waits for a connection, wherever the seam is."""
    routing, source = router
    platform.write([("d0", "temperature", platform.now_us - 2 * DAY_US, 1.0)])
    platform.load()
    await source.measure()
    primary, clock = routing.database("primary"), PrimaryClock()
    # Its breaker is open: its pool is never asked.
    replica = DatabaseSource(make_pool(PoolSettings("", Role.QUERY)), TenantDirectory(), clock,
                             kind=SourceKind.REPLICA, name="replica-1")  # fmt: skip
    for _ in range(FAILURES):
        replica.breaker.failed("it is down")
    question = SeriesRange(of_temperature(platform), 1_000, None)

    def limited(limit: int) -> Router:
        return Router(primary, clock, replicas=[replica], warehouse=source, policy=routing.policy, fallback_limit=limit)

    assert (await limited(1).read(TENANT, question, Need(1), PATIENCE_S)).proof.kind is SourceKind.SPLIT
    asked: list[str] = []

    async def within(*_: object) -> None:
        asked.append("primary")

    monkeypatch.setattr(primary, "within", within)
    with pytest.raises(FallbackBusy):
        await limited(0).read(TENANT, question, Need(1), PATIENCE_S)
    assert asked == []


async def test_an_aggregate_is_as_old_as_its_names(
    platform: Platform, router: tuple[Router, WarehouseSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device is deleted, registered anew and loaded between the look-up of its id and the aggregate."""
    routing, source = router
    at_us = platform.now_us - 12 * DAY_US - 99
    old = platform.one("SELECT register_entity(%s, 'twice', '', '{}')", platform.tenant)
    platform.ids["twice"] = old
    platform.write([("twice", "temperature", at_us, 1.0)])
    platform.load()
    await source.measure()
    names = warehouse_names
    written: list[int] = []

    def meanwhile(*arguments: Any) -> Any:
        found = names(*arguments)
        platform.owner.execute("DELETE FROM entities WHERE entity_id = %s", [old])
        platform.ids["twice"] = platform.one("SELECT register_entity(%s, 'twice', '', '{}')", platform.tenant)
        written.append(platform.one("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"))
        platform.write([("twice", "temperature", at_us + 1, 2.0)])
        platform.load()
        return found

    monkeypatch.setattr("storage.aggregate.warehouse.warehouse_names", meanwhile)
    question = AggregateQuestion(Selection(["twice"]), ["temperature"], at_us + 1, at_us + 10, [Function.COUNT])
    routed = await routing.read(TENANT, Aggregates(question, None), ANALYTICS, PATIENCE_S)
    assert routed.proof.kind is SourceKind.WAREHOUSE
    assert routed.answer.series == []
    assert routed.proof.as_of_us <= written[0], "it lacks what was written then"
