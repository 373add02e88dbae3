"""Traces: set up only where an OTLP endpoint is configured; elsewhere a span costs next to nothing.

Traces are for queries, flushes and commands. A device's stream lasts for days and is no span.
"""

from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace import TracerProvider as SdkTracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import NoOpTracerProvider, Tracer

from runtime.metrics import TelemetryConfig


class Tracing:
    """The tracer provider of one process; handed to what traces, never global."""

    def __init__(
        self, service: str, config: TelemetryConfig | None = None, *, processors: Sequence[SpanProcessor] = ()
    ) -> None:
        """`service` is the process's name in the traces; `processors` get the spans besides the endpoint, if any.

        With an endpoint this starts the exporter's thread.
        """
        targets = list(processors)
        if config is not None and config.otlp_endpoint:
            targets.append(BatchSpanProcessor(OTLPSpanExporter(endpoint=config.otlp_endpoint)))
        self._provider: SdkTracerProvider | None = None
        if targets:
            self._provider = SdkTracerProvider(
                resource=Resource.create({"service.name": service}), shutdown_on_exit=False
            )
            for target in targets:
                self._provider.add_span_processor(target)
        self._silent = NoOpTracerProvider()

    @property
    def exported(self) -> bool:
        """Whether spans go anywhere."""
        return self._provider is not None

    def tracer(self, name: str) -> Tracer:
        """A tracer for the module `name`."""
        return (self._provider or self._silent).get_tracer(name)

    def close(self) -> None:
        """Push what is left and stop.

        Blocks, up to 8 seconds when the OTLP endpoint does not answer: call it once the event loop has ended.
        """
        if self._provider is not None:
            self._provider.shutdown()
