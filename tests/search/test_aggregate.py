"""Aggregates equal a brute-force computation on random questions: from readings, and from rollups."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import psycopg
import pytest

from runtime.metrics import MemoryMetrics
from storage.aggregate.buckets import MAX_POINTS, Bucket, BucketUnit, TooManyPoints
from storage.aggregate.database import aggregate
from storage.aggregate.model import (
    AggregateQuestion,
    AggregateSource,
    AggregateTypeMismatch,
    Function,
    Selection,
)
from storage.aggregate.text_bound import TooMuchText, check_text
from storage.database import Pool
from storage.model import ValueType
from storage.reads.model import AttributeNotFound, EntityNotFound
from storage.rollup.config import RollupConfig
from storage.rollup.declare import create_rollup, find_rollup
from storage.rollup.worker import Worker
from tests.search.aggregates import DAY_US, check, random_question, text_bytes, texts_of
from tests.search.conftest import OpenSession
from tests.search.fleet import HOUR_US, Fleet, random_value, store_readings
from tests.storage.conftest import Database

DEVICES = [f"device-{n:04}" for n in (1, 2, 3, 4, 5, 6)]


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


async def test_texts_are_bounded(history: Fleet, reading: OpenSession, monkeypatch: pytest.MonkeyPatch) -> None:
    question = AggregateQuestion(
        Selection(), ["status"], history.now_us - 6 * DAY_US, history.now_us,
        [Function.FIRST, Function.COUNT, Function.LAST], Bucket(BucketUnit.HOUR), by_entity=True,
    )  # fmt: skip
    async with reading() as session:
        whole = await aggregate(session, question, needed_as_of_us=None)
    check(history, question, DEVICES, whole)
    size = text_bytes(whole)
    monkeypatch.setattr("storage.aggregate.text_bound.MAX_AGGREGATE_TEXT_BYTES", size)
    async with reading() as session:
        assert (await aggregate(session, question, needed_as_of_us=None)).series == whole.series
    held: list[Any] = []

    def counted(values: Iterable[Any]) -> None:
        held.extend(values)
        check_text(held)

    monkeypatch.setattr("storage.aggregate.series.check_text", counted)
    for limit, most in ((size - 1, size), (40, 40 + 2 * max(len(v) for v in texts_of(whole)))):
        held.clear()
        monkeypatch.setattr("storage.aggregate.text_bound.MAX_AGGREGATE_TEXT_BYTES", limit)
        async with reading() as session:
            with pytest.raises(TooMuchText):
                await aggregate(session, question, needed_as_of_us=None)
        assert limit < sum(len(v.encode()) for v in held if isinstance(v, str)) <= most
