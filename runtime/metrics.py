"""Metrics: counted in plain memory, exported by OpenTelemetry to Prometheus and, when asked, over OTLP.

One `Metrics` is made where the process is put together and handed to what needs it; there is no global
one. The names, labels and meanings are in `runtime.metric_definitions`.

Why not OpenTelemetry's own synchronous instruments: one `Counter.add` costs about 5 microseconds, a tenth
of a core at 20,000 messages a second. Here `count` and `observe` touch one cell (under half a
microsecond); the cells become OpenTelemetry data when somebody reads.
"""

import logging
import threading
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from time import time_ns
from typing import Any, Final, Protocol

from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Meter, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricReader,
    MetricsData,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.resources import Resource
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from runtime.config import setting
from runtime.metric_definitions import DEFINITIONS, MetricDefinition, MetricKind, MetricName

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TelemetryConfig:
    """Export of metrics and traces."""

    otlp_endpoint: str = setting(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "",
        "Where metrics and traces are pushed over OTLP/gRPC, such as http://collector:4317; not set: nowhere.",
    )


class Metrics(ABC):
    """Where a process counts. Calls are cheap, come from any thread, and block on nothing.

    A name, kind or label that the definitions do not have is a mistake of the caller and raises TypeError
    at its first use. Returning does not promise that anybody has seen the value.
    """

    @abstractmethod
    def count(self, name: MetricName, n: int = 1, **labels: str) -> None:
        """Add `n` (0 or more) to a counter."""

    @abstractmethod
    def observe(self, name: MetricName, value: float, **labels: str) -> None:
        """Record `value`, in the metric's unit, in a histogram."""

    @abstractmethod
    def gauge(self, name: MetricName, read: Callable[[], float], **labels: str) -> None:
        """Have `read` called whenever the gauge is read; it replaces an earlier one with the same labels.

        `read` may be called from a thread of the exporter: it must only look. A gauge whose `read` raises
        is left out; it raises LookupError where the value is not known yet, and that is not logged.
        """


class NullMetrics(Metrics):
    """Counts nothing."""

    def count(self, name: MetricName, n: int = 1, **labels: str) -> None:
        """Do nothing."""

    def observe(self, name: MetricName, value: float, **labels: str) -> None:
        """Do nothing."""

    def gauge(self, name: MetricName, read: Callable[[], float], **labels: str) -> None:
        """Do nothing."""


class _Cell:
    """One counter, or one histogram, with its labels."""

    __slots__ = ("buckets", "counts", "labels", "maximum", "minimum", "total")

    def __init__(self, labels: dict[str, str], buckets: tuple[float, ...]) -> None:
        self.labels = labels
        self.buckets = buckets
        self.total: float = 0
        self.counts = [0] * (len(buckets) + 1)
        self.minimum = float("inf")
        self.maximum = float("-inf")


@dataclass(frozen=True)
class Distribution:
    """What a histogram holds: `counts[i]` values at or below `buckets[i]` and above the one before.

    All zero while nothing was observed.
    """

    buckets: tuple[float, ...]
    counts: tuple[int, ...]
    total: float
    minimum: float
    maximum: float

    @property
    def count(self) -> int:
        """How many values were observed."""
        return sum(self.counts)


