"""Questions, their sources and what came of them."""

from collections.abc import Mapping
from typing import Final

from runtime.metric_definitions.model import LATENCY_BUCKETS, MetricDefinition, counter, gauge, histogram
from runtime.metric_definitions.names import MetricName

STALENESS_BUCKETS: Final = (
    0.001,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    5.0,
    15.0,
    30.0,
    60.0,
    300.0,
    900.0,
    1800.0,
    3600.0,
)
"""Seconds, with the default bounds of the tiers among them."""

TIERS: Final = ("critical", "dashboard", "report", "analytics")
"""Values of the label `tier`: the tier that was named, or the tightest one whose bound allows the staleness asked."""

ANSWER_SOURCES: Final = ("primary", "replica", "rollup", "projection", "warehouse", "split")
"""Values of the label `source` of answers: the kinds in Provenance.Source."""

QUERIES: Final[Mapping[MetricName, MetricDefinition]] = {
    "atlasco_query_requests": counter(
        "{request}",
        "Queries, by method and gRPC status.",
        "DEADLINE_EXCEEDED: see query duration. RESOURCE_EXHAUSTED: queries exceed their concurrency.",
        {"method": (), "status": ()},
    ),
    "atlasco_query_duration_seconds": histogram(
        "s",
        "From a query's arrival to its answer, by method and tier; `none`: no tier was asked, or the query was "
        "refused before.",
        "Look at the pool's waiting first, then at the statement's plan.",
        LATENCY_BUCKETS,
        {"method": (), "tier": (*TIERS, "none")},
    ),
    "atlasco_query_answers": counter(
        "{answer}",
        "Reads that were answered, by method, tier and what answered; an export counts each of its pages.",
        "Dashboards from the primary while there are replicas: see fallbacks and the sources' staleness.",
        {"method": (), "tier": TIERS, "source": ANSWER_SOURCES},
    ),
    "atlasco_query_degraded": counter(
        "{answer}",
        "Answers that were worse than asked and said so, by reason; one with two reasons counts in both.",
        "stale, read_token_unproven: no source was fresh enough. incomplete: dead letters. no_warehouse: a "
        "database answered in its place. range_cut: the caller asked for more than retention keeps.",
        {"reason": ("stale", "read_token_unproven", "incomplete", "range_cut", "no_warehouse")},
    ),
    "atlasco_query_fallbacks": counter(
        "{attempt}",
        "Attempts to read that failed before another source answered, by the source's kind and cause. Queries that "
        "nobody answered are in the queries' status alone.",
        "unproven: the snapshot was older than asked (rollup: or they do not answer it, which is ordinary). "
        "unavailable: it is down. busy: no connection or place was free. conflict: replay cancelled it. range: it "
        "no longer keeps the beginning.",
        {
            "source": ("primary", "replica", "rollup", "warehouse", "split"),
            "cause": ("unproven", "unavailable", "busy", "conflict", "range"),
        },
    ),
    "atlasco_query_staleness_seconds": histogram(
        "s",
        "How old an answer may be: its query's arrival minus as_of, with the clocks' uncertainty, by what "
        "answered; 0 from the primary.",
        "Near the tier's bound: the source lags; see its staleness.",
        STALENESS_BUCKETS,
        {"source": ANSWER_SOURCES},
    ),
    "atlasco_exports_open": gauge(
        "{export}",
        "Exports that are being read by their clients.",
        "Many, and few answers to ExportSeries: the clients take their time.",
    ),
    "atlasco_exports_unread": counter(
        "{export}",
        "Exports that were ended because their client left a message unread for ATLASCO_EXPORT_PATIENCE.",
        "A client forgets to read or cancel what it opens: the gateway's log names its tenant.",
    ),
    "atlasco_source_available": gauge(
        "1",
        "1 while this gateway asks a source (primary, replica-1, …, warehouse), 0 while its circuit breaker is open.",
        "0: the gateway's log says why (`source failed`); the others answer meanwhile.",
        {"source": ()},
    ),
    "atlasco_source_staleness_seconds": gauge(
        "s",
        "Age of the moment through which a replica or the warehouse was complete when it was measured last; absent "
        "until known.",
        "A replica above a second: replication or replay is held up. The warehouse: see the loader's lag.",
        {"source": ()},
    ),
    "atlasco_clock_uncertainty_seconds": gauge(
        "s",
        "How far apart the bounds are between which this gateway knows the primary's clock; absent until known. "
        "Counted against the freshness of every source but the primary.",
        "Above 10 ms: heartbeats on the primary are slow or missing; replicas then prove less than they hold.",
    ),
    "atlasco_fallback_queries": gauge(
        "{query}",
        "Queries of other sources that run on the primary now.",
        "Near its limit: further ones are refused (FALLBACK_CONCURRENCY), so that writes keep their share.",
    ),
    "atlasco_fallback_queries_limit": gauge(
        "{query}",
        "The most such queries at once: ATLASCO_MAX_FALLBACK_QUERIES.",
        "Raise it only where the primary has room; mend the source first.",
    ),
}
