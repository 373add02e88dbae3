"""What operators see of queries: counts by tier and source, what failed on the way, spans."""

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from atlasco.telemetry.v1 import query_pb2, query_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from psycopg.conninfo import make_conninfo

from gateway.query_episodes import WINDOW_S, Episode
from gateway.query_freshness import TierBounds, tier_of
from gateway.query_metrics import AnswerMetrics, cause_of
from router.clock import Instant
from router.outcome import Attempt, FallbackBusy, Routed
from router.plan import Inquiry, Need, Plan, Shape, SourceKind, Standing, Verdict
from router.tiers import Degradation, DegradedReason, Proof, RangeNotHeld, Unproven
from runtime.metric_definitions import DEFINITIONS
from runtime.metrics import MemoryMetrics
from runtime.tracing import Tracing
from storage.errors import StorageBusy, StorageError, StorageUnavailable, TransactionConflict
from tests.gateway.faulty_link import FaultyLink
from tests.gateway.running_gateway import RunningGateway, running_gateway
from tests.manual_clock import ManualClock
from tests.router.router_support import ATTRIBUTE, ask, latest, metadata, write
from tests.storage.conftest import QUERY_LOGIN, Database
from tests.waiting import PATIENCE_S, until

METHOD = "atlasco.telemetry.v1.QueryService/"
CRITICAL = {"tier": query_pb2.TIER_CRITICAL}
REPORT = {"tier": query_pb2.TIER_REPORT}
# As W3C Trace Context writes them: version, trace, the caller's span, sampled.
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"


@dataclass
class Observed:
    """A gateway whose replica is reached by `link`, and its spans."""

    gateway: RunningGateway
    link: FaultyLink
    exporter: InMemorySpanExporter

    @property
    def stub(self) -> Any:
        return query_pb2_grpc.QueryServiceStub(self.gateway.channel)

    def counted(self, name: Any, **labels: str) -> float:
        return self.gateway.metrics.value(name, **labels)

    async def spans(self, method: str, trace: str = "") -> list[ReadableSpan]:
        """The span of a method's last call, then those below it; of a refused one it ends after the caller knows."""
        calls: list[ReadableSpan] = []

        def found() -> list[ReadableSpan]:
            calls[:] = [
                span
                for span in self.exporter.get_finished_spans()
                if span.name == METHOD + method and span.context is not None
                if not trace or format(span.context.trace_id, "032x") == trace
            ]
            return calls

        await until(found)
        call = calls[-1]
        below = [s for s in self.exporter.get_finished_spans() if s.parent is not None and s.parent == call.context]
        return [call, *below]


@pytest.fixture(scope="module")
async def observed(module_database: Database) -> AsyncIterator[Observed]:
    """The replica is the primary itself, by another way: it holds its own heartbeat, as a copy would."""
    exporter = InMemorySpanExporter()
    tracing = Tracing("test", processors=[SimpleSpanProcessor(exporter)])
    async with FaultyLink.to("127.0.0.1", module_database.postgres.port) as link:
        replica = make_conninfo(module_database(user=QUERY_LOGIN), port=link.port)
        async with running_gateway(module_database, replica_dsns=replica, tracing=tracing) as running:
            yield Observed(running, link, exporter)
            link.resume()
    tracing.close()


@pytest.fixture
async def replica(observed: Observed, tenant: str) -> None:
    """Wait until the replica answers for the tenant, which has a device `d`."""
    observed.link.resume()
    await write(observed.gateway.channel, tenant, "d", 1)

    async def answers() -> bool:
        answer = await latest(observed.gateway.channel, tenant, "d", **REPORT)
        return bool(answer.provenance.source == query_pb2.Provenance.SOURCE_REPLICA)

    # Its pool may just wait before it connects again.
    await until(answers, "the replica answers")


@pytest.fixture(autouse=True)
def no_spans(request: pytest.FixtureRequest) -> None:
    """Forget the spans of the tests before."""
    if "observed" in request.fixturenames:
        request.getfixturevalue("observed").exporter.clear()


async def test_an_answer_counts_by_tier_and_source(observed: Observed, tenant: str) -> None:
    await write(observed.gateway.channel, tenant, "d", 1)
    labels = {"method": "GetLatest", "tier": "critical", "source": "primary"}
    before = observed.counted("atlasco_query_answers", **labels)
    ages = observed.gateway.metrics.distribution("atlasco_query_staleness_seconds", source="primary")
    for _ in range(3):
        await latest(observed.gateway.channel, tenant, "d", **CRITICAL)
    assert observed.counted("atlasco_query_answers", **labels) == before + 3
    now = observed.gateway.metrics.distribution("atlasco_query_staleness_seconds", source="primary")
    assert (now.count - ages.count, now.maximum) == (3, 0)
    took = observed.gateway.metrics.distribution("atlasco_query_duration_seconds", method="GetLatest", tier="critical")
    assert took.count >= 3


