"""A gateway with a real replica, a warehouse and rollups: each tier's answers are right, and from where they belong."""

import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from atlasco.telemetry.v1 import query_pb2, query_pb2_grpc

from gateway.query_aggregate import FUNCTIONS
from runtime.metrics import MemoryMetrics
from storage.aggregate.buckets import Bucket, BucketUnit
from storage.aggregate.model import (
    AggregateAnswer,
    AggregateColumn,
    AggregateQuestion,
    AggregateSeries,
    AggregateSource,
    Function,
    Selection,
)
from storage.filter.evaluate import Device
from storage.model import Attribute, ValueType
from storage.rollup.config import RollupConfig
from storage.rollup.declare import create_rollup, find_rollup
from storage.rollup.service import rollup_pool
from storage.rollup.worker import Worker
from tests.gateway.running_gateway import RunningGateway, running_gateway
from tests.refusals import refusal
from tests.router.platform import ATTRIBUTES, DAY_US, DEVICES, HOUR_US, TENANT, TYPES, Platform, some_rows
from tests.router.router_support import PRIMARY, REPLICA, Pair, ask, metadata
from tests.router.test_replica import source_fresh
from tests.search.aggregates import check, random_question
from tests.search.fleet import Fleet
from tests.storage.conftest import Database
from tests.waiting import PATIENCE_S

CRITICAL, DASHBOARD, REPORT, ANALYTICS = (
    query_pb2.TIER_CRITICAL,
    query_pb2.TIER_DASHBOARD,
    query_pb2.TIER_REPORT,
    query_pb2.TIER_ANALYTICS,
)
TIERS = (CRITICAL, DASHBOARD, REPORT, ANALYTICS)
WAREHOUSE = query_pb2.Provenance.SOURCE_WAREHOUSE
SPLIT = query_pb2.Provenance.SOURCE_SPLIT
ROLLUP = query_pb2.Provenance.SOURCE_ROLLUP

UNITS = {
    BucketUnit.MINUTE: query_pb2.BUCKET_UNIT_MINUTE,
    BucketUnit.HOUR: query_pb2.BUCKET_UNIT_HOUR,
    BucketUnit.DAY: query_pb2.BUCKET_UNIT_DAY,
    BucketUnit.MONTH: query_pb2.BUCKET_UNIT_MONTH,
}
FUNCTION_NUMBERS = {function: number for number, function in FUNCTIONS.items()}


@pytest.fixture(scope="module")
def platform(pair: Pair) -> Iterator[Platform]:
    """Readings of sixteen days, corrections among them, all loaded; latest values as ingest keeps them."""
    with tempfile.TemporaryDirectory(prefix="atlasco-tiers-") as name:
        made = Platform(pair.primary, Path(name))
        made.owner.execute(
            "UPDATE entities SET entity_type = 'pump', labels = '{\"site\": \"s1\"}' WHERE external_id <> 'd0'"
        )
        random = np.random.default_rng(1)
        for oldest_hours in (400, 400, 96, 96, 96, 24):
            made.write(some_rows(made, random, 120, oldest_hours * HOUR_US))
        made.owner.execute(
            "INSERT INTO latest_values (tenant_id, entity_id, attribute_id, ts, double_value, text_value) "
            "SELECT DISTINCT ON (entity_id, attribute_id) "
            "tenant_id, entity_id, attribute_id, ts, double_value, text_value "
            "FROM entity_attributes ORDER BY entity_id, attribute_id, ts DESC"
        )
        made.load()
        yield made
        made.warehouse.close()
        made.owner.close()


@pytest.fixture(scope="module")
async def tiers(platform: Platform, pair: Pair) -> AsyncIterator[RunningGateway]:
    database = Database(pair.primary, pair.name)
    async with running_gateway(
        database, warehouse=platform.warehouse, replica_dsns=pair.replica_dsn, max_fallback_queries=4
    ) as running:
        pair.replica.wait_caught_up()
        await source_fresh(running, TENANT, "replica-1")
        yield running


