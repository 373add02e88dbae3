"""Planning: from what is asked, what was measured last and the clock to an order in which to try sources.

Pure: no I/O, no clock of its own, nothing remembered. A plan promises nothing about freshness: it says where to try
first, and what each source will have to prove in the snapshot of its data.

The rules, in this order, for each source:

 1. It can answer this kind of question at all.
 2. It is available: its circuit breaker is closed.
 3. It can prove a read token, if there is one.
 4. It is fresh enough, by its last watermark. A source that follows the primary by itself (a replica) is expected to
    lag as much as it did; one that moves in steps (the warehouse) is expected not to have moved. The
    primary always is: a read that begins after the question arrived sees all that was committed before.

Those that are left come cheapest first, as `_order` says. Behind them, where the caller takes degraded answers, come
those that failed on freshness alone, the freshest first.

Whether a source still holds the range is not among the rules: that depends on the tenant, and its snapshot tells.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from itertools import takewhile

from router.clock import Instant
from storage.times import DAY_US


class SourceKind(StrEnum):
    """What an answer can come from; see Provenance.Source in query.proto.

    Rollups and projections lie in the databases, which use them by themselves where they are fresh enough, by a
    watermark of their own in the snapshot of the data; an answer names them. Rollups of replicas are planned for too,
    where a question would otherwise go to the warehouse.
    """

    PRIMARY = "primary"
    REPLICA = "replica"
    ROLLUP = "rollup"
    PROJECTION = "projection"
    WAREHOUSE = "warehouse"
    SPLIT = "split"


class Shape(Enum):
    """What kind of question it is."""

    LOOKUP = "latest values of named devices"
    SCAN = "readings of a range"
    AGGREGATE = "readings of a range, summed up"
    SEARCH = "devices by conditions"
    LIST = "metadata"


_ABLE: Mapping[SourceKind, frozenset[Shape]] = {
    SourceKind.PRIMARY: frozenset(Shape),
    SourceKind.REPLICA: frozenset(Shape),
    SourceKind.ROLLUP: frozenset({Shape.AGGREGATE}),
    SourceKind.WAREHOUSE: frozenset({Shape.SCAN, Shape.AGGREGATE}),
    SourceKind.SPLIT: frozenset({Shape.SCAN, Shape.AGGREGATE}),
}


@dataclass(frozen=True, slots=True)
class Need:
    """How fresh an answer must be."""

    max_staleness_us: int = 0
    # The transaction whose writes must be seen.
    token: int | None = None
    allow_degraded: bool = False
    explain: bool = False


@dataclass(frozen=True, slots=True)
class Policy:
    """What the planner goes by. Microseconds."""

    # From this bound on a question is analytical: the warehouse before any database.
    analytical_us: int = 900_000_000
    # From this bound on the warehouse is worth asking at all, and first for long ranges.
    report_us: int = 30_000_000
    # A range of this length is long.
    long_range_us: int = DAY_US


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of a source now."""

    kind: SourceKind
    name: str
    available: bool = True
    # Complete up to here, when measured; None: not known.
    as_of_us: int | None = None
    # The primary's clock at that time, at most; needed only where the source follows the primary by itself.
    measured_us: int | None = None
    # Why it is not available, or what the watermark was made from.
    reason: str = ""
    # The database that it lies in, for rollups.
    host: str = ""


@dataclass(frozen=True, slots=True)
class Inquiry:
    """What is asked, when, and how fresh. The range is None for questions without one."""

    shape: Shape
    need: Need
    # On the primary's clock; None when that was never measured.
    arrival: Instant | None
    start_us: int | None = None
    end_us: int | None = None
    # The kinds of source that the question has an answer for.
    able: frozenset[SourceKind] = frozenset(SourceKind)
    # Spreads questions over replicas that are equally good.
    turn: int = 0

    @property
    def needed_as_of_us(self) -> int | None:
        """What an answer must be complete up to; None when it cannot be said on the primary's clock."""
        return None if self.arrival is None else self.arrival.latest_us - self.need.max_staleness_us


