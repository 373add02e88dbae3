"""Metrics: the contract of every implementation, the export, and that names in code and table are equal."""

import math
import re
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import get_args

import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from runtime.metric_definitions import DEFINITIONS, MetricName, describe_metrics
from runtime.metrics import MemoryMetrics, Metrics, NullMetrics, OpenTelemetryMetrics, TelemetryConfig
from runtime.tracing import Tracing
from tests.waiting import PATIENCE_S

Read = Callable[..., float | None]


def read_memory(metrics: MemoryMetrics) -> Read:
    def read(sample: str, **labels: str) -> float | None:
        name = re.sub(r"_(total|count|sum)$", "", sample)
        assert name in DEFINITIONS
        key: MetricName = name  # type: ignore[assignment]
        if sample.endswith("_count"):
            return metrics.distribution(key, **labels).count
        if sample.endswith("_sum"):
            return metrics.distribution(key, **labels).total
        try:
            return metrics.value(key, **labels)
        except KeyError:
            return None

    return read


def read_prometheus(metrics: OpenTelemetryMetrics) -> Read:
    def read(sample: str, **labels: str) -> float | None:
        text, _ = metrics.prometheus()
        for family in text_string_to_metric_families(text.decode()):
            for found in family.samples:
                if found.name == sample and found.labels == labels:
                    return found.value
        return None

    return read


@pytest.fixture(params=["memory", "prometheus"])
def recorded(request: pytest.FixtureRequest) -> Iterator[tuple[Metrics, Read]]:
    if request.param == "memory":
        memory = MemoryMetrics()
        yield memory, read_memory(memory)
    else:
        exported = OpenTelemetryMetrics("test")
        yield exported, read_prometheus(exported)
        exported.close()


def test_a_counter_starts_at_zero_and_adds_up(recorded: tuple[Metrics, Read]) -> None:
    metrics, read = recorded
    assert read("atlasco_readings_committed_total", type="double") == 0
    metrics.count("atlasco_readings_committed", 5, type="double")
    metrics.count("atlasco_readings_committed", type="double")
    metrics.count("atlasco_readings_committed", 3, type="text")
    assert read("atlasco_readings_committed_total", type="double") == 6
    assert read("atlasco_readings_committed_total", type="text") == 3


def test_labels_come_in_any_order(recorded: tuple[Metrics, Read]) -> None:
    metrics, read = recorded
    metrics.count("atlasco_query_requests", method="GetLatest", status="OK")
    metrics.count("atlasco_query_requests", status="OK", method="GetLatest")
    assert read("atlasco_query_requests_total", method="GetLatest", status="OK") == 2


def test_a_histogram_counts_and_sums(recorded: tuple[Metrics, Read]) -> None:
    metrics, read = recorded
    for value in (0.0005, 0.001, 0.3, 60.0):
        metrics.observe("atlasco_ack_latency_seconds", value)
    assert read("atlasco_ack_latency_seconds_count") == 4
    assert math.isclose(read("atlasco_ack_latency_seconds_sum") or 0, 60.3015)


def test_a_gauge_is_read_when_asked(recorded: tuple[Metrics, Read]) -> None:
    metrics, read = recorded
    depth = [7.0]
    assert read("atlasco_lane_queue_readings", lane="1") is None
    metrics.gauge("atlasco_lane_queue_readings", lambda: depth[0], lane="1")
    assert read("atlasco_lane_queue_readings", lane="1") == 7
    depth[0] = 9
    assert read("atlasco_lane_queue_readings", lane="1") == 9
    metrics.gauge("atlasco_lane_queue_readings", lambda: 1.0, lane="1")
    assert read("atlasco_lane_queue_readings", lane="1") == 1


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda m: m.count("atlasco_nothing"), id="unknown-name"),
        pytest.param(lambda m: m.count("atlasco_streams_open"), id="count-a-gauge"),
        pytest.param(lambda m: m.observe("atlasco_stream_opens", 1.0), id="observe-a-counter"),
        pytest.param(lambda m: m.gauge("atlasco_stream_opens", lambda: 1.0), id="gauge-a-counter"),
        pytest.param(lambda m: m.count("atlasco_stream_closes"), id="label-missing"),
        pytest.param(lambda m: m.count("atlasco_stream_opens", device="d"), id="label-too-many"),
    ],
)
def test_a_mistake_is_a_type_error(recorded: tuple[Metrics, Read], call: Callable[[Metrics], None]) -> None:
    with pytest.raises(TypeError):
        call(recorded[0])


def test_threads_lose_nothing(recorded: tuple[Metrics, Read]) -> None:
    metrics, read = recorded

    def count() -> None:
        for _ in range(2000):
            metrics.count("atlasco_messages_received")
            metrics.observe("atlasco_flush_rows", 5)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read("atlasco_messages_received_total") == 8000
    assert read("atlasco_flush_rows_count") == 8000


def test_null_metrics_take_everything() -> None:
    metrics = NullMetrics()
    metrics.count("atlasco_messages_received")
    metrics.observe("atlasco_flush_rows", 5)
    metrics.gauge("atlasco_streams_open", lambda: 1)


def test_memory_metrics_list_what_was_counted() -> None:
    metrics = MemoryMetrics()
    metrics.count("atlasco_readings_rejected", 2, reason="UNKNOWN_ALIAS")
    assert metrics.values("atlasco_readings_rejected") == {("UNKNOWN_ALIAS",): 2}
    assert metrics.distribution("atlasco_flush_rows").count == 0


