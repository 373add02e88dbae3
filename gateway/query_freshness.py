"""Freshness: what a request asks for, and what an answer has."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from atlasco.telemetry.v1 import query_pb2

from gateway.status import Reason, field_invalid
from router.clock import Instant
from router.outcome import Routed
from router.plan import Need, Plan, SourceKind, Standing, Unplannable
from router.tiers import DegradedReason
from storage.times import DAY_US

# A year: a longer bound is as good as none, and times computed with it could overflow 64 bits.
_LONGEST_STALENESS_US: Final = 366 * DAY_US
_TOKEN_BYTES: Final = 8

SOURCES: Final["Mapping[SourceKind, query_pb2.Provenance.Source.ValueType]"] = {
    SourceKind.PRIMARY: query_pb2.Provenance.SOURCE_PRIMARY,
    SourceKind.REPLICA: query_pb2.Provenance.SOURCE_REPLICA,
    SourceKind.ROLLUP: query_pb2.Provenance.SOURCE_ROLLUP,
    SourceKind.PROJECTION: query_pb2.Provenance.SOURCE_PROJECTION,
    SourceKind.WAREHOUSE: query_pb2.Provenance.SOURCE_WAREHOUSE,
    SourceKind.SPLIT: query_pb2.Provenance.SOURCE_SPLIT,
}

_TIER_NAMES: Final["Mapping[query_pb2.Tier.ValueType, str]"] = {
    query_pb2.TIER_CRITICAL: "critical",
    query_pb2.TIER_DASHBOARD: "dashboard",
    query_pb2.TIER_REPORT: "report",
    query_pb2.TIER_ANALYTICS: "analytics",
}

_DEGRADED: Final = {
    DegradedReason.STALE: query_pb2.Degradation.REASON_STALE,
    DegradedReason.READ_TOKEN_UNPROVEN: query_pb2.Degradation.REASON_READ_TOKEN_UNPROVEN,
    DegradedReason.INCOMPLETE: query_pb2.Degradation.REASON_INCOMPLETE,
    DegradedReason.RANGE_CUT: query_pb2.Degradation.REASON_RANGE_CUT,
    DegradedReason.NO_WAREHOUSE: query_pb2.Degradation.REASON_NO_WAREHOUSE,
}


@dataclass(frozen=True, slots=True)
class TierBounds:
    """How stale an answer of each tier may be, in seconds; each at least the one before."""

    critical_s: float = 0.0
    dashboard_s: float = 0.1
    report_s: float = 30.0
    analytics_s: float = 900.0

    def microseconds(self) -> "dict[query_pb2.Tier.ValueType, int]":
        """The bounds by the protocol's tiers."""
        return {
            query_pb2.TIER_CRITICAL: int(self.critical_s * 1e6),
            query_pb2.TIER_DASHBOARD: int(self.dashboard_s * 1e6),
            query_pb2.TIER_REPORT: int(self.report_s * 1e6),
            query_pb2.TIER_ANALYTICS: int(self.analytics_s * 1e6),
        }


def need_of(freshness: query_pb2.Freshness, tiers: "Mapping[query_pb2.Tier.ValueType, int]") -> Need:
    """The freshness that a request needs.

    Raises:
        Refusal: FRESHNESS_INVALID.
    """
    bound = freshness.WhichOneof("bound")
    staleness_us = tiers[query_pb2.TIER_CRITICAL]
    if bound == "tier" and freshness.tier:
        if freshness.tier not in tiers:
            raise field_invalid("freshness.tier", f"{freshness.tier} is not a tier", Reason.FRESHNESS_INVALID)
        staleness_us = tiers[freshness.tier]
    elif bound == "max_staleness_us":
        staleness_us = freshness.max_staleness_us
        if not 0 <= staleness_us <= _LONGEST_STALENESS_US:
            problem = f"must be 0 to {_LONGEST_STALENESS_US}, not {staleness_us}"
            raise field_invalid("freshness.max_staleness_us", problem, Reason.FRESHNESS_INVALID)
    token = None
    if freshness.read_token:
        if len(freshness.read_token) != _TOKEN_BYTES:
            raise field_invalid(
                "freshness.read_token", "is not one that an ack or a write returned", Reason.FRESHNESS_INVALID
            )
        token = int.from_bytes(freshness.read_token, "big")
    return Need(staleness_us, token, freshness.allow_degraded, freshness.explain)


