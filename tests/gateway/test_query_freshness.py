"""What the query service says about freshness, exports, aggregates and searches, over a real connection."""

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from atlasco.telemetry.v1 import query_pb2

from gateway.query import QueryLimits
from gateway.query_freshness import TierBounds, need_of
from gateway.status import Refusal
from tests.gateway.test_query import ATTRIBUTE, SERVICE, Service, series_request, serve
from tests.storage.reads_database import DAY_US, Known, known_database
from tests.waiting import until


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Known]:
    with known_database(tmp_path_factory.mktemp("freshness")) as made:
        yield made


@pytest.fixture
async def service(known: Known) -> AsyncIterator[Service]:
    async with serve(known, QueryLimits()) as made:
        yield made


def export_request(known: Known, **changes: Any) -> query_pb2.ExportSeriesRequest:
    fields: dict[str, Any] = {
        "entities": known.names("acme"),
        "attributes": known.names("acme", "attributes"),
        "start_time_us": 1,
        "end_time_us": known.now_us + 1,
    }
    return query_pb2.ExportSeriesRequest(**{**fields, **changes})


def rows_of(found: Any) -> list[tuple[Any, ...]]:
    rows = []
    for series in found:
        values = series.double_values or series.int64_values or series.bool_values or series.string_values
        revisions = series.revisions or [0] * len(series.times_us)
        rows += [
            (series.entity, series.attribute, *row) for row in zip(series.times_us, values, revisions, strict=True)
        ]
    return rows


async def exported(service: Service, request: query_pb2.ExportSeriesRequest) -> list[query_pb2.ExportSeriesResponse]:
    return [message async for message in service.stub.ExportSeries(request, metadata=SERVICE)]


@pytest.mark.parametrize("changes", [{}, {"descending": True}, {"limit_per_series": 3}], ids=str)
async def test_an_export_is_the_pages_as_one_stream(known: Known, service: Service, changes: dict[str, Any]) -> None:
    request = series_request(
        known,
        entities=known.names("acme"),
        attributes=known.names("acme", "attributes"),
        page_size=50_000,
        **changes,
    )
    page = await service.ask(request)
    assert not page.next_page_token
    messages = await exported(service, export_request(known, chunk_size=37, **changes))
    first, *between, last = messages
    assert first.provenance.source == query_pb2.Provenance.SOURCE_PRIMARY
    assert all(1 <= sum(len(s.times_us) for s in message.series) <= 37 for message in between)
    rows = [row for message in between for row in rows_of(message.series)]
    # The start of the retention may have moved on by a reading.
    assert repr(rows) == repr(rows_of(page.series))
    assert last.summary.readings == len(rows)
    # The beginning of the range is past retention, and the whole says so.
    assert [d.reason for d in last.summary.provenance.degraded] == [query_pb2.Degradation.REASON_RANGE_CUT]
    assert last.summary.provenance.as_of_us == first.provenance.as_of_us


async def test_an_export_that_is_given_up_leaves_the_pool_whole(known: Known, service: Service) -> None:
    for _ in range(8):
        call = service.stub.ExportSeries(export_request(known, chunk_size=1), metadata=SERVICE)
        async for _message in call:
            break
        call.cancel()
    answers = await asyncio.gather(*(service.ask(query_pb2.ListAttributesRequest()) for _ in range(8)))
    assert all(answer.attributes for answer in answers)
    await until(lambda: service.pool.get_stats()["pool_available"] == service.pool.get_stats()["pool_size"])


@pytest.mark.parametrize(
    ("changes", "code", "reason", "metadata"),
    [
        ({"entities": ["ghost"]}, "NOT_FOUND", "ENTITY_NOT_FOUND", {"entity": "ghost"}),
        ({"attributes": ["nope"]}, "NOT_FOUND", "ATTRIBUTE_NOT_FOUND", {"attribute": "nope"}),
        ({"chunk_size": -1}, "INVALID_ARGUMENT", "FIELD_INVALID", {"field": "chunk_size"}),
        ({"limit_per_series": -1}, "INVALID_ARGUMENT", "FIELD_INVALID", {"field": "limit_per_series"}),
        ({"start_time_us": 9, "end_time_us": 8}, "INVALID_ARGUMENT", "RANGE_INVERTED", {}),
    ],
)
async def test_a_bad_export_is_refused_by_type(
    known: Known, service: Service, changes: dict[str, Any], code: str, reason: str, metadata: dict[str, str]
) -> None:
    call = service.stub.ExportSeries(export_request(known, **changes), metadata=SERVICE)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    service.stub.Again = lambda *_, **__: _raise(caught.value)
    found = await service.refusal(type("AgainRequest", (), {})())
    assert found == (code, reason, metadata)


async def _raise(error: Exception) -> None:
    raise error


async def test_a_retired_range_is_refused_not_empty(known: Known, service: Service) -> None:
    request = series_request(known, end_time_us=known.now_us - 9 * DAY_US)
    code, reason, metadata = await service.refusal(request)
    assert (code, reason) == ("FAILED_PRECONDITION", "RANGE_RETIRED")
    assert known.now_us - 8 * DAY_US <= int(metadata["complete_from_us"]) < known.now_us


async def test_a_page_token_survives_another_freshness(known: Known, service: Service) -> None:
    request = series_request(known, page_size=1)
    first = await service.ask(request)
    request.page_token = first.next_page_token
    request.freshness.tier = query_pb2.TIER_ANALYTICS
    second = await service.ask(request)
    assert second.series[0].times_us[0] > first.series[0].times_us[0]
    reasons = [d.reason for d in second.provenance.degraded]
    assert query_pb2.Degradation.REASON_NO_WAREHOUSE in reasons


