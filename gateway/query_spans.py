"""Spans of queries: one for each call, and below it one for each source that was asked.

Made only when tracing is on. Attributes are named after OpenTelemetry's conventions for RPC servers, or `atlasco.…`; no
value contains a tenant, a device, or any other name that a tenant chose. Of the caller's trace only the ids are taken:
its `tracestate` is free text.
"""

from time import time_ns
from typing import Any, Final, TypeAlias

import grpc
from atlasco.telemetry.v1 import query_pb2
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from gateway.query_metrics import cause_of, source_name
from router.outcome import Routed

RpcContext: TypeAlias = grpc.aio.ServicerContext[Any, Any]

# Child spans of one query. An export of millions of readings asks its sources far more often: the rest is only counted.
MOST_ATTEMPTS: Final = 32

_SERVICE: Final = query_pb2.DESCRIPTOR.services_by_name["QueryService"].full_name
_CALLERS: Final = TraceContextTextMapPropagator()
_TRACE_HEADERS: Final = frozenset({"traceparent"})
# Codes that OpenTelemetry's conventions count as a server's errors; the others are the caller's fault, or no fault.
_ERRORS: Final = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)


class QuerySpan:
    """The span of one query, from its arrival to `ended`."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        self._reads = 0
        self._asked = 0
        self._fallbacks = 0
        self._source = ""
        self._staleness_us = -1
        self._degraded: set[str] = set()

    def answered(self, routed: Routed[Any], began_ns: int) -> None:
        """A read of the query was answered; `began_ns` is the system's clock when it was begun."""
        self._reads += 1
        if routed.staleness_us > self._staleness_us:
            self._staleness_us = routed.staleness_us
            self._source = source_name(routed.proof.kind, routed.proof.name)
        self._degraded.update(d.reason.name.lower() for d in routed.proof.degraded)
        below = set_span_in_context(self._span, Context())
        now_ns, at_ns = time_ns(), began_ns
        for attempt in routed.attempts:
            cause = cause_of(attempt)
            self._asked += 1
            self._fallbacks += cause is not None
            # Failed attempts ran one after another; those that answered, one or two, have only just ended.
            took_ns = attempt.duration_us * 1000
            start_ns = at_ns if cause is not None else max(at_ns, now_ns - took_ns)
            end_ns = min(now_ns, start_ns + took_ns)
            if cause is not None:
                at_ns = end_ns
            if self._asked <= MOST_ATTEMPTS:
                name = source_name(attempt.kind, attempt.name)
                attributes = {"atlasco.source": name} | ({"atlasco.cause": cause} if cause is not None else {})
                self._tracer.start_span(f"ask {name}", below, attributes=attributes, start_time=start_ns).end(end_ns)

    def ended(self, code: grpc.StatusCode, reason: str, tier: str, max_staleness_us: int | None) -> None:
        """The query is over. `reason` is its refusal's, or empty; the bound is None if it was never known."""
        attributes: dict[str, Any] = {"rpc.response.status_code": code.name, "atlasco.tier": tier}
        if max_staleness_us is not None:
            attributes["atlasco.max_staleness_us"] = max_staleness_us
        if self._reads:
            attributes |= {
                "atlasco.reads": self._reads,
                "atlasco.source": self._source,
                "atlasco.staleness_us": self._staleness_us,
                "atlasco.attempts": self._asked,
                "atlasco.fallbacks": self._fallbacks,
                "atlasco.degraded": sorted(self._degraded),
            }
        if code is not grpc.StatusCode.OK:
            attributes["error.type"] = reason or code.name
        self._span.set_attributes(attributes)
        if code in _ERRORS:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


def query_span(tracer: Tracer, method: str, context: RpcContext) -> QuerySpan | None:
    """Begin the span of a call, below the caller's own where its metadata names one (W3C Trace Context).

    None: it is not recorded, because the caller's trace is not sampled.
    """
    metadata = context.invocation_metadata() or ()
    carrier = {key: value for key, value in metadata if key in _TRACE_HEADERS and isinstance(value, str)}
    # From an empty context: a span that happens to be open in this process must not become the parent.
    parent = _CALLERS.extract(carrier, Context()) if carrier else Context()
    name = f"{_SERVICE}/{method}"
    span = tracer.start_span(name, parent, SpanKind.SERVER, attributes={"rpc.system.name": "grpc", "rpc.method": name})
    return QuerySpan(tracer, span) if span.is_recording() else None
