"""The query service over a real connection and a real database."""

import math
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import grpc
import psycopg
import pytest
from atlasco.telemetry.v1 import common_pb2, query_pb2, query_pb2_grpc

from gateway.auth import DevelopmentAuthenticator
from gateway.query import QueryLimits, QueryServicer
from router.clock import PrimaryClock
from router.database import DatabaseSource
from router.execute import Router
from runtime.config import Address
from runtime.metrics import MemoryMetrics
from storage.database import Pool, PoolSettings, Role, make_pool
from storage.reads.tenants import TenantDirectory
from tests.refusals import End, end_of, refused
from tests.storage.reads_database import Known, known_database, register_attribute, register_entity, store
from tests.waiting import PATIENCE_S, until

SERVICE = (("atlasco-tenant", "acme"), ("atlasco-service", "test"))
DEVICE = (("atlasco-tenant", "acme"), ("atlasco-device", "device-1"))
ATTRIBUTE = "attribute-0"


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Known]:
    with known_database(tmp_path_factory.mktemp("query")) as made:
        yield made


@dataclass
class Service:
    stub: Any
    pool: Pool
    metrics: MemoryMetrics

    async def ask(self, request: Any, metadata: Any = SERVICE, **options: Any) -> Any:
        """The answer; the method follows from the request's type."""
        method = type(request).__name__.removesuffix("Request")
        return await getattr(self.stub, method)(request, metadata=metadata, **options)

    async def refusal(self, request: Any, metadata: Any = SERVICE, **options: Any) -> tuple[str, str, dict[str, str]]:
        """(code, reason, metadata) of the refusal, which must be typed."""
        return await refused(self.ask(request, metadata, **options))


@pytest.fixture
async def service(known: Known) -> AsyncIterator[Service]:
    async with serve(known, QueryLimits()) as made:
        yield made


class serve:  # noqa: N801 - reads as a function
    """A gateway of nothing but the query service; `options` are of the client's channel."""

    def __init__(self, known: Known, limits: QueryLimits, options: Sequence[tuple[str, int]] = ()) -> None:
        self._known = known
        self._limits = limits
        self._options = list(options)

    async def __aenter__(self) -> Service:
        self._pool = make_pool(PoolSettings(self._known.dsn("reader"), Role.QUERY, max_size=4))
        await self._pool.open()
        metrics = MemoryMetrics()
        clock = PrimaryClock()
        self._server = grpc.aio.server()
        query_pb2_grpc.add_QueryServiceServicer_to_server(
            QueryServicer(
                Router(DatabaseSource(self._pool, TenantDirectory(), clock), clock),
                clock,
                DevelopmentAuthenticator(Address("127.0.0.1", 0)),
                metrics,
                limits=self._limits,
            ),
            self._server,
        )
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=self._options)
        stub: Any = query_pb2_grpc.QueryServiceStub(self._channel)
        return Service(stub, self._pool, metrics)

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()
        await self._server.stop(0)
        await self._pool.close()


def series_request(known: Known, **changes: Any) -> query_pb2.ReadSeriesRequest:
    fields: dict[str, Any] = {
        "entities": ["device-1"],
        "attributes": [ATTRIBUTE],
        "start_time_us": 1,
        "end_time_us": known.now_us + 1,
    }
    return query_pb2.ReadSeriesRequest(**{**fields, **changes})


