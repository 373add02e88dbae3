"""One query from its arrival to its end: its reads go through here, and it is counted, timed and traced."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter, time_ns
from typing import TypeVar

import grpc
from atlasco.telemetry.v1 import query_pb2
from opentelemetry.trace import Tracer

from gateway.query_freshness import need_of, tier_of
from gateway.query_metrics import AnswerMetrics
from gateway.query_spans import QuerySpan, RpcContext, query_span
from gateway.status import Refusal
from router.execute import Router
from router.outcome import Routed
from router.tiers import Question
from runtime.metrics import Metrics

A = TypeVar("A")

# Value of the label `tier` of a query that reads nothing, or ended before its tier was known.
_NO_TIER = "none"


class Call:
    """A query under way. Its status is CANCELLED until `done` or `refused` says otherwise."""

    def __init__(
        self, calls: "QueryCalls", method: str, timeout_s: Callable[[], float], span: QuerySpan | None
    ) -> None:
        self._calls = calls
        self._method = method
        self._timeout_s = timeout_s
        self.span = span
        self.code = grpc.StatusCode.CANCELLED
        self.reason = ""
        self.tier = _NO_TIER
        self.max_staleness_us: int | None = None

    async def read(self, tenant: str, question: Question[A], freshness: query_pb2.Freshness) -> Routed[A]:
        """An answer that is as fresh as the request says.

        Raises:
            Refusal: FRESHNESS_INVALID.
            StorageError: as `Router.read`.
        """
        need = need_of(freshness, self._calls.tiers)
        self.tier = tier_of(freshness, self._calls.tiers)
        self.max_staleness_us = need.max_staleness_us
        began_ns = 0 if self.span is None else time_ns()
        routed = await self._calls.router.read(tenant, question, need, self._timeout_s())
        self._calls.answers.answered(self._method, self.tier, routed)
        if self.span is not None:
            self.span.answered(routed, began_ns)
        return routed

    def done(self) -> None:
        """The query was answered."""
        self.code = grpc.StatusCode.OK

    def refused(self, refusal: Refusal) -> None:
        """The query ends with this refusal."""
        self.code, self.reason = refusal.code, refusal.reason


class QueryCalls:
    """Makes the calls of a service. `tracer` is None when tracing is off, which then costs nothing."""

    def __init__(
        self,
        router: Router,
        tiers: "Mapping[query_pb2.Tier.ValueType, int]",
        metrics: Metrics,
        tracer: Tracer | None = None,
    ) -> None:
        self.router = router
        self.tiers = tiers
        self.answers = AnswerMetrics(metrics)
        self._metrics = metrics
        self._tracer = tracer

    @contextmanager
    def call(self, method: str, context: RpcContext, timeout_s: Callable[[], float]) -> Iterator[Call]:
        """Run the block as one call; `timeout_s` says how long, in seconds, its next read may take."""
        started = perf_counter()
        span = None if self._tracer is None else query_span(self._tracer, method, context)
        call = Call(self, method, timeout_s, span)
        try:
            yield call
        finally:
            took_s = perf_counter() - started
            self._metrics.count("atlasco_query_requests", method=method, status=call.code.name)
            self._metrics.observe("atlasco_query_duration_seconds", took_s, method=method, tier=call.tier)
            if span is not None:
                span.ended(call.code, call.reason, call.tier, call.max_staleness_us)