def test_buckets_are_cumulative_and_a_bound_is_inclusive() -> None:
    metrics = OpenTelemetryMetrics("test")
    for value in (0.001, 0.0011, 99.0):
        metrics.observe("atlasco_ack_latency_seconds", value)
    read = read_prometheus(metrics)
    assert read("atlasco_ack_latency_seconds_bucket", le="0.001") == 1
    assert read("atlasco_ack_latency_seconds_bucket", le="0.0025") == 2
    assert read("atlasco_ack_latency_seconds_bucket", le="10.0") == 2
    assert read("atlasco_ack_latency_seconds_bucket", le="+Inf") == 3
    metrics.close()


def test_a_gauge_that_fails_costs_only_itself(caplog: pytest.LogCaptureFixture) -> None:
    metrics = OpenTelemetryMetrics("test")
    metrics.gauge("atlasco_pool_waiting", lambda: 1 / 0, pool="query")
    metrics.gauge("atlasco_pool_waiting", lambda: 4, pool="ingest")
    read = read_prometheus(metrics)
    assert read("atlasco_pool_waiting", pool="ingest") == 4
    assert read("atlasco_pool_waiting", pool="query") is None
    assert "gauge cannot be read" in caplog.text
    metrics.close()


def test_a_gauge_that_is_not_known_yet_is_left_out_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    metrics = OpenTelemetryMetrics("test")
    known: list[float] = []

    def seconds() -> float:
        if not known:
            raise LookupError
        return known[0]

    metrics.gauge("atlasco_loader_behind_seconds", seconds)
    read = read_prometheus(metrics)
    assert read("atlasco_loader_behind_seconds") is None
    assert not caplog.text
    known.append(3)
    assert read_prometheus(metrics)("atlasco_loader_behind_seconds") == 3
    metrics.close()


def test_two_processes_in_one_interpreter_do_not_share() -> None:
    first, second = OpenTelemetryMetrics("a"), OpenTelemetryMetrics("b")
    first.count("atlasco_stream_opens")
    assert read_prometheus(second)("atlasco_stream_opens_total") == 0
    first.close()
    second.close()


def test_a_disabled_sdk_exports_nothing_and_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    metrics = OpenTelemetryMetrics("test")
    metrics.count("atlasco_stream_opens")
    assert b"atlasco" not in metrics.prometheus()[0]
    metrics.close()


def test_openmetrics_on_request() -> None:
    metrics = OpenTelemetryMetrics("test")
    text, content_type = metrics.prometheus("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n")
    metrics.close()


def test_every_name_has_one_definition_and_every_definition_a_documented_row() -> None:
    assert set(get_args(MetricName)) == set(DEFINITIONS)
    table = describe_metrics()
    for name, definition in DEFINITIONS.items():
        assert re.fullmatch(r"atlasco_[a-z_]+", name)
        assert f"`{name}" in table
        assert definition.meaning.endswith(".")
        assert definition.remedy.endswith(".")
        assert (definition.kind == "histogram") == bool(definition.buckets)
        assert list(definition.buckets) == sorted(definition.buckets)
        assert not {"device", "entity", "tenant", "session"} & definition.labels.keys()


class Collector(metrics_service_pb2_grpc.MetricsServiceServicer, trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.metrics: dict[str, object] = {}
        self.spans: list[str] = []

    def Export(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        if isinstance(request, trace_service_pb2.ExportTraceServiceRequest):
            for resource in request.resource_spans:
                self.spans += [span.name for scope in resource.scope_spans for span in scope.spans]
            return trace_service_pb2.ExportTraceServiceResponse()
        for resource in request.resource_metrics:
            for scope in resource.scope_metrics:
                self.metrics |= {metric.name: metric for metric in scope.metrics}
        return metrics_service_pb2.ExportMetricsServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    service = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(service, server)
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield service, f"http://127.0.0.1:{port}"
    server.stop(0).wait(PATIENCE_S)


def test_otlp_pushes_counters_and_histograms(collector: tuple[Collector, str]) -> None:
    service, endpoint = collector
    metrics = OpenTelemetryMetrics("test", TelemetryConfig(otlp_endpoint=endpoint))
    metrics.count("atlasco_stream_opens", 3)
    metrics.observe("atlasco_ack_latency_seconds", 0.25)
    metrics.close()
    opens = service.metrics["atlasco_stream_opens"]
    latency = service.metrics["atlasco_ack_latency_seconds"]
    assert opens.sum.data_points[0].as_int == 3  # type: ignore[attr-defined]
    (point,) = latency.histogram.data_points  # type: ignore[attr-defined]
    assert (point.count, point.sum, point.min, point.max) == (1, 0.25, 0.25, 0.25)


def test_traces_are_pushed_only_with_an_endpoint(collector: tuple[Collector, str]) -> None:
    service, endpoint = collector
    silent, tracing = Tracing("test"), Tracing("test", TelemetryConfig(otlp_endpoint=endpoint))
    for each in (silent, tracing):
        with each.tracer("gateway").start_as_current_span("flush"):
            pass
        each.close()
    assert (silent.exported, tracing.exported) == (False, True)
    assert service.spans == ["flush"]


def test_traces_go_where_the_process_says() -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing("test", processors=[SimpleSpanProcessor(exporter)])
    with tracing.tracer("gateway").start_as_current_span("flush"):
        pass
    assert tracing.exported
    assert [span.name for span in exporter.get_finished_spans()] == ["flush"]
    tracing.close()