@dataclass(frozen=True, slots=True)
class Verdict:
    """One source as the planner saw it."""

    standing: Standing
    # Its place in the plan, from 0; None: passed over.
    place: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class Step:
    """A source to try."""

    kind: SourceKind
    name: str
    # The caller takes an answer that is older than asked from it.
    stale: bool = False
    # The question belongs to another source: admitted in limited numbers only.
    fallback: bool = False
    # As in Standing.
    host: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Sources to try in order, until one proves what is needed."""

    inquiry: Inquiry
    steps: Sequence[Step]
    verdicts: Sequence[Verdict] = field(default=())


@dataclass(frozen=True, slots=True)
class Unplannable:
    """No source may be tried; `reasons` says why by source."""

    inquiry: Inquiry
    verdicts: Sequence[Verdict]

    @property
    def reasons(self) -> dict[str, str]:
        """Why each source was passed over, by name."""
        return {verdict.standing.name: verdict.reason for verdict in self.verdicts}


def plan(inquiry: Inquiry, standings: Iterable[Standing], policy: Policy) -> Plan | Unplannable:
    """The order in which to try sources, or why none may be tried."""
    ordered = _order(inquiry, list(standings), policy)
    good: list[Standing] = []
    stale: list[Standing] = []
    reasons: dict[str, str] = {}
    for standing in ordered:
        obstacle = _obstacle(inquiry, standing)
        if obstacle is not None:
            reasons[standing.name] = obstacle
            continue
        fresh, reasons[standing.name] = _freshness(inquiry, standing)
        (good if fresh else stale).append(standing)
    chosen = list(good)
    if inquiry.need.allow_degraded:
        # Rollups are not among them: they are used where they are fresh enough, or not at all.
        second = (s for s in stale if s.kind is not SourceKind.ROLLUP)
        chosen += sorted(second, key=lambda s: s.as_of_us or 0, reverse=True)
    # Only questions that another source is there for are kept away from the primary when that source fails; one that
    # would be asked after the primary is not there for them.
    before = takewhile(lambda s: s.kind is not SourceKind.PRIMARY, ordered)
    elsewhere = inquiry.need.max_staleness_us > 0 and any(_is_able(inquiry, s.kind) for s in before)
    steps = [
        Step(s.kind, s.name, stale=s in stale, fallback=elsewhere and s.kind is SourceKind.PRIMARY, host=s.host)
        for s in chosen
    ]
    places = {step.name: place for place, step in enumerate(steps)}
    verdicts = [Verdict(s, places.get(s.name), reasons[s.name]) for s in ordered]
    return Plan(inquiry, steps, verdicts) if steps else Unplannable(inquiry, verdicts)


def _order(inquiry: Inquiry, standings: Sequence[Standing], policy: Policy) -> list[Standing]:
    """Cheapest first, for this question.

    For analysis rollups of a replica, which have few rows to read if they answer it at all, then the warehouse, which
    costs the databases nothing, then the split, which costs them little. For everything else the replicas, the
    primary, and only then the warehouse, whose every answer takes the opening of files; in between, it relieves the
    primary where no replica does. Rollups are no source of their own there: the databases use them by themselves.
    """
    bound = inquiry.need.max_staleness_us
    long = (
        inquiry.start_us is not None
        and inquiry.end_us is not None
        and (inquiry.end_us - inquiry.start_us >= policy.long_range_us)
    )
    warehouse = [SourceKind.WAREHOUSE, SourceKind.SPLIT]
    if bound >= policy.analytical_us or (bound >= policy.report_us and long):
        kinds = [*warehouse, SourceKind.REPLICA, SourceKind.PRIMARY]
        if inquiry.shape is Shape.AGGREGATE:
            kinds.insert(0, SourceKind.ROLLUP)
    elif bound >= policy.report_us:
        kinds = [SourceKind.REPLICA, SourceKind.WAREHOUSE, SourceKind.PRIMARY, SourceKind.SPLIT]
    else:
        kinds = [SourceKind.REPLICA, SourceKind.PRIMARY, *warehouse]
    ordered: list[Standing] = []
    for kind in kinds:
        of_kind = sorted((s for s in standings if s.kind is kind), key=lambda s: s.name)
        start = inquiry.turn % len(of_kind) if of_kind else 0
        ordered += of_kind[start:] + of_kind[:start]
    return ordered


def _is_able(inquiry: Inquiry, kind: SourceKind) -> bool:
    return kind in inquiry.able and inquiry.shape in _ABLE[kind]


# Sources whose snapshot tells which transactions it holds; the split's newer part is such a snapshot, and its seam
# lies below everything that the older part may lack.
_KNOWS_TRANSACTIONS = frozenset({SourceKind.PRIMARY, SourceKind.REPLICA, SourceKind.SPLIT})


def _obstacle(inquiry: Inquiry, standing: Standing) -> str | None:
    """Why a source cannot answer at all, whatever its freshness."""
    if not _is_able(inquiry, standing.kind):
        return "does not answer this kind of question"
    if not standing.available:
        return standing.reason or "not available"
    if inquiry.need.token is not None and standing.kind not in _KNOWS_TRANSACTIONS:
        return "cannot prove a read token"
    return None


def _freshness(inquiry: Inquiry, standing: Standing) -> tuple[bool, str]:
    """Whether the source is expected to be fresh enough, and why."""
    bound = inquiry.need.max_staleness_us
    if standing.kind in (SourceKind.PRIMARY, SourceKind.SPLIT):
        return True, "begins after the question arrived"
    if standing.as_of_us is None:
        return False, standing.reason or "its watermark is not known"
    if inquiry.needed_as_of_us is None:
        return False, "the primary's clock was not measured yet"
    if standing.kind in (SourceKind.REPLICA, SourceKind.ROLLUP):
        if standing.as_of_us > (standing.measured_us or 0):
            return False, "its heartbeat is later than the primary's clock, so it proves nothing"
        lag = max(0, (standing.measured_us or 0) - standing.as_of_us)
        return lag <= bound and bound > 0, f"lags {lag / 1000:.1f} ms; {bound / 1000:.1f} ms are allowed"
    behind = inquiry.needed_as_of_us - standing.as_of_us
    if behind <= 0:
        return True, f"complete {-behind / 1e6:.3f} s beyond what is needed"
    return False, f"complete {behind / 1e6:.3f} s short of what is needed"