def tier_of(freshness: query_pb2.Freshness, tiers: "Mapping[query_pb2.Tier.ValueType, int]") -> str:
    """The tier that a request belongs to, for operators: the one it names, or the tightest whose bound allows as much
    staleness as it does. `tiers` come tightest first; `need_of` must have accepted the request.
    """
    if freshness.WhichOneof("bound") == "max_staleness_us":
        asked_us = freshness.max_staleness_us
        allows = (tier for tier, bound_us in tiers.items() if bound_us >= asked_us)
        return _TIER_NAMES[next(allows, query_pb2.TIER_ANALYTICS)]
    return _TIER_NAMES[freshness.tier or query_pb2.TIER_CRITICAL]


def provenance(routed: Routed[Any]) -> query_pb2.Provenance:
    """Where an answer came from, and how fresh it is."""
    proof = routed.proof
    message = query_pb2.Provenance(
        source=SOURCES[proof.kind],
        as_of_us=proof.as_of_us,
        complete_from_us=proof.complete_from_us or 0,
        staleness_us=routed.staleness_us,
        degraded=[query_pb2.Degradation(reason=_DEGRADED[d.reason], text=d.text) for d in proof.degraded],
    )
    if routed.plan.inquiry.need.explain:
        message.plan.CopyFrom(_plan_message(routed))
    return message


def _plan_message(routed: Routed[Any]) -> query_pb2.Plan:
    inquiry = routed.plan.inquiry
    arrival = inquiry.arrival or Instant(0, 0)
    return query_pb2.Plan(
        max_staleness_us=inquiry.need.max_staleness_us,
        arrival_us=arrival.latest_us,
        uncertainty_us=arrival.uncertainty_us,
        needed_as_of_us=inquiry.needed_as_of_us or 0,
        candidates=[
            query_pb2.PlanCandidate(
                source=SOURCES[verdict.standing.kind],
                name=verdict.standing.name,
                as_of_us=verdict.standing.as_of_us or 0,
                chosen=verdict.place == 0,
                reason=verdict.reason,
            )
            for verdict in routed.plan.verdicts
        ],
        steps=[
            query_pb2.PlanStep(
                source=SOURCES[attempt.kind],
                name=attempt.name,
                start_time_us=attempt.start_us or 0,
                end_time_us=attempt.end_us or 0,
                as_of_us=attempt.as_of_us or 0,
                failure=attempt.failure,
                duration_us=attempt.duration_us,
            )
            for attempt in routed.attempts
        ],
    )


def source_messages(standings: Iterable[Standing], now: Instant | None) -> list[query_pb2.SourceFreshness]:
    """Every source as last measured; rollups and the split lie in other sources, and are left out."""
    return [
        query_pb2.SourceFreshness(
            source=SOURCES[standing.kind],
            name=standing.name,
            available=standing.available,
            as_of_us=standing.as_of_us or 0,
            staleness_us=0 if now is None or not standing.as_of_us else max(0, now.latest_us - standing.as_of_us),
            reason=standing.reason,
        )
        for standing in standings
        if standing.kind not in (SourceKind.SPLIT, SourceKind.ROLLUP)
    ]


def tier_message(
    tier: "query_pb2.Tier.ValueType", staleness_us: int, scan: Plan | Unplannable, lookup: Plan | Unplannable
) -> query_pb2.TierFreshness:
    """The sources that a tier's queries would get now."""
    return query_pb2.TierFreshness(
        tier=tier,
        max_staleness_us=staleness_us,
        scan_source=_first(scan),
        lookup_source=_first(lookup),
        reason="; ".join(f"{verdict.standing.name}: {verdict.reason}" for verdict in scan.verdicts),
    )


def _first(planned: Plan | Unplannable) -> "query_pb2.Provenance.Source.ValueType":
    if isinstance(planned, Unplannable):
        return query_pb2.Provenance.SOURCE_UNSPECIFIED
    return SOURCES[planned.steps[0].kind]