async def test_a_series_of_every_type_comes_back_typed(known: Known, service: Service) -> None:
    request = series_request(known, entities=known.names("acme"), attributes=known.names("acme", "attributes"))
    request.page_size = 77
    seen: dict[tuple[str, str], list[tuple[int, Any, int]]] = {}
    while True:
        page = await service.ask(request)
        assert sum(len(s.times_us) for s in page.series) <= 77
        assert page.provenance.source == query_pb2.Provenance.SOURCE_PRIMARY
        for series in page.series:
            columns = [series.double_values, series.int64_values, series.bool_values, series.string_values]
            (values,) = [c for c in columns if c]
            assert columns.index(values) == series.type - common_pb2.ATTRIBUTE_TYPE_DOUBLE
            revisions = series.revisions or [0] * len(values)
            rows = seen.setdefault((series.entity, series.attribute), [])
            rows += zip(series.times_us, values, revisions, strict=True)
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    oldest = page.provenance.as_of_us - 8 * 86_400_000_000
    for (tenant, entity, attribute), readings in known.readings.items():
        if tenant != "acme":
            continue
        expected = [(t, *readings[t]) for t in sorted(readings) if t >= oldest]
        assert repr(seen.get((entity, attribute), [])) == repr(expected)


async def test_latest_values(known: Known, service: Service) -> None:
    one = await service.ask(query_pb2.GetLatestRequest(entity="device-1"))
    batch = await service.ask(query_pb2.BatchGetLatestRequest(entities=["ghost", "device-1", "device-0"]))
    assert [e.entity for e in batch.latest] == ["device-1", "device-0"]
    assert list(batch.not_found) == ["ghost"]
    assert repr(one.latest.values[0].value) == repr(batch.latest[0].values[0].value)
    kinds = {"double": "double_value", "bigint": "int64_value", "boolean": "bool_value", "text": "string_value"}
    for latest in one.latest.values:
        readings = known.readings["acme", "device-1", latest.attribute]
        value, _ = readings[max(readings)]
        kind = kinds[known.attributes["acme", latest.attribute]]
        assert latest.value.WhichOneof("kind") == kind
        got = getattr(latest.value, kind)
        assert got == value or (math.isnan(got) and math.isnan(value))
        assert latest.age_us == one.provenance.as_of_us - latest.time_us


async def test_lists(known: Known, service: Service) -> None:
    request = query_pb2.ListEntitiesRequest(entity_type="pump", labels={"site": "s1"}, page_size=1)
    found = []
    while True:
        page = await service.ask(request)
        found += page.entities
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert [e.name for e in found] == sorted(
        name
        for (tenant, name), (kind, labels) in known.entities.items()
        if (tenant, kind, labels.get("site")) == ("acme", "pump", "s1")
    )
    assert dict(found[0].labels)["line"] == "north"
    attributes = (await service.ask(query_pb2.ListAttributesRequest())).attributes
    assert attributes[0].name == ATTRIBUTE
    assert attributes[0].type == common_pb2.ATTRIBUTE_TYPE_DOUBLE
    assert (attributes[0].unit, attributes[0].keeps_latest) == ("u", True)