async def test_an_exact_bound_counts_in_its_class(observed: Observed, replica: None, tenant: str) -> None:
    labels = {"method": "GetLatest", "tier": "report", "source": "replica"}
    before = observed.counted("atlasco_query_answers", **labels)

    async def answers() -> bool:
        answer = await latest(observed.gateway.channel, tenant, "d", max_staleness_us=20_000_000)
        return bool(answer.provenance.source == query_pb2.Provenance.SOURCE_REPLICA)

    # The primary steps in where the replica takes a moment too long.
    await until(answers, "the replica answers")
    assert observed.counted("atlasco_query_answers", **labels) == before + 1
    ages = observed.gateway.metrics.distribution("atlasco_query_staleness_seconds", source="replica")
    # Those of the answers of the fixture too, whose bound is 30 s.
    assert 0 < ages.maximum < 30


async def test_an_export_counts_each_page(observed: Observed, tenant: str) -> None:
    for second in range(3):
        await write(observed.gateway.channel, tenant, "d", second)
    request = query_pb2.ExportSeriesRequest(
        entities=["d"], attributes=[ATTRIBUTE], start_time_us=1, end_time_us=2**60, chunk_size=1
    )
    labels = {"method": "ExportSeries", "tier": "critical", "source": "primary"}
    before = observed.counted("atlasco_query_answers", **labels)
    call = observed.stub.ExportSeries(request, metadata=metadata(tenant))
    pages = [message async for message in call if message.series]
    assert len(pages) == 3
    assert observed.counted("atlasco_query_answers", **labels) - before in (3, 4)
    span, *_ = await observed.spans("ExportSeries")
    assert attributes_of(span)["atlasco.reads"] in (3, 4)


async def test_a_replica_that_does_not_answer_counts_as_a_fallback(
    observed: Observed, replica: None, tenant: str
) -> None:
    # Those of the wait for it.
    observed.exporter.clear()
    labels = {"source": "replica", "cause": "busy"}
    before = observed.counted("atlasco_query_fallbacks", **labels)
    answered = {"method": "GetLatest", "tier": "report", "source": "primary"}
    from_primary = observed.counted("atlasco_query_answers", **answered)
    observed.link.stall()
    try:
        request = query_pb2.GetLatestRequest(entity="d", freshness=query_pb2.Freshness(tier=query_pb2.TIER_REPORT))
        answer = await ask(observed.gateway.channel, tenant, request, timeout_s=PATIENCE_S)
    finally:
        observed.link.resume()
    assert answer.provenance.source == query_pb2.Provenance.SOURCE_PRIMARY
    assert observed.counted("atlasco_query_fallbacks", **labels) == before + 1
    assert observed.counted("atlasco_query_answers", **answered) == from_primary + 1
    call, *asked = await observed.spans("GetLatest")
    assert [span.name for span in asked] == ["ask replica-1", "ask primary"]
    failed, good = asked
    assert attributes_of(failed) == {"atlasco.source": "replica-1", "atlasco.cause": "busy"}
    assert attributes_of(good) == {"atlasco.source": "primary"}
    assert attributes_of(call)["atlasco.fallbacks"] == 1
    for first, second in ((call, failed), (failed, good)):
        assert first.start_time is not None and second.start_time is not None
        assert first.start_time <= second.start_time
    assert call.end_time is not None and good.end_time is not None
    assert good.end_time <= call.end_time


async def test_a_degraded_answer_counts_by_reason(observed: Observed, tenant: str) -> None:
    await write(observed.gateway.channel, tenant, "d", 1)
    request = query_pb2.ReadSeriesRequest(
        entities=["d"], attributes=[ATTRIBUTE], start_time_us=1, end_time_us=2**60,
        freshness=query_pb2.Freshness(tier=query_pb2.TIER_ANALYTICS),
    )  # fmt: skip
    before = {r: observed.counted("atlasco_query_degraded", reason=r) for r in ("no_warehouse", "range_cut", "stale")}
    answer = await ask(observed.gateway.channel, tenant, request)
    assert {d.reason for d in answer.provenance.degraded} == {
        query_pb2.Degradation.REASON_NO_WAREHOUSE,
        query_pb2.Degradation.REASON_RANGE_CUT,
    }
    after = {r: observed.counted("atlasco_query_degraded", reason=r) - n for r, n in before.items()}
    assert after == {"no_warehouse": 1, "range_cut": 1, "stale": 0}
    span, *_ = await observed.spans("ReadSeries")
    assert attributes_of(span)["atlasco.degraded"] == ("no_warehouse", "range_cut")
    assert attributes_of(span)["atlasco.tier"] == "analytics"