def fleet_of(platform: Platform) -> Fleet:
    """The platform's readings in the form that random aggregates ask about."""
    attributes = {n: Attribute(platform.attributes[n], n, ValueType(TYPES[n]), True) for n in ATTRIBUTES}
    fleet = Fleet(platform.tenant, platform.now_us, attributes, dict(platform.ids))
    for device in DEVICES:
        kind, labels = ("", {}) if device == "d0" else ("pump", {"site": "s1"})
        fleet.devices[device] = Device(device, kind, labels, {})
    for (device, attribute), run in platform.readings.items():
        fleet.readings[device, attribute] = {time_us: value for time_us, (value, _) in run.items()}
    return fleet


def request_of(question: AggregateQuestion, tier: int) -> query_pb2.AggregateRequest:
    bucket = question.bucket
    return query_pb2.AggregateRequest(
        selection=query_pb2.Selection(
            entities=question.selection.entities,
            entity_type=question.selection.entity_type,
            labels=dict(question.selection.labels),
        ),
        attributes=question.attributes,
        start_time_us=question.start_us,
        end_time_us=question.end_us,
        bucket=None
        if bucket is None
        else query_pb2.Bucket(unit=UNITS[bucket.unit], width=bucket.width, time_zone=bucket.time_zone),
        functions=[FUNCTION_NUMBERS[function] for function in question.functions],
        percentiles=question.percentiles,
        group_by=[
            *([query_pb2.AGGREGATE_GROUP_ENTITY] if question.by_entity else []),
            *([query_pb2.AGGREGATE_GROUP_ATTRIBUTE] if question.by_attribute else []),
        ],
        freshness=query_pb2.Freshness(tier=tier, explain=True),  # type: ignore[arg-type]
    )


def answer_of(message: query_pb2.AggregateResponse) -> AggregateAnswer:
    series = [
        AggregateSeries(
            s.entity,
            s.attribute,
            list(s.bucket_times_us),
            [
                AggregateColumn(
                    FUNCTIONS[c.function],
                    c.percentile,
                    ValueType.DOUBLE,
                    list(c.double_values or c.int64_values or c.bool_values or c.string_values),
                )
                for c in s.columns
            ],
        )
        for s in message.series
    ]
    return AggregateAnswer(message.provenance.as_of_us, 0, AggregateSource.READINGS, series)


async def test_random_aggregates_are_right_at_every_tier(platform: Platform, tiers: RunningGateway) -> None:
    fleet = fleet_of(platform)
    seen: Counter[tuple[int, int]] = Counter()
    for seed in range(25):
        question, devices = random_question(np.random.default_rng(seed), fleet, rolled=False)
        for tier in TIERS:
            message = await ask(tiers.channel, TENANT, request_of(question, tier))
            seen[tier, message.provenance.source] += 1
            assert not message.provenance.degraded
            check(fleet, question, devices, answer_of(message))
    assert {source for tier, source in seen if tier == CRITICAL} == {PRIMARY}
    assert {source for tier, source in seen if tier == ANALYTICS} == {WAREHOUSE}
    # Long ranges of reports too; the split where the warehouse is more than 30 s behind by now.
    assert seen[REPORT, WAREHOUSE] + seen[REPORT, SPLIT] > 5