async def test_freshness_of_a_gateway_with_a_primary_only(service: Service) -> None:
    found = await service.ask(query_pb2.GetFreshnessRequest())
    assert [s.name for s in found.sources] == ["primary"]
    assert {t.tier: t.max_staleness_us for t in found.tiers} == {
        query_pb2.TIER_CRITICAL: 0,
        query_pb2.TIER_DASHBOARD: 100_000,
        query_pb2.TIER_REPORT: 30_000_000,
        query_pb2.TIER_ANALYTICS: 900_000_000,
    }
    assert {t.scan_source for t in found.tiers} == {query_pb2.Provenance.SOURCE_PRIMARY}


async def test_aggregates_equal_the_readings(known: Known, service: Service) -> None:
    attribute = known.names("acme", "attributes")[1]
    start_us = known.now_us - 7 * DAY_US
    request = query_pb2.AggregateRequest(
        attributes=[attribute],
        start_time_us=start_us,
        end_time_us=known.now_us + 1,
        functions=[query_pb2.AGGREGATE_FUNCTION_COUNT, query_pb2.AGGREGATE_FUNCTION_MAX],
        group_by=[query_pb2.AGGREGATE_GROUP_ENTITY],
    )
    answer = await service.ask(request)
    expected = {}
    for (tenant, entity, name), readings in known.readings.items():
        values = [v for t, (v, _) in readings.items() if start_us <= t <= known.now_us]
        if (tenant, name) == ("acme", attribute) and values:
            expected[entity] = (len(values), max(values))
    found = {s.entity: (s.columns[0].int64_values[0], s.columns[1].int64_values[0]) for s in answer.series}
    assert found == expected
    assert answer.provenance.source == query_pb2.Provenance.SOURCE_PRIMARY


async def test_devices_are_found_by_their_values(known: Known, service: Service) -> None:
    request = query_pb2.FindEntitiesRequest(
        filter=f'type = "pump" AND attributes.{ATTRIBUTE}:*', attributes=[ATTRIBUTE], page_size=2
    )
    found: list[Any] = []
    while True:
        page = await service.ask(request)
        found += page.entities
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    oldest_us = page.provenance.complete_from_us
    expected = sorted(
        name
        for (tenant, name), (kind, _) in known.entities.items()
        if (tenant, kind) == ("acme", "pump") and max(known.readings.get(("acme", name, ATTRIBUTE), [0])) >= oldest_us
    )
    assert [f.entity.name for f in found] == expected
    for device in found:
        readings = known.readings["acme", device.entity.name, ATTRIBUTE]
        (value, _), got = readings[max(readings)], device.values[0].value.double_value
        assert got == value or (math.isnan(got) and math.isnan(value))


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (query_pb2.FindEntitiesRequest(filter="type = "), "FILTER_INVALID"),
        (query_pb2.FindEntitiesRequest(filter=f'{ATTRIBUTE} = "text"'), "FILTER_INVALID"),
        pytest.param(query_pb2.FindEntitiesRequest(filter="x" * 5000), "FILTER_INVALID", id="long filter"),
        (query_pb2.AggregateRequest(attributes=["attribute-3"], functions=[4]), "AGGREGATE_TYPE"),
        (query_pb2.AggregateRequest(attributes=[ATTRIBUTE], functions=[1, 1]), "FIELD_INVALID"),
        (query_pb2.AggregateRequest(attributes=[ATTRIBUTE], functions=[9]), "FIELD_INVALID"),
        (
            query_pb2.AggregateRequest(attributes=[ATTRIBUTE], functions=[1], bucket=query_pb2.Bucket(unit=1, width=7)),
            "FIELD_INVALID",
        ),
        (
            query_pb2.AggregateRequest(
                attributes=[ATTRIBUTE], functions=[1], bucket=query_pb2.Bucket(unit=4, time_zone="Mars/Olympus")
            ),
            "TIME_ZONE_UNKNOWN",
        ),
        (
            query_pb2.AggregateRequest(attributes=[ATTRIBUTE], functions=[1], bucket=query_pb2.Bucket(unit=1)),
            "TOO_MANY_POINTS",
        ),
    ],
    ids=str,
)
async def test_bad_searches_and_aggregates_are_refused_by_type(
    known: Known, service: Service, request_: Any, reason: str
) -> None:
    if isinstance(request_, query_pb2.AggregateRequest):
        request_.start_time_us, request_.end_time_us = known.now_us - 6 * DAY_US, known.now_us
    code, got, _ = await service.refusal(request_)
    assert (code, got) == ("INVALID_ARGUMENT", reason)


def test_tiers_and_bounds() -> None:
    tiers = TierBounds().microseconds()
    assert need_of(query_pb2.Freshness(), tiers).max_staleness_us == 0
    assert need_of(query_pb2.Freshness(tier=query_pb2.TIER_REPORT), tiers).max_staleness_us == 30_000_000
    assert need_of(query_pb2.Freshness(max_staleness_us=7), tiers).max_staleness_us == 7
    assert need_of(query_pb2.Freshness(read_token=b"\0" * 7 + b"\5"), tiers).token == 5
    with pytest.raises(Refusal):
        need_of(query_pb2.Freshness(max_staleness_us=-1), tiers)