async def test_the_span_says_what_the_answer_is_and_not_whose(observed: Observed, tenant: str) -> None:
    await write(observed.gateway.channel, tenant, "a-device", 1)
    traced = [*metadata(tenant), ("traceparent", TRACEPARENT)]
    request = query_pb2.GetLatestRequest(entity="a-device")
    await observed.stub.GetLatest(request, metadata=traced)
    span, asked = await observed.spans("GetLatest", TRACE)
    assert span.kind is SpanKind.SERVER
    assert span.parent is not None
    assert format(span.parent.span_id, "016x") == CALLER
    assert attributes_of(span) == {
        "rpc.system.name": "grpc",
        "rpc.method": METHOD + "GetLatest",
        "rpc.response.status_code": "OK",
        "atlasco.tier": "critical",
        "atlasco.max_staleness_us": 0,
        "atlasco.reads": 1,
        "atlasco.source": "primary",
        "atlasco.staleness_us": 0,
        "atlasco.attempts": 1,
        "atlasco.fallbacks": 0,
        "atlasco.degraded": (),
    }
    assert asked.name == "ask primary"
    text = " ".join(each.to_json() for each in observed.exporter.get_finished_spans())
    assert tenant not in text
    assert "a-device" not in text


async def test_a_refusal_is_an_attribute_of_its_span(observed: Observed, tenant: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await latest(observed.gateway.channel, tenant, "ghost", max_staleness_us=-1)
    span, *below = await observed.spans("GetLatest")
    assert below == []
    found = attributes_of(span)
    assert (found["rpc.response.status_code"], found["error.type"]) == ("INVALID_ARGUMENT", "FRESHNESS_INVALID")
    # The caller's mistake is no error of the server's.
    assert span.status.is_unset
    assert found["atlasco.tier"] == "none"


@pytest.mark.parametrize("header", ["", "garbage", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
async def test_a_caller_without_a_valid_trace_begins_one(observed: Observed, tenant: str, header: str) -> None:
    await write(observed.gateway.channel, tenant, "d", 1)
    observed.exporter.clear()
    await observed.stub.ListAttributes(
        query_pb2.ListAttributesRequest(), metadata=[*metadata(tenant), ("traceparent", header)]
    )
    span, *_ = await observed.spans("ListAttributes")
    assert span.parent is None


async def test_a_caller_that_is_not_sampled_costs_no_span(observed: Observed, tenant: str) -> None:
    await write(observed.gateway.channel, tenant, "d", 1)
    observed.exporter.clear()
    header = ("traceparent", TRACEPARENT[:-2] + "00")
    await observed.stub.ListAttributes(query_pb2.ListAttributesRequest(), metadata=[*metadata(tenant), header])
    await observed.stub.ListEntities(query_pb2.ListEntitiesRequest(), metadata=metadata(tenant))
    await observed.spans("ListEntities")
    assert METHOD + "ListAttributes" not in {span.name for span in observed.exporter.get_finished_spans()}


async def test_a_source_that_is_away_shows_in_its_gauges(observed: Observed, replica: None) -> None:
    observed.link.cut()
    try:
        await until(lambda: observed.counted("atlasco_source_available", source="replica-1") == 0)
        age_s = observed.counted("atlasco_source_staleness_seconds", source="replica-1")
        await until(lambda: observed.counted("atlasco_source_staleness_seconds", source="replica-1") > age_s)
        await until(lambda: observed.counted("atlasco_source_available", source="primary") == 1)
    finally:
        observed.link.resume()
    await until(lambda: 0 < observed.counted("atlasco_clock_uncertainty_seconds") < 1)
    assert observed.counted("atlasco_fallback_queries") == 0
    assert observed.counted("atlasco_fallback_queries_limit") == observed.gateway.config.max_fallback_queries


def attributes_of(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.mark.parametrize(
    ("freshness", "tier"),
    [
        ({}, "critical"),
        ({"tier": query_pb2.TIER_UNSPECIFIED}, "critical"),
        ({"tier": query_pb2.TIER_ANALYTICS}, "analytics"),
        ({"max_staleness_us": 0}, "critical"),
        ({"max_staleness_us": 1}, "dashboard"),
        ({"max_staleness_us": 100_000}, "dashboard"),
        ({"max_staleness_us": 100_001}, "report"),
        ({"max_staleness_us": 900_000_000}, "analytics"),
        # Beyond every bound.
        ({"max_staleness_us": 10**12}, "analytics"),
    ],
    ids=str,
)
def test_tier_of_a_bound(freshness: dict[str, Any], tier: str) -> None:
    assert tier_of(query_pb2.Freshness(**freshness), TierBounds().microseconds()) == tier


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (None, None),
        (Unproven, "unproven"),
        (RangeNotHeld, "range"),
        (StorageError, "unavailable"),
        (StorageBusy, "busy"),
        (FallbackBusy, "busy"),
        (StorageUnavailable, "unavailable"),
        (TransactionConflict, "conflict"),
    ],
    ids=str,
)
def test_cause_of_an_attempt(error: type[StorageError] | None, cause: str | None) -> None:
    attempt = Attempt(SourceKind.REPLICA, "replica-1", None, None, None, "", 1, error)
    assert cause_of(attempt) == cause
    assert cause is None or cause in DEFINITIONS["atlasco_query_fallbacks"].labels["cause"]


def test_every_kind_of_source_and_degradation_is_listed() -> None:
    assert {kind.value for kind in SourceKind} == set(DEFINITIONS["atlasco_query_answers"].labels["source"])
    reasons = {reason.name.lower() for reason in DegradedReason}
    assert reasons == set(DEFINITIONS["atlasco_query_degraded"].labels["reason"])


def routed(
    kind: SourceKind = SourceKind.PRIMARY,
    name: str = "primary",
    *,
    replica: bool = False,
    bound_us: int = 100_000,
    degraded: tuple[DegradedReason, ...] = (),
    attempts: tuple[Attempt, ...] = (),
) -> Routed[None]:
    inquiry = Inquiry(Shape.LOOKUP, Need(bound_us), Instant(1_000_000, 1_001_000))
    standings = [Standing(SourceKind.PRIMARY, "primary")]
    if replica:
        standings.append(Standing(SourceKind.REPLICA, "replica-1"))
    plan = Plan(inquiry, [], [Verdict(standing, None, "") for standing in standings])
    proof = Proof(kind, name, 950_000, degraded=tuple(Degradation(reason, "") for reason in degraded))
    return Routed(None, proof, plan, attempts)


FAILED = Attempt(SourceKind.REPLICA, "replica-1", None, None, None, "down", 1, StorageUnavailable)
NO_ROLLUP = Attempt(SourceKind.ROLLUP, "rollups of replica-1", None, None, None, "no", 1, Unproven)


@pytest.mark.parametrize(
    ("answer", "begins", "causes"),
    [
        (routed(), None, {}),
        (routed(replica=True), "queries fall back", {"replica-1 stale": 20}),
        (routed(replica=True, bound_us=0), None, {}),
        (routed(attempts=(FAILED,)), "queries fall back", {"replica-1 unavailable": 20}),
        (routed(SourceKind.WAREHOUSE, "warehouse", attempts=(NO_ROLLUP,)), None, {}),
        (routed(degraded=(DegradedReason.RANGE_CUT,)), None, {}),
        (
            routed(degraded=(DegradedReason.RANGE_CUT, DegradedReason.STALE)), "answers are degraded", {"stale": 20},
        ),
    ],
    ids=["primary", "passed over", "critical", "failed", "rollup on a chance", "range", "degraded"],
)  # fmt: skip
def test_what_lasts_is_told_once(
    caplog: pytest.LogCaptureFixture, answer: Routed[None], begins: str | None, causes: dict[str, int]
) -> None:
    caplog.set_level(logging.INFO, "gateway")
    clock = ManualClock()
    counted = AnswerMetrics(MemoryMetrics(), clock)
    for _ in range(3):
        for _ in range(20):
            counted.answered("GetLatest", "dashboard", answer)
        clock.now_s += WINDOW_S
    for _ in range(2):
        for _ in range(20):
            counted.answered("GetLatest", "dashboard", routed(SourceKind.REPLICA, "replica-1", replica=True))
        clock.now_s += WINDOW_S
    counted.answered("GetLatest", "dashboard", routed(SourceKind.REPLICA, "replica-1", replica=True))
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    if begins is None:
        assert told == []
        return
    assert [level for level, _ in told] == ["WARNING", "INFO"]
    assert told[0][1] == begins
    assert caplog.records[0].__dict__["causes"] == causes
    assert caplog.records[1].__dict__["lasted_s"] == 3 * WINDOW_S


def test_a_few_in_a_window_are_not_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gateway")
    clock = ManualClock()
    episode = Episode("begins", "ends", clock)
    for _ in range(10):
        for number in range(100):
            episode.noted("now and then" if number < 5 else None)
        clock.now_s += WINDOW_S
    assert not caplog.records


def test_an_age_that_nobody_knows_is_not_counted() -> None:
    metrics = MemoryMetrics()
    inquiry = Inquiry(Shape.LOOKUP, Need(1), None)
    proof = Proof(SourceKind.REPLICA, "replica-1", 5)
    AnswerMetrics(metrics).answered("GetLatest", "dashboard", Routed(None, proof, Plan(inquiry, []), ()))
    assert metrics.distribution("atlasco_query_staleness_seconds", source="replica").count == 0
    assert metrics.value("atlasco_query_answers", method="GetLatest", tier="dashboard", source="replica") == 1