BAD: dict[str, tuple[Any, str, str, dict[str, str]]] = {
    "latest of nothing": (query_pb2.GetLatestRequest(), "INVALID_ARGUMENT", "FIELD_INVALID", {"field": "entity"}),
    "name too long": (
        query_pb2.GetLatestRequest(entity="x" * 129),
        "INVALID_ARGUMENT",
        "FIELD_INVALID",
        {"field": "entity"},
    ),
    "NUL in a name": (
        query_pb2.GetLatestRequest(entity="a\0b"),
        "INVALID_ARGUMENT",
        "FIELD_INVALID",
        {"field": "entity"},
    ),
    "unknown device": (
        query_pb2.GetLatestRequest(entity="ghost"),
        "NOT_FOUND",
        "ENTITY_NOT_FOUND",
        {"entity": "ghost"},
    ),
    "unknown attribute": (
        query_pb2.GetLatestRequest(entity="device-1", attributes=["nope"]),
        "NOT_FOUND",
        "ATTRIBUTE_NOT_FOUND",
        {"attribute": "nope"},
    ),
    "empty attribute": (
        query_pb2.GetLatestRequest(entity="device-1", attributes=[ATTRIBUTE, ""]),
        "INVALID_ARGUMENT",
        "FIELD_INVALID",
        {"field": "attributes[1]"},
    ),
    "no devices": (query_pb2.BatchGetLatestRequest(), "INVALID_ARGUMENT", "FIELD_INVALID", {"field": "entities"}),
    "device twice": (
        query_pb2.BatchGetLatestRequest(entities=["a", "b", "a"]),
        "INVALID_ARGUMENT",
        "FIELD_INVALID",
        {"field": "entities[2]"},
    ),
    "too many devices": (
        query_pb2.BatchGetLatestRequest(entities=[str(n) for n in range(1001)]),
        "INVALID_ARGUMENT",
        "FIELD_INVALID",
        {"field": "entities"},
    ),
    "negative page size": (
        query_pb2.ListEntitiesRequest(page_size=-1),
        "INVALID_ARGUMENT",
        "FIELD_INVALID",
        {"field": "page_size"},
    ),
    "foreign page token": (
        query_pb2.ListEntitiesRequest(page_token="Zm9yZ2Vk"),
        "INVALID_ARGUMENT",
        "PAGE_TOKEN_INVALID",
        {"field": "page_token"},
    ),
    "empty label": (
        query_pb2.ListEntitiesRequest(labels={"": "x"}),
        "INVALID_ARGUMENT",
        "FIELD_INVALID",
        {"field": "labels"},
    ),
    "NUL in a label": (
        query_pb2.ListEntitiesRequest(labels={"a": "\0"}),
        "INVALID_ARGUMENT",
        "FIELD_INVALID",
        {"field": "labels"},
    ),
    "NUL in a type": (
        query_pb2.ListEntitiesRequest(entity_type="\0"),
        "INVALID_ARGUMENT",
        "FIELD_INVALID",
        {"field": "entity_type"},
    ),
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_requests_are_refused_by_type(service: Service, case: str) -> None:
    request, code, reason, metadata = BAD[case]
    assert await service.refusal(request) == (code, reason, metadata)


@pytest.mark.parametrize(
    ("changes", "reason", "field"),
    [
        ({"entities": []}, "FIELD_INVALID", "entities"),
        ({"attributes": []}, "FIELD_INVALID", "attributes"),
        ({"attributes": ["a", "a"]}, "FIELD_INVALID", "attributes[1]"),
        ({"attributes": [f"a{n}" for n in range(1001)]}, "FIELD_INVALID", "attributes"),
        ({"start_time_us": 0}, "RANGE_UNBOUNDED", "start_time_us"),
        ({"end_time_us": 0}, "RANGE_UNBOUNDED", "end_time_us"),
        ({"start_time_us": -5}, "FIELD_INVALID", "start_time_us"),
        ({"start_time_us": 9, "end_time_us": 9}, "RANGE_INVERTED", None),
        ({"start_time_us": 9, "end_time_us": 8}, "RANGE_INVERTED", None),
        ({"page_size": -1}, "FIELD_INVALID", "page_size"),
        ({"page_token": "AAAA"}, "PAGE_TOKEN_INVALID", "page_token"),
    ],
)
async def test_bad_series_are_refused_by_type(
    known: Known, service: Service, changes: dict[str, Any], reason: str, field: str | None
) -> None:
    refusal = await service.refusal(series_request(known, **changes))
    assert refusal == ("INVALID_ARGUMENT", reason, {} if field is None else {"field": field})


async def test_a_token_is_for_its_own_question(known: Known, service: Service) -> None:
    request = series_request(known, entities=["device-1", "device-2"], page_size=1)
    token = (await service.ask(request)).next_page_token
    assert token
    other = series_request(known, entities=["device-2", "device-1"], page_token=token)
    assert (await service.refusal(other))[1] == "PAGE_TOKEN_INVALID"
    rival = (("atlasco-tenant", "rival"), ("atlasco-service", "test"))
    request.page_token = token
    assert (await service.refusal(request, rival))[1] == "PAGE_TOKEN_INVALID"


def register_anew(known: Known, name: str) -> None:
    """Delete a device of acme, to the end, and register another one by its name."""
    with psycopg.connect(known.dsn(), autocommit=True) as owner:
        tenant = known.tenants["acme"]
        owner.execute("SELECT delete_entity(%s, %s, %s)", [tenant, name, uuid.uuid4()])
        owner.execute("UPDATE entity_deletions SET step = 'done', ended_at = now()")
        owner.execute("SELECT register_entity(%s, %s, '', '{}')", [tenant, name])


@pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
async def test_pages_do_not_go_on_behind_a_device_that_was_replaced(
    known: Known, service: Service, descending: bool
) -> None:
    with psycopg.connect(known.dsn(), autocommit=True) as owner:
        names = [f"{order}-{descending}" for order in ("first", "second", "third")]
        for name in names:
            register_entity(owner, known, "acme", name)
            store(owner, known, "acme", name, ATTRIBUTE, {known.now_us - n: (float(n), 0) for n in range(1, 4)})
    request = series_request(known, entities=names, page_size=4, descending=descending)
    page = await service.ask(request)
    request.page_token = page.next_page_token
    ended_in = page.series[-1].entity
    assert ended_in == names[1]
    # Not the one in which the page ended: what follows is where it was.
    register_anew(known, page.series[0].entity)
    assert (await service.ask(request)).series[0].entity == ended_in
    register_anew(known, ended_in)
    assert await service.refusal(request) == ("ABORTED", "ENTITY_REPLACED", {"entity": ended_in})


async def test_the_whole_range_of_int64_is_a_range(known: Known, service: Service) -> None:
    page = await service.ask(series_request(known, end_time_us=2**63 - 1))
    assert page.series[0].times_us
    assert not (await service.ask(series_request(known, start_time_us=2**63 - 2, end_time_us=2**63 - 1))).series


async def test_latest_not_kept(known: Known, service: Service) -> None:
    with psycopg.connect(known.dsn(), autocommit=True) as owner:
        register_attribute(owner, known, "acme", "zz-log", "text", keeps_latest=False)
    refusal = await service.refusal(query_pb2.GetLatestRequest(entity="device-1", attributes=["zz-log"]))
    assert refusal == ("FAILED_PRECONDITION", "LATEST_NOT_KEPT", {"attribute": "zz-log"})


async def test_a_device_reads_itself_alone(known: Known, service: Service) -> None:
    assert (await service.ask(query_pb2.GetLatestRequest(entity="device-1"), DEVICE)).latest.values
    assert (await service.ask(series_request(known), DEVICE)).series
    for request in (
        query_pb2.GetLatestRequest(entity="device-2"),
        query_pb2.GetLatestRequest(entity="ghost"),
        query_pb2.BatchGetLatestRequest(entities=["device-1", "device-2"]),
        series_request(known, entities=["device-1", "device-2"]),
    ):
        assert (await service.refusal(request, DEVICE))[:2] == ("PERMISSION_DENIED", "DEVICE_MISMATCH")
    listed = await service.ask(query_pb2.ListEntitiesRequest(), DEVICE)
    assert [e.name for e in listed.entities] == ["device-1"]
    assert not (await service.ask(query_pb2.ListEntitiesRequest(entity_type="pump"), DEVICE)).entities


async def test_nobody_and_a_tenant_without_data(service: Service) -> None:
    assert (await service.refusal(query_pb2.ListEntitiesRequest(), ()))[0] == "UNAUTHENTICATED"
    fresh = (("atlasco-tenant", "fresh"), ("atlasco-service", "test"))
    assert not (await service.ask(query_pb2.ListEntitiesRequest(), fresh)).entities
    assert not (await service.ask(query_pb2.ListAttributesRequest(), fresh)).attributes
    refusal = await service.refusal(query_pb2.GetLatestRequest(entity="device-1"), fresh)
    assert refusal == ("NOT_FOUND", "ENTITY_NOT_FOUND", {"entity": "device-1"})


@pytest.fixture
def locked(known: Known) -> Iterator[psycopg.Connection[Any]]:
    """Queries for devices wait for a lock while this is open."""
    with psycopg.connect(known.dsn()) as connection:
        connection.execute("LOCK TABLE public.entities IN ACCESS EXCLUSIVE MODE")
        yield connection
        connection.rollback()


def waiting(connection: psycopg.Connection[Any]) -> int:
    # A new snapshot of the statistics, or this transaction would see its first one for ever.
    connection.execute("SELECT pg_stat_clear_snapshot()")
    row = connection.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND application_name = 'atlasco-query'"
    ).fetchone()
    assert row is not None
    return int(row[0])