async def test_random_series_are_right_at_every_tier(platform: Platform, tiers: RunningGateway) -> None:
    random = np.random.default_rng(3)
    stub: Any = query_pb2_grpc.QueryServiceStub(tiers.channel)
    seen: Counter[tuple[int, int]] = Counter()
    for _ in range(10):
        start_us = platform.now_us - int(random.integers(1, 16 * DAY_US))
        arguments = {
            "entities": [str(d) for d in random.permutation(DEVICES)[: random.integers(1, 4)]],
            "attributes": [str(a) for a in random.permutation(ATTRIBUTES)[: random.integers(1, 3)]],
            "start_time_us": start_us,
            "end_time_us": start_us + int(random.integers(1, 16 * DAY_US)),
            "descending": bool(random.integers(0, 2)),
            "limit_per_series": int(random.choice([0, 3])),
        }
        for tier in TIERS:
            freshness = query_pb2.Freshness(tier=tier)  # type: ignore[arg-type]
            request = query_pb2.ReadSeriesRequest(**arguments, freshness=freshness, page_size=50)
            paged: list[Any] = []
            while True:
                page = await ask(tiers.channel, TENANT, request)
                seen[tier, page.provenance.source] += 1
                paged += rows_of(page.series)
                request.page_token = page.next_page_token
                if not request.page_token:
                    break
            assert paged == expected(platform, **arguments)
            exported: list[Any] = []
            async for message in stub.ExportSeries(
                query_pb2.ExportSeriesRequest(**arguments, freshness=freshness, chunk_size=40),
                metadata=metadata(TENANT),
                timeout=PATIENCE_S,
            ):
                exported += rows_of(message.series)
                if message.HasField("summary"):
                    seen[tier, message.summary.provenance.source] += 1
            assert exported == paged
    assert {source for tier, source in seen if tier == CRITICAL} == {PRIMARY}
    assert {source for tier, source in seen if tier == ANALYTICS} == {WAREHOUSE}


def rows_of(found: Any) -> list[tuple[str, str, int, Any]]:
    return [
        (s.entity, s.attribute, time_us, value)
        for s in found
        for time_us, value in zip(s.times_us, s.double_values or s.string_values, strict=True)
    ]


def expected(platform: Platform, **asked: Any) -> list[tuple[str, str, int, Any]]:
    order = -1 if asked["descending"] else 1
    rows = []
    for device in sorted(asked["entities"])[::order]:
        for attribute in sorted(asked["attributes"], key=platform.attributes.__getitem__)[::order]:
            run = platform.readings.get((device, attribute), {})
            times = [t for t in sorted(run) if asked["start_time_us"] <= t < asked["end_time_us"]][::order]
            rows += [(device, attribute, t, run[t][0]) for t in times[: asked["limit_per_series"] or None]]
    return rows


async def test_no_method_asks_the_primary_for_analytics(platform: Platform, tiers: RunningGateway) -> None:
    day = {"start_time_us": platform.now_us - 10 * DAY_US, "end_time_us": platform.now_us}
    freshness = query_pb2.Freshness(tier=ANALYTICS)
    asked: list[tuple[Any, set[int]]] = [
        (query_pb2.GetLatestRequest(entity="d1", freshness=freshness), {REPLICA}),
        (query_pb2.BatchGetLatestRequest(entities=DEVICES, freshness=freshness), {REPLICA}),
        (query_pb2.FindEntitiesRequest(filter="temperature > -100", freshness=freshness), {REPLICA}),
        (query_pb2.ListEntitiesRequest(freshness=freshness), {REPLICA}),
        (query_pb2.ListAttributesRequest(freshness=freshness), {REPLICA}),
        (
            query_pb2.ReadSeriesRequest(entities=["d1"], attributes=["temperature"], freshness=freshness, **day),
            {WAREHOUSE},
        ),
        (
            query_pb2.AggregateRequest(
                selection=query_pb2.Selection(filter='name starts with "d" and temperature > -100'),
                attributes=["temperature"],
                functions=[query_pb2.AGGREGATE_FUNCTION_MAX],
                freshness=freshness,
                **day,
            ),
            {WAREHOUSE},
        ),
    ]
    for request, sources in asked:
        answer = await ask(tiers.channel, TENANT, request)
        assert answer.provenance.source in sources, type(request).__name__
        assert not answer.provenance.degraded
        assert answer.provenance.staleness_us <= 900_000_000
    latest = await ask(tiers.channel, TENANT, asked[0][0])
    for value in latest.latest.values:
        time_us, (newest, _) = max(platform.readings["d1", value.attribute].items())
        assert (value.time_us, getattr(value.value, value.value.WhichOneof("kind"))) == (time_us, newest)


