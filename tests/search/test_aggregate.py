"""Aggregates equal a brute-force computation on random questions: from readings, and from rollups."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import psycopg
import pytest

from runtime.metrics import MemoryMetrics
from storage.aggregate import aggregate
from storage.aggregate_buckets import MAX_POINTS, Bucket, BucketUnit, TooManyPoints, bucket_edges
from storage.aggregate_model import (
    NUMERIC,
    AggregateQuestion,
    AggregateSource,
    AggregateTypeMismatch,
    Function,
    Selection,
)
from storage.database import Pool
from storage.model import ValueType
from storage.read_model import AttributeNotFound, EntityNotFound
from storage.rollup.config import RollupConfig
from storage.rollup.declare import create_rollup, find_rollup
from storage.rollup.service import Worker
from tests.search.conftest import OpenSession
from tests.search.fleet import HOUR_US, Fleet, random_value, readings_of, store_readings
from tests.storage.conftest import Database

DEVICES = [f"device-{n:04}" for n in (1, 2, 3, 4, 5, 6)]
DAY_US = 24 * HOUR_US
ALL = list(Function)


@pytest.fixture(scope="module")
def history(owner: psycopg.Connection[Any], fleet: Fleet) -> Fleet:
    random = np.random.default_rng(3)
    for device in DEVICES:
        for name, attribute in fleet.attributes.items():
            times = fleet.now_us - random.integers(0, 5 * DAY_US, 150)
            # Some at one instant on several devices, and some dense.
            times[:20] = fleet.now_us - 3 * HOUR_US - np.arange(20) * 7_000_000
            finite = name != "pressure"
            values = {int(t): random_value(random, attribute.type) for t in times}
            if finite and attribute.type is ValueType.DOUBLE:
                values = {t: v if abs(v) < 1e6 else 1.5 for t, v in values.items()}
            if attribute.type is ValueType.BIGINT:
                values = {t: v if abs(v) < 1e9 else 7 for t, v in values.items()}
            store_readings(owner, fleet, device, name, values)
    return fleet


@pytest.fixture(scope="module")
async def rolled(history: Fleet, worker_pool: Pool, fleet_database: Database) -> Fleet:
    numbers = [a.name for a in history.attributes.values() if a.type in (ValueType.DOUBLE, ValueType.BIGINT)]
    await create_rollup(worker_pool, history.tenant_id, "all_numbers", numbers)
    worker = Worker(worker_pool, 2, RollupConfig(dsn=fleet_database()), MemoryMetrics())
    await worker.adopt()
    while (await find_rollup(worker_pool, history.tenant_id, "all_numbers")).status.state != "serving":
        await worker.turn()
    await worker.turn()
    return history


def brute(function: Function, values: list[Any], percentile: float = 0.0) -> Any:
    match function:
        case Function.COUNT:
            return len(values)
        case Function.FIRST:
            return values[0]
        case Function.LAST:
            return values[-1]
        case Function.MIN:
            numbers = [v for v in values if not math.isnan(v)]
            return min(numbers) if numbers else math.nan
        case Function.MAX:
            return math.nan if any(math.isnan(v) for v in values) else max(values)
    numbers = np.array(values, np.float64)
    huge = bool(np.any((np.abs(numbers) >= 1e140) & np.isfinite(numbers)))
    with np.errstate(all="ignore"):
        if function is Function.PERCENTILE:
            ordered = np.sort(numbers)
            at = percentile / 100 * (len(ordered) - 1)
            low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
            return float(low) if math.floor(at) == math.ceil(at) else float(low + (at - math.floor(at)) * (high - low))
        if huge:
            return math.nan
        if function is Function.SUM:
            return float(np.sum(numbers))
        if function is Function.MEAN:
            return float(np.mean(numbers))
        return math.nan if len(numbers) < 2 else float(np.std(numbers, ddof=1))


def close(got: Any, want: Any) -> bool:
    if isinstance(want, float) and isinstance(got, float):
        if math.isnan(want) or math.isnan(got):
            return math.isnan(want) and math.isnan(got)
        return got == want or math.isclose(got, want, rel_tol=1e-9, abs_tol=1e-9)
    return type(got) is type(want) and bool(got == want)


def check(fleet: Fleet, question: AggregateQuestion, devices: Sequence[str], answer: Any) -> None:
    edges = (
        bucket_edges(question.bucket, question.start_us, question.end_us) if question.bucket else [question.start_us]
    )
    types = {fleet.attributes[a].type for a in question.attributes}
    widened = not question.by_attribute and len(types) > 1
    want: dict[tuple[str, str], dict[int, list[Any]]] = {}
    for time_us, _, _, device, name, value in readings_of(
        fleet, devices, question.attributes, question.start_us, question.end_us
    ):
        key = (device if question.by_entity else "", name if question.by_attribute else "")
        edge = max(e for e in edges if e <= time_us)
        want.setdefault(key, {}).setdefault(edge, []).append(float(value) if widened else value)
    assert [(s.entity, s.attribute) for s in answer.series] == sorted(want)
    for series in answer.series:
        buckets = want[series.entity, series.attribute]
        assert list(series.bucket_times_us) == sorted(buckets)
        for column in series.columns:
            for edge, got in zip(series.bucket_times_us, column.values, strict=True):
                expected = brute(column.function, buckets[edge], column.percentile)
                assert close(got, expected), (column.function, column.percentile, got, expected, buckets[edge])


def random_question(random: np.random.Generator, fleet: Fleet, *, rolled: bool) -> tuple[AggregateQuestion, list[str]]:
    numeric = ["temperature", "count", "pressure"]
    by_attribute = bool(random.random() < 0.5)
    if rolled or random.random() < 0.6:
        attributes = [str(a) for a in random.choice(numeric, int(random.integers(1, 4)), replace=False)]
        functions = [f for f in ALL if not rolled or f is not Function.PERCENTILE]
    else:
        attributes = [str(random.choice(["status", "on", "odd name"]))]
        functions = [f for f in ALL if f not in NUMERIC]
    chosen = [f for f in functions if random.random() < 0.6] or [Function.COUNT]
    buckets: list[Bucket | None] = [None, Bucket(BucketUnit.HOUR, 1, "Asia/Kolkata"), Bucket(BucketUnit.DAY)]
    if rolled:
        buckets += [Bucket(BucketUnit.MINUTE, 15), Bucket(BucketUnit.HOUR, 6, "Europe/Berlin")]
    else:
        buckets += [Bucket(BucketUnit.MINUTE, 10), Bucket(BucketUnit.DAY, 1, "Europe/Berlin"), Bucket(BucketUnit.MONTH)]
    bucket = buckets[int(random.integers(len(buckets)))]
    start = fleet.now_us - int(random.integers(1, 5 * DAY_US))
    devices = [str(d) for d in random.choice(DEVICES, int(random.integers(1, 5)), replace=False)]
    selection = Selection(entities=devices)
    if random.random() < 0.4:
        selection = Selection(entity_type="pump", labels={"site": "s1"} if random.random() < 0.5 else {})
        devices = [
            d for d in DEVICES
            if fleet.devices[d].entity_type == "pump" and selection.labels.items() <= fleet.devices[d].labels.items()
        ]  # fmt: skip
    question = AggregateQuestion(
        selection=selection,
        attributes=attributes,
        start_us=start,
        end_us=min(fleet.now_us, start + int(random.integers(1, 4 * DAY_US))),
        functions=chosen,
        bucket=bucket,
        percentiles=[0.0, 50.0, 99.5] if Function.PERCENTILE in chosen else [],
        by_entity=bool(random.random() < 0.5),
        by_attribute=by_attribute,
    )
    return question, devices


@pytest.mark.parametrize("seed", range(60))
async def test_random_questions_from_readings(history: Fleet, reading: OpenSession, seed: int) -> None:
    question, devices = random_question(np.random.default_rng(seed), history, rolled=False)
    async with reading() as session:
        answer = await aggregate(session, question, needed_as_of_us=None)
    assert answer.source is AggregateSource.READINGS
    check(history, question, devices, answer)


async def test_random_questions_from_rollups(rolled: Fleet, reading: OpenSession) -> None:
    served = 0
    for seed in range(80):
        question, devices = random_question(np.random.default_rng(seed), rolled, rolled=True)
        async with reading() as session:
            answer = await aggregate(session, question, needed_as_of_us=0)
        served += answer.source is AggregateSource.ROLLUP
        check(rolled, question, devices, answer)
    assert served > 60


async def test_a_filter_selects(history: Fleet, reading: OpenSession) -> None:
    question = AggregateQuestion(
        Selection(filter='name starts with "device-000" and not name = "device-0003"'),
        ["temperature"], history.now_us - DAY_US, history.now_us, [Function.COUNT], by_entity=True,
    )  # fmt: skip
    async with reading() as session:
        answer = await aggregate(session, question, needed_as_of_us=None)
        seen = await aggregate(session, question, needed_as_of_us=None, only="device-0001")
    check(history, question, [d for d in DEVICES if d != "device-0003"], answer)
    check(history, question, ["device-0001"], seen)


async def test_int64_results_are_exact(owner: psycopg.Connection[Any], fleet: Fleet, reading: OpenSession) -> None:
    at = fleet.now_us - 20 * DAY_US
    store_readings(owner, fleet, "device-0008", "count", {at: 2**63 - 1, at + 1: -(2**63), at + 2: 2**53 + 1})
    functions = [Function.MIN, Function.MAX, Function.FIRST, Function.LAST, Function.COUNT, Function.SUM]
    question = AggregateQuestion(Selection(["device-0008"]), ["count"], at, at + 9, functions)
    async with reading() as session:
        answer = await aggregate(session, question, needed_as_of_us=None)
    assert [c.values[0] for c in answer.series[0].columns] == [
        -(2**63), 2**63 - 1, 2**63 - 1, 2**53 + 1, 3, float(2**53),
    ]  # fmt: skip
    assert answer.series[0].bucket_times_us == [at]


async def test_refusals(history: Fleet, reading: OpenSession) -> None:
    def ask(**fields: Any) -> AggregateQuestion:
        given = {"selection": Selection(), "attributes": ["temperature"], "start_us": history.now_us - DAY_US,
                 "end_us": history.now_us, "functions": [Function.MEAN], **fields}  # fmt: skip
        return AggregateQuestion(**given)

    for question, error in (
        (ask(attributes=["none"]), AttributeNotFound),
        (ask(selection=Selection(["none"])), EntityNotFound),
        (ask(attributes=["status"]), AggregateTypeMismatch),
        (ask(attributes=["status", "count"], functions=[Function.COUNT]), AggregateTypeMismatch),
        (ask(bucket=Bucket(BucketUnit.SECOND), start_us=history.now_us - 2 * DAY_US), TooManyPoints),
    ):
        async with reading() as session:
            with pytest.raises(error):
                await aggregate(session, question, needed_as_of_us=None)
    assert MAX_POINTS == 100_000
    # A range without readings, and one that lies behind retention, have no rows.
    for start, end in ((history.now_us + HOUR_US, history.now_us + DAY_US), (1, 2), (1, 2**62)):
        async with reading() as session:
            answer = await aggregate(
                session, ask(start_us=start, end_us=end, attributes=["history only"]), needed_as_of_us=None
            )
        assert bool(answer.series) is (end == 2**62)