async def until_waiting(connection: psycopg.Connection[Any], count: int) -> None:
    await until(lambda: waiting(connection) == count, f"{count} statements wait for the lock")


async def test_a_deadline_is_typed_and_ends_the_statement(
    known: Known, locked: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    timeout_s = QueryServicer._timeout_s

    def well_before(servicer: QueryServicer, context: Any) -> float:
        """As if the client had to have its answer earlier than it has to."""
        left_s = context.time_remaining() - PATIENCE_S
        return timeout_s(servicer, cast("Any", SimpleNamespace(time_remaining=lambda: left_s)))

    # Where the machine stands still at the end, the client's own clock would else end the call, without a reason.
    monkeypatch.setattr(QueryServicer, "_timeout_s", well_before)
    async with serve(known, QueryLimits()) as service:
        refusal = await service.refusal(query_pb2.ListEntitiesRequest(), timeout=PATIENCE_S + 2.0)
        assert refusal[:2] == ("DEADLINE_EXCEEDED", "QUERY_DEADLINE")
        assert waiting(locked) == 0
        locked.rollback()
        assert (await service.ask(query_pb2.ListEntitiesRequest(), timeout=2 * PATIENCE_S)).entities


@pytest.mark.parametrize(("left_s", "given_s"), [(None, 30.0), (60.0, 30.0), (5.0, 4.0), (1.0, 0.8)])
def test_a_query_ends_before_its_deadline(left_s: float | None, given_s: float) -> None:
    nothing: Any = None
    limits = QueryLimits(longest_s=30.0, reserve_s=1.0)
    servicer = QueryServicer(nothing, nothing, nothing, MemoryMetrics(), limits=limits)
    context: Any = SimpleNamespace(time_remaining=lambda: left_s)
    assert servicer._timeout_s(context) == pytest.approx(given_s)


async def test_a_caller_that_hangs_up_ends_the_statement(service: Service, locked: psycopg.Connection[Any]) -> None:
    call = service.stub.ListEntities(query_pb2.ListEntitiesRequest(), metadata=SERVICE)
    await until_waiting(locked, 1)
    call.cancel()
    await until_waiting(locked, 0)
    locked.rollback()
    assert (await service.ask(query_pb2.ListEntitiesRequest())).entities
    assert service.pool.get_stats().get("connections_lost", 0) == 0


async def test_one_query_too_many_is_refused_at_once(known: Known, locked: psycopg.Connection[Any]) -> None:
    async with serve(known, QueryLimits(concurrency=3, tenant_concurrency=2)) as service:
        calls = [service.stub.ListEntities(query_pb2.ListEntitiesRequest(), metadata=SERVICE) for _ in range(2)]
        await until_waiting(locked, 2)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.ask(query_pb2.ListAttributesRequest())
        assert end_of(caught.value) == End("RESOURCE_EXHAUSTED", "QUERY_CONCURRENCY", {"limit": "2"}, 0.1)
        # Another tenant is served meanwhile.
        rival = (("atlasco-tenant", "rival"), ("atlasco-service", "test"))
        assert (await service.ask(query_pb2.ListAttributesRequest(), rival)).attributes
        locked.rollback()
        assert all([(await call).entities for call in calls])
        counted = service.metrics.value("atlasco_query_requests", method="ListEntities", status="OK")
        assert counted == 2


async def test_a_database_that_is_gone_is_unavailable(known: Known, service: Service) -> None:
    await service.pool.close()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await service.ask(query_pb2.ListEntitiesRequest())
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
