"""Searches, aggregates, declarations and deletions through a gateway, with a worker beside it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from atlasco.telemetry.v1 import admin_pb2, admin_pb2_grpc, query_pb2, query_pb2_grpc

from runtime.metrics import MemoryMetrics
from runtime.process import Shutdown
from storage.filter.syntax import MAX_BYTES
from storage.rollup.config import RollupConfig
from storage.rollup.service import RollupProcess
from tests.gateway.running_gateway import RunningGateway, running_gateway
from tests.refusals import refused
from tests.search.fleet import HOUR_US, TENANT, Fleet, store_readings
from tests.storage.conftest import Database
from tests.waiting import until

SERVICE = (("atlasco-tenant", TENANT), ("atlasco-service", "tests"))
DEVICE = (("atlasco-tenant", TENANT), ("atlasco-device", "device-0001"))
REPORT = query_pb2.Freshness(tier=query_pb2.TIER_REPORT, explain=True)
Source = query_pb2.Provenance


@pytest.fixture(scope="module")
async def working(
    fleet_database: Database, fleet: Fleet, owner: psycopg.Connection[Any]
) -> "AsyncIterator[asyncio.Task[None]]":
    """The worker."""
    readings = {fleet.now_us - minute * 60_000_000: float(minute) for minute in range(600)}
    store_readings(owner, fleet, "device-0001", "temperature", readings)
    stopping = Shutdown()
    process = RollupProcess(RollupConfig(dsn=fleet_database(), lease_s=2.0, poll_s=0.05, settle_s=0.0), MemoryMetrics())
    working = asyncio.create_task(process.run(stopping))
    yield working
    stopping.request("test")
    await working


@pytest.fixture(scope="module")
async def gateway(fleet_database: Database, working: "asyncio.Task[None]") -> AsyncIterator[RunningGateway]:
    async with running_gateway(fleet_database) as running:
        yield running


@pytest.fixture
def query(gateway: RunningGateway) -> Any:
    return query_pb2_grpc.QueryServiceStub(gateway.channel)


@pytest.fixture
def admin(gateway: RunningGateway) -> Any:
    return admin_pb2_grpc.AdminServiceStub(gateway.channel)


def known_of(answer: Any) -> list[tuple[Any, ...]]:
    """What an answer says of its devices, their ages aside."""
    return [
        (f.entity.name, *((v.attribute, v.time_us, v.value.int64_value) for v in f.values)) for f in answer.entities
    ]


def aggregate_request(fleet: Fleet, **changes: Any) -> query_pb2.AggregateRequest:
    given = {
        "attributes": ["temperature"],
        "functions": [query_pb2.AGGREGATE_FUNCTION_MEAN],
        "start_time_us": fleet.now_us - 72 * HOUR_US,
        "end_time_us": fleet.now_us,
        **changes,
    }
    return query_pb2.AggregateRequest(**given)


async def test_a_projection_is_declared_filled_and_used(
    query: Any, admin: Any, fleet: Fleet, working: "asyncio.Task[None]"
) -> None:
    request = query_pb2.FindEntitiesRequest(
        filter='count:* and not status = "idle"', attributes=["count"], page_size=10, freshness=REPORT
    )
    from_latest = await query.FindEntities(request, metadata=SERVICE)
    wanted = admin_pb2.Projection(name="wide", attributes=["temperature", "count", "status"])
    created = await admin.CreateProjection(admin_pb2.CreateProjectionRequest(projection=wanted), metadata=SERVICE)
    assert created.projection.create_time_us

    async def serving() -> bool:
        found = await admin.GetProjection(admin_pb2.GetProjectionRequest(name="wide"), metadata=SERVICE)
        return bool(found.projection.status.state == admin_pb2.MATERIALIZATION_STATE_SERVING)

    await until(serving, "the projection is filled", beside=working)
    answers: list[query_pb2.FindEntitiesResponse] = []

    async def used() -> bool:
        answers.append(await query.FindEntities(request, metadata=SERVICE))
        return bool(answers[-1].provenance.source == Source.SOURCE_PROJECTION)

    await until(used, "the projection is used", beside=working)
    answer = answers[-1]
    assert known_of(answer) == known_of(from_latest)
    assert len(answer.entities) == 10
    assert 0 <= answer.provenance.staleness_us <= 30_000_000
    request.page_token = answer.next_page_token
    following = await query.FindEntities(request, metadata=SERVICE)
    assert following.entities[0].entity.name > answer.entities[-1].entity.name
    request.ClearField("freshness")
    critical = await query.FindEntities(request, metadata=SERVICE)
    assert critical.provenance.source == Source.SOURCE_PRIMARY
    listed = await admin.ListProjections(admin_pb2.ListProjectionsRequest(), metadata=SERVICE)
    assert [p.name for p in listed.projections] == ["wide"]
    await admin.DropProjection(admin_pb2.DropProjectionRequest(name="wide"), metadata=SERVICE)
    dropped = await query.FindEntities(request, metadata=SERVICE)
    assert known_of(dropped) == known_of(following)


async def test_a_rollup_is_declared_filled_and_used(
    query: Any, admin: Any, fleet: Fleet, working: "asyncio.Task[None]"
) -> None:
    request = query_pb2.AggregateRequest(
        selection=query_pb2.Selection(entities=["device-0001"]),
        attributes=["temperature"],
        start_time_us=fleet.now_us - 9 * HOUR_US,
        end_time_us=fleet.now_us,
        bucket=query_pb2.Bucket(unit=query_pb2.BUCKET_UNIT_HOUR, time_zone="Europe/Berlin"),
        functions=[
            query_pb2.AGGREGATE_FUNCTION_COUNT, query_pb2.AGGREGATE_FUNCTION_MEAN, query_pb2.AGGREGATE_FUNCTION_STDDEV,
        ],
        group_by=[query_pb2.AGGREGATE_GROUP_ENTITY],
    )  # fmt: skip
    exact = await query.Aggregate(request, metadata=SERVICE)
    assert exact.provenance.source == Source.SOURCE_PRIMARY
    (series,) = exact.series
    assert series.entity == "device-0001"
    assert sum(series.columns[0].int64_values) == 540
    wanted = admin_pb2.Rollup(name="hours", attributes=["temperature"])
    await admin.CreateRollup(admin_pb2.CreateRollupRequest(rollup=wanted), metadata=SERVICE)
    request.freshness.CopyFrom(REPORT)
    answers: list[query_pb2.AggregateResponse] = []

    async def used() -> bool:
        answers.append(await query.Aggregate(request, metadata=SERVICE))
        return bool(answers[-1].provenance.source == Source.SOURCE_ROLLUP)

    await until(used, "the rollup is used", beside=working)
    rolled = answers[-1].series[0]
    assert rolled.bucket_times_us == series.bucket_times_us
    assert rolled.columns[0] == series.columns[0]
    for place in (1, 2):
        assert rolled.columns[place].double_values == pytest.approx(
            series.columns[place].double_values, rel=1e-9, nan_ok=True
        )
    listed = await admin.ListRollups(admin_pb2.ListRollupsRequest(), metadata=SERVICE)
    assert [r.name for r in listed.rollups] == ["hours"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"filter": "count >"}, ("INVALID_ARGUMENT", "FILTER_INVALID", "position", "7")),
        ({"filter": "count >"}, ("INVALID_ARGUMENT", "FILTER_INVALID", "field", "filter")),
        ({"filter": 'count = "3"'}, ("INVALID_ARGUMENT", "FILTER_INVALID", "field", "filter")),
        ({"filter": " " * (MAX_BYTES + 1)}, ("INVALID_ARGUMENT", "FILTER_INVALID", "field", "filter")),
        ({"filter": "none = 3"}, ("NOT_FOUND", "ATTRIBUTE_NOT_FOUND", "attribute", "none")),
        ({"attributes": ["history only"]}, ("FAILED_PRECONDITION", "LATEST_NOT_KEPT", "attribute", "history only")),
        ({"page_size": -1}, ("INVALID_ARGUMENT", "FIELD_INVALID", "field", "page_size")),
        ({"page_token": "x"}, ("INVALID_ARGUMENT", "PAGE_TOKEN_INVALID", "field", "page_token")),
    ],
)
async def test_bad_searches(query: Any, changes: dict[str, Any], expected: tuple[str, ...]) -> None:
    code, reason, metadata = await refused(
        query.FindEntities(query_pb2.FindEntitiesRequest(**changes), metadata=SERVICE)
    )
    assert (code, reason, metadata[expected[2]]) == (*expected[:2], expected[3])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attributes": []}, "FIELD_INVALID"),
        ({"attributes": ["none"]}, "ATTRIBUTE_NOT_FOUND"),
        ({"attributes": ["status"]}, "AGGREGATE_TYPE"),
        ({"functions": []}, "FIELD_INVALID"),
        ({"functions": [99]}, "FIELD_INVALID"),
        ({"percentiles": [50]}, "FIELD_INVALID"),
        ({"functions": [9]}, "FIELD_INVALID"),
        ({"functions": [9], "percentiles": [101]}, "FIELD_INVALID"),
        ({"start_time_us": 0}, "RANGE_UNBOUNDED"),
        ({"end_time_us": 5}, "RANGE_INVERTED"),
        ({"bucket": query_pb2.Bucket()}, "FIELD_INVALID"),
        ({"bucket": query_pb2.Bucket(unit=1, width=7)}, "FIELD_INVALID"),
        ({"bucket": query_pb2.Bucket(unit=1, time_zone="Moon")}, "TIME_ZONE_UNKNOWN"),
        ({"bucket": query_pb2.Bucket(unit=1)}, "TOO_MANY_POINTS"),
        ({"group_by": [1, 1]}, "FIELD_INVALID"),
        ({"group_by": [0]}, "FIELD_INVALID"),
        ({"group_by": [7]}, "FIELD_INVALID"),
        ({"group_by": [1, 7]}, "FIELD_INVALID"),
        ({"selection": query_pb2.Selection(entities=["none"])}, "ENTITY_NOT_FOUND"),
    ],
)
async def test_bad_aggregates(query: Any, fleet: Fleet, changes: dict[str, Any], reason: str) -> None:
    request = aggregate_request(fleet, **changes)
    assert (await refused(query.Aggregate(request, metadata=SERVICE)))[1] == reason


@pytest.mark.parametrize(
    ("selection", "reason", "field"),
    [
        pytest.param({"filter": "("}, "FILTER_INVALID", "selection.filter", id="syntax"),
        pytest.param({"filter": 'count = "3"'}, "FILTER_INVALID", "selection.filter", id="type"),
        pytest.param({"filter": " " * (MAX_BYTES + 1)}, "FILTER_INVALID", "selection.filter", id="length"),
        pytest.param({"labels": {"": "x"}}, "FIELD_INVALID", "selection.labels", id="label"),
        pytest.param({"entity_type": "\0"}, "FIELD_INVALID", "selection.entity_type", id="entity type"),
        pytest.param({"entities": ["a", "a"]}, "FIELD_INVALID", "selection.entities[1]", id="entity"),
    ],
)
async def test_a_bad_selection_is_named_as_the_request_has_it(
    query: Any, fleet: Fleet, selection: dict[str, Any], reason: str, field: str
) -> None:
    request = aggregate_request(fleet, selection=query_pb2.Selection(**selection))
    refusal = await refused(query.Aggregate(request, metadata=SERVICE))
    assert (refusal[1], refusal[2]["field"]) == (reason, field)


async def test_an_aggregate_of_too_much_text_says_so(query: Any, fleet: Fleet, owner: psycopg.Connection[Any]) -> None:
    """More than a message may hold, if it were sent."""
    texts = {fleet.now_us - second * 1_000_000: "x" * 4_096 for second in range(9_000)}
    store_readings(owner, fleet, "device-0003", "odd name", texts)
    request = query_pb2.AggregateRequest(
        selection=query_pb2.Selection(entities=["device-0003"]),
        attributes=["odd name"],
        functions=[query_pb2.AGGREGATE_FUNCTION_FIRST, query_pb2.AGGREGATE_FUNCTION_LAST],
        start_time_us=fleet.now_us - 3 * HOUR_US,
        end_time_us=fleet.now_us + 1,
        bucket=query_pb2.Bucket(unit=query_pb2.BUCKET_UNIT_SECOND),
    )
    refusal = await refused(query.Aggregate(request, metadata=SERVICE))
    assert refusal == ("INVALID_ARGUMENT", "TOO_MUCH_TEXT", {"limit": "8388608"})


async def test_a_device_is_deleted_and_bad_orders_are_refused(
    query: Any, admin: Any, fleet: Fleet, working: "asyncio.Task[None]"
) -> None:
    order = admin_pb2.DeleteEntityRequest(entity="device-0002", request_id=uuid4().bytes)
    assert (await refused(admin.DeleteEntity(order, metadata=DEVICE)))[1] == "SERVICE_REQUIRED"
    ordered = (await admin.DeleteEntity(order, metadata=SERVICE)).operation
    assert ordered.operation_id == order.request_id
    assert (await admin.DeleteEntity(order, metadata=SERVICE)).operation.create_time_us == ordered.create_time_us

    async def succeeded() -> bool:
        found = await admin.GetOperation(
            admin_pb2.GetOperationRequest(operation_id=ordered.operation_id), metadata=SERVICE
        )
        return bool(found.operation.state == admin_pb2.Operation.STATE_SUCCEEDED)

    await until(succeeded, "the device is deleted", beside=working)
    gone = await query.FindEntities(query_pb2.FindEntitiesRequest(filter='name = "device-0002"'), metadata=SERVICE)
    assert not gone.entities
    listed = await admin.ListOperations(admin_pb2.ListOperationsRequest(page_size=1), metadata=SERVICE)
    assert [o.entity for o in listed.operations] == ["device-0002"]
    for request, reason in (
        (admin_pb2.DeleteEntityRequest(entity="none", request_id=uuid4().bytes), "ENTITY_NOT_FOUND"),
        (admin_pb2.DeleteEntityRequest(entity="device-0003", request_id=b"x"), "FIELD_INVALID"),
        (admin_pb2.DeleteEntityRequest(entity="device-0003", request_id=order.request_id), "FIELD_INVALID"),
    ):
        assert (await refused(admin.DeleteEntity(request, metadata=SERVICE)))[1] == reason
    missing = admin_pb2.GetOperationRequest(operation_id=uuid4().bytes)
    assert (await refused(admin.GetOperation(missing, metadata=SERVICE)))[1] == "OPERATION_NOT_FOUND"
    bad = admin_pb2.CreateRollupRequest(rollup=admin_pb2.Rollup(name="x", attributes=["status"]))
    assert (await refused(admin.CreateRollup(bad, metadata=SERVICE)))[1] == "AGGREGATE_TYPE"


async def test_a_projection_with_a_bad_type_is_refused(admin: Any) -> None:
    wanted = admin_pb2.Projection(name="x", entity_type="\0", attributes=["count"])
    refusal = await refused(
        admin.CreateProjection(admin_pb2.CreateProjectionRequest(projection=wanted), metadata=SERVICE)
    )
    assert refusal[1:] == ("FIELD_INVALID", {"field": "projection.entity_type"})