async def test_a_device_that_never_said_anything_costs_the_primary_nothing(
    platform: Platform, tiers: RunningGateway, pair: Pair
) -> None:
    platform.one("SELECT register_entity(%s, 'silent', '', '{}')", platform.tenant)
    pair.replica.wait_caught_up()
    day = {"start_time_us": platform.now_us - 10 * DAY_US, "end_time_us": platform.now_us}
    freshness = query_pb2.Freshness(tier=ANALYTICS, explain=True)
    series = query_pb2.ReadSeriesRequest(entities=["d1", "silent"], attributes=["state"], freshness=freshness, **day)
    total = query_pb2.AggregateRequest(
        selection=query_pb2.Selection(entities=["d1", "silent"]),
        attributes=["state"],
        functions=[query_pb2.AGGREGATE_FUNCTION_COUNT],
        freshness=freshness,
        **day,
    )
    answer = await ask(tiers.channel, TENANT, series)
    wanted = {
        t: v for t, (v, _) in platform.readings["d1", "state"].items() if day["start_time_us"] <= t < day["end_time_us"]
    }
    assert [(s.entity, dict(zip(s.times_us, s.string_values, strict=True))) for s in answer.series] == [("d1", wanted)]
    summed = await ask(tiers.channel, TENANT, total)
    assert list(summed.series[0].columns[0].int64_values) == [len(wanted)]
    for found in (answer, summed):
        assert found.provenance.source == WAREHOUSE
        assert not found.provenance.degraded
        assert "primary" not in {step.name for step in found.provenance.plan.steps}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        series.entities.append("nobody")
        await ask(tiers.channel, TENANT, series)
    assert refusal(caught.value) == ("NOT_FOUND", "ENTITY_NOT_FOUND", {"entity": "nobody"})


async def test_rollups_of_the_replica_come_before_the_warehouse(
    platform: Platform, tiers: RunningGateway, pair: Pair
) -> None:
    pool = rollup_pool(pair.primary.dsn(pair.name))
    await pool.open()
    try:
        await create_rollup(pool, platform.tenant, "climate", ["temperature"])
        worker = Worker(pool, 2, RollupConfig(dsn=pair.primary.dsn(pair.name)), MemoryMetrics())
        await worker.adopt()
        while (await find_rollup(pool, platform.tenant, "climate")).status.state != "serving":
            await worker.turn()
        await worker.turn()
    finally:
        await pool.close()
    pair.replica.wait_caught_up()
    fleet = fleet_of(platform)
    question = AggregateQuestion(
        Selection(DEVICES),
        ["temperature"],
        platform.now_us - 9 * DAY_US,
        platform.now_us,
        [Function.COUNT, Function.MEAN, Function.LAST],
        Bucket(BucketUnit.HOUR),
        by_entity=True,
        by_attribute=True,
    )
    for tier in (REPORT, ANALYTICS):
        message = await ask(tiers.channel, TENANT, request_of(question, tier))
        check(fleet, question, list(DEVICES), answer_of(message))
        assert message.provenance.source == ROLLUP
        assert [(s.name, s.failure) for s in message.provenance.plan.steps] == [("rollup", "")]
        (chosen,) = [c for c in message.provenance.plan.candidates if c.chosen]
        assert (chosen.source, chosen.name) == (ROLLUP, "rollups of replica-1")
    # What they do not answer goes on to the warehouse, and the plan tells why.
    message = await ask(
        tiers.channel,
        TENANT,
        request_of(
            AggregateQuestion(
                question.selection, ["state"], question.start_us, question.end_us, [Function.COUNT], by_attribute=True
            ),
            ANALYTICS,
        ),
    )
    assert message.provenance.source == WAREHOUSE
    assert [bool(s.failure) for s in message.provenance.plan.steps] == [True, False]