class MemoryMetrics(Metrics):
    """Metrics that can be read back: what tests use, and what the exported metrics are made of."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By name and labels as the caller wrote them: a call that was made before finds its cell in one
        # step.
        self._counters: dict[Hashable, _Cell] = {}
        self._histograms: dict[Hashable, _Cell] = {}
        self._by_name: dict[MetricName, dict[tuple[str, ...], _Cell]] = {name: {} for name in DEFINITIONS}
        self._gauges: dict[MetricName, dict[tuple[str, ...], Callable[[], float]]] = {name: {} for name in DEFINITIONS}
        for name, definition in DEFINITIONS.items():
            if definition.kind != "gauge":
                for labels in _known_labels(definition):
                    self._cell(name, definition.kind, labels)

    def count(self, name: MetricName, n: int = 1, **labels: str) -> None:
        """See Metrics."""
        key = (name, *labels.items())
        cell = self._counters.get(key) or self._cell(name, "counter", labels)
        with self._lock:
            cell.total += n

    def observe(self, name: MetricName, value: float, **labels: str) -> None:
        """See Metrics."""
        key = (name, *labels.items())
        cell = self._histograms.get(key) or self._cell(name, "histogram", labels)
        bucket = bisect_left(cell.buckets, value)
        with self._lock:
            cell.counts[bucket] += 1
            cell.total += value
            # min() and max() would double the cost of the call.
            if value < cell.minimum:  # noqa: PLR1730
                cell.minimum = value
            if value > cell.maximum:  # noqa: PLR1730
                cell.maximum = value

    def gauge(self, name: MetricName, read: Callable[[], float], **labels: str) -> None:
        """See Metrics."""
        self._gauges[name][_label_values(name, "gauge", labels)] = read

    def value(self, name: MetricName, **labels: str) -> float:
        """A counter's total or a gauge's value; 0 for a counter never counted; KeyError for a gauge
        nobody set.
        """
        if DEFINITIONS[name].kind == "gauge":
            return self._gauges[name][_label_values(name, "gauge", labels)]()
        cell = self._by_name[name].get(_label_values(name, "counter", labels))
        return 0 if cell is None else cell.total

    def values(self, name: MetricName) -> dict[tuple[str, ...], float]:
        """The non-zero totals of a counter by label values, in the order the definition has the labels."""
        return {key: cell.total for key, cell in list(self._by_name[name].items()) if cell.total}

    def distribution(self, name: MetricName, **labels: str) -> Distribution:
        """What was observed under these labels so far."""
        cell = self._by_name[name].get(_label_values(name, "histogram", labels))
        return self._snapshot(_Cell(labels, DEFINITIONS[name].buckets) if cell is None else cell)

    def _snapshot(self, cell: _Cell) -> Distribution:
        with self._lock:
            empty = cell.minimum > cell.maximum
            return Distribution(
                cell.buckets,
                tuple(cell.counts),
                cell.total,
                0.0 if empty else cell.minimum,
                0.0 if empty else cell.maximum,
            )

    def _cell(self, name: MetricName, kind: MetricKind, labels: dict[str, str]) -> _Cell:
        values = _label_values(name, kind, labels)
        definition = DEFINITIONS[name]
        with self._lock:
            cell = self._by_name[name].get(values)
            if cell is None:
                ordered = dict(zip(definition.labels, values, strict=True))
                cell = self._by_name[name][values] = _Cell(ordered, definition.buckets)
            # Call sites may write the labels in any order; each order gets a key of its own to the one
            # cell.
            known = self._counters if kind == "counter" else self._histograms
            known[(name, *labels.items())] = cell
        return cell


class OpenTelemetryMetrics(MemoryMetrics):
    """The metrics of a running process, readable as Prometheus text and pushed over OTLP when
    configured.
    """

    def __init__(self, service: str, config: TelemetryConfig | None = None) -> None:
        """`service` is the process's name in what is exported, such as atlasco-gateway.

        With an OTLP endpoint this starts the exporter's thread; `close` ends it.
        """
        super().__init__()
        self._start_ns = time_ns()
        self._registry = CollectorRegistry()
        readers: list[MetricReader] = [_PrometheusReader(self, scope_info_enabled=False, registry=self._registry)]
        endpoint = config.otlp_endpoint if config is not None else ""
        if endpoint:
            readers.append(_PushReader(self, OTLPMetricExporter(endpoint=endpoint)))
        self._provider = MeterProvider(
            metric_readers=readers, resource=Resource.create({"service.name": service}), shutdown_on_exit=False
        )
        meter = self._provider.get_meter("atlasco")
        for name, definition in DEFINITIONS.items():
            if definition.kind == "counter":
                meter.create_observable_counter(name, [self._counter_reader(name)], definition.unit, definition.meaning)
            elif definition.kind == "gauge":
                self._create_gauge(meter, name, definition)

    def prometheus(self, accept: str = "") -> tuple[bytes, str]:
        """The metrics in the form the Accept header asks for (text 0.0.4 by default), and its content
        type.
        """
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def close(self) -> None:
        """Push what is left and stop.

        Blocks, up to 8 seconds when the OTLP endpoint does not answer: call it once the event loop has ended.
        """
        self._provider.shutdown(timeout_millis=5_000)

    def with_histograms(self, data: MetricsData) -> MetricsData:
        """What was collected plus the histograms, for which OpenTelemetry has no instrument read on
        demand.
        """
        if not data.resource_metrics:
            return data  # OTEL_SDK_DISABLED
        added = [self._histogram(name, d) for name, d in DEFINITIONS.items() if d.kind == "histogram"]
        resource, *resources = data.resource_metrics
        scope, *scopes = resource.scope_metrics
        scope = replace(scope, metrics=[*scope.metrics, *added])
        return MetricsData([replace(resource, scope_metrics=[scope, *scopes]), *resources])

    def _histogram(self, name: MetricName, definition: MetricDefinition) -> Metric:
        now = time_ns()
        points = []
        for cell in list(self._by_name[name].values()):
            seen = self._snapshot(cell)
            points.append(
                HistogramDataPoint(
                    attributes=cell.labels,
                    start_time_unix_nano=self._start_ns,
                    time_unix_nano=now,
                    count=seen.count,
                    sum=seen.total,
                    bucket_counts=seen.counts,
                    explicit_bounds=seen.buckets,
                    min=seen.minimum,
                    max=seen.maximum,
                )
            )
        data = Histogram(points, AggregationTemporality.CUMULATIVE)
        return Metric(name, definition.meaning, definition.unit, data)

    def _counter_reader(self, name: MetricName) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def read(_: CallbackOptions) -> Iterable[Observation]:
            return [Observation(cell.total, cell.labels) for cell in list(self._by_name[name].values())]

        return read

    def _create_gauge(self, meter: Meter, name: MetricName, definition: MetricDefinition) -> None:
        def read(_: CallbackOptions) -> Iterable[Observation]:
            observations = []
            for values, callback in list(self._gauges[name].items()):
                try:
                    value = callback()
                except Exception as error:
                    # Exactly LookupError: a KeyError or IndexError is a defect.
                    if type(error) is not LookupError:
                        log.exception("gauge cannot be read", extra={"metric": name})
                    continue
                labels = dict(zip(definition.labels, values, strict=True))
                observations.append(Observation(value, labels))
            return observations

        meter.create_observable_gauge(name, [read], definition.unit, definition.meaning)


class _HasHistograms(Protocol):
    def with_histograms(self, data: MetricsData) -> MetricsData: ...


class _PrometheusReader(PrometheusMetricReader):
    def __init__(self, source: _HasHistograms, **options: Any) -> None:
        self._source = source
        super().__init__(**options)

    def _receive_metrics(self, metrics_data: MetricsData, *args: Any, **kwargs: Any) -> None:
        super()._receive_metrics(self._source.with_histograms(metrics_data), *args, **kwargs)


class _PushReader(PeriodicExportingMetricReader):
    def __init__(self, source: _HasHistograms, exporter: OTLPMetricExporter) -> None:
        self._source = source
        super().__init__(exporter)

    def _receive_metrics(self, metrics_data: MetricsData, *args: Any, **kwargs: Any) -> None:
        super()._receive_metrics(self._source.with_histograms(metrics_data), *args, **kwargs)


def _known_labels(definition: MetricDefinition) -> list[dict[str, str]]:
    """All label sets, where the definition lists every value; otherwise none."""
    sets: list[dict[str, str]] = [{}]
    for label, values in definition.labels.items():
        sets = [{**labels, label: value} for labels in sets for value in values]
    return sets


def _label_values(name: MetricName, kind: MetricKind, labels: Mapping[str, str]) -> tuple[str, ...]:
    definition: Final = DEFINITIONS.get(name)
    if definition is None:
        raise TypeError(f"there is no metric {name}")
    if definition.kind != kind:
        raise TypeError(f"{name} is a {definition.kind}, not a {kind}")
    if labels.keys() != definition.labels.keys():
        raise TypeError(f"{name} has the labels {sorted(definition.labels)}, not {sorted(labels)}")
    return tuple(labels[label] for label in definition.labels)
