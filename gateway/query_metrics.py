"""Where queries go, as operators see it: which source answered, how old the answer is, what failed on the way.

Everything is computed from the router's account of an answer, so the numbers agree with the provenance that callers
get. No label contains a tenant, a device, or any other name that a tenant chose.
"""

import time
from collections.abc import Callable
from typing import Any, Final

from gateway.query_episodes import Episode
from router.clock import PrimaryClock
from router.execute import Router
from router.outcome import Attempt, FallbackBusy, Routed
from router.plan import SourceKind, Standing
from router.tiers import DegradedReason, RangeNotHeld, Unproven
from runtime.metrics import Metrics
from storage.errors import StorageBusy, StorageError, StorageUnavailable, TransactionConflict

# The first match counts, so a class comes before its base classes.
_CAUSES: Final[tuple[tuple[type[StorageError], str], ...]] = (
    (RangeNotHeld, "range"),
    (Unproven, "unproven"),
    (FallbackBusy, "busy"),
    (StorageBusy, "busy"),
    (StorageUnavailable, "unavailable"),
    (TransactionConflict, "conflict"),
)
_DEGRADED: Final = {reason: reason.name.lower() for reason in DegradedReason}
# Kinds that are not servers of their own; the server they are in is reported.
_DERIVED: Final = frozenset({SourceKind.SPLIT, SourceKind.ROLLUP, SourceKind.PROJECTION})


class AnswerMetrics:
    """Counts answers; logs when queries begin to fall back or answers to be degraded, and when that ends."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._falling_back = Episode("queries fall back", "queries no longer fall back", clock)
        self._degraded = Episode("answers are degraded", "answers are no longer degraded", clock)

    def answered(self, method: str, tier: str, routed: Routed[Any]) -> None:
        """Count one read; each page of an export is one."""
        proof = routed.proof
        source = proof.kind.value
        self._metrics.count("atlasco_query_answers", method=method, tier=tier, source=source)
        if proof.kind is SourceKind.PRIMARY or routed.plan.inquiry.arrival is not None:
            # Without an arrival on the primary's clock nobody knows how old the answer is.
            self._metrics.observe("atlasco_query_staleness_seconds", routed.staleness_us / 1e6, source=source)
        for degradation in proof.degraded:
            self._metrics.count("atlasco_query_degraded", reason=_DEGRADED[degradation.reason])
        for attempt in routed.attempts:
            cause = cause_of(attempt)
            if cause is not None:
                self._metrics.count("atlasco_query_fallbacks", source=attempt.kind.value, cause=cause)
        self._falling_back.noted(_fell_back(routed))
        # A range that begins before what is kept is the caller's choice, not a condition of the service.
        worse = (_DEGRADED[d.reason] for d in proof.degraded if d.reason is not DegradedReason.RANGE_CUT)
        self._degraded.noted(next(worse, None))


def cause_of(attempt: Attempt) -> str | None:
    """Why an attempt failed, as a value of the label `cause`; None: it did not fail."""
    if attempt.cause is None:
        return None
    return next((cause for error, cause in _CAUSES if issubclass(attempt.cause, error)), "unavailable")


def source_name(kind: SourceKind, name: str) -> str:
    """A source's name for operators: the server's where there are several, never one that a tenant chose."""
    return name if kind is SourceKind.REPLICA else kind.value


def _fell_back(routed: Routed[Any]) -> str | None:
    """Why the first source did not answer, or the primary answered in place of a replica; None: neither happened."""
    for attempt in routed.attempts:
        cause = cause_of(attempt)
        # A rollup is asked on the chance that it holds the aggregate; that it does not is no fallback.
        if cause is not None and attempt.kind is not SourceKind.ROLLUP:
            return f"{source_name(attempt.kind, attempt.name)} {cause}"
    plan = routed.plan
    if routed.proof.kind is SourceKind.PRIMARY and plan.inquiry.need.max_staleness_us > 0:
        for verdict in plan.verdicts:
            if verdict.standing.kind is SourceKind.REPLICA:
                return f"{verdict.standing.name} {'stale' if verdict.standing.available else 'unavailable'}"
    return None


def report_sources(metrics: Metrics, router: Router, clock: PrimaryClock, fallback_limit: int) -> None:
    """Register gauges on every source of `router`; they are read whenever the metrics are collected."""

    def standing(name: str) -> Standing:
        return next(found for found in router.standings() if found.name == name)

    def staleness_s(name: str) -> float:
        now, as_of_us = clock.now(), standing(name).as_of_us
        if now is None or as_of_us is None:
            raise LookupError
        return max(0, now.latest_us - as_of_us) / 1e6

    def uncertainty_s() -> float:
        now = clock.now()
        if now is None:
            raise LookupError
        return now.uncertainty_us / 1e6

    for found in router.standings():
        if found.kind in _DERIVED:
            continue
        name = found.name
        metrics.gauge("atlasco_source_available", lambda n=name: float(standing(n).available), source=name)  # type: ignore[misc]
        if found.kind is not SourceKind.PRIMARY:
            metrics.gauge("atlasco_source_staleness_seconds", lambda n=name: staleness_s(n), source=name)  # type: ignore[misc]
    metrics.gauge("atlasco_clock_uncertainty_seconds", uncertainty_s)
    metrics.gauge("atlasco_fallback_queries", lambda: float(router.fallbacks.running))
    metrics.gauge("atlasco_fallback_queries_limit", lambda: float(fallback_limit))
