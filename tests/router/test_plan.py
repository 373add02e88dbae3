"""The planner against a brute-force reading of its rules, and every reason why a source is passed over."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.clock import Instant, PrimaryClock
from router.plan import Inquiry, Need, Plan, Policy, Shape, SourceKind, Standing, Unplannable, plan
from storage.times import DAY_US

NOW = 1_800_000_000_000_000
POLICY = Policy()

times = st.integers(NOW - 40_000_000, NOW)
needs = st.builds(
    Need,
    max_staleness_us=st.sampled_from([0, 1, 100_000, 30_000_000, 900_000_000]) | st.integers(0, 2 * 900_000_000),
    token=st.none() | st.integers(0, 100),
    allow_degraded=st.booleans(),
)


@st.composite
def inquiries(draw: st.DrawFn) -> Inquiry:
    shape = draw(st.sampled_from(Shape))
    start = end = None
    if shape in (Shape.SCAN, Shape.AGGREGATE):
        start = NOW - draw(st.integers(1, 3 * DAY_US))
        end = start + draw(st.integers(1, 3 * DAY_US))
    arrival = draw(st.none() | st.builds(lambda u: Instant(NOW - u, NOW), st.integers(0, 1000)))
    able = frozenset(draw(st.sets(st.sampled_from(SourceKind)))) | {SourceKind.PRIMARY}
    return Inquiry(shape, draw(needs), arrival, start, end, able, draw(st.integers(0, 5)))


@st.composite
def all_standings(draw: st.DrawFn) -> list[Standing]:
    names = {
        "primary": SourceKind.PRIMARY,
        "replica-1": SourceKind.REPLICA,
        "replica-2": SourceKind.REPLICA,
        "rollups of replica-1": SourceKind.ROLLUP,
        "warehouse": SourceKind.WAREHOUSE,
        "split": SourceKind.SPLIT,
    }
    chosen = draw(st.sets(st.sampled_from(sorted(names))))
    return [
        Standing(
            names[name],
            name,
            draw(st.booleans()),
            draw(st.none() | times),
            draw(times),
            "why",
        )
        for name in sorted(chosen)
    ]


def considered(inquiry: Inquiry, standings: list[Standing]) -> list[Standing]:
    """All but rollups, which are planned for only where an aggregate would go to the warehouse."""
    bound = inquiry.need.max_staleness_us
    range_us = (inquiry.end_us or 0) - (inquiry.start_us or 0)
    behind_log = bound >= POLICY.analytical_us or (bound >= POLICY.report_us and range_us >= POLICY.long_range_us)
    rolled = inquiry.shape is Shape.AGGREGATE and behind_log
    return [s for s in standings if rolled or s.kind is not SourceKind.ROLLUP]


def good(inquiry: Inquiry, standing: Standing) -> tuple[bool, bool]:
    """(usable at all, fresh enough), word for word from the rules."""
    able = {
        SourceKind.PRIMARY: set(Shape),
        SourceKind.REPLICA: set(Shape),
        SourceKind.ROLLUP: {Shape.AGGREGATE},
        SourceKind.WAREHOUSE: {Shape.SCAN, Shape.AGGREGATE},
        SourceKind.SPLIT: {Shape.SCAN, Shape.AGGREGATE},
    }
    usable = inquiry.shape in able[standing.kind] and standing.kind in inquiry.able and standing.available
    proves = {SourceKind.PRIMARY, SourceKind.REPLICA, SourceKind.SPLIT}
    usable = usable and (inquiry.need.token is None or standing.kind in proves)
    if standing.kind in (SourceKind.PRIMARY, SourceKind.SPLIT):
        return usable, True
    if standing.as_of_us is None or inquiry.arrival is None:
        return usable, False
    bound = inquiry.need.max_staleness_us
    if standing.kind in (SourceKind.REPLICA, SourceKind.ROLLUP):
        assert standing.measured_us is not None
        return usable, bound > 0 and 0 <= standing.measured_us - standing.as_of_us <= bound
    return usable, standing.as_of_us >= inquiry.arrival.latest_us - bound


@settings(max_examples=300, deadline=None)
@given(inquiries(), all_standings())
def test_a_plan_holds_what_the_rules_allow_and_nothing_else(inquiry: Inquiry, standings: list[Standing]) -> None:
    made = plan(inquiry, standings, POLICY)
    standings = considered(inquiry, standings)
    fresh = {s.name for s in standings if good(inquiry, s) == (True, True)}
    stale = {s.name for s in standings if good(inquiry, s) == (True, False) and s.kind is not SourceKind.ROLLUP}
    wanted = fresh | (stale if inquiry.need.allow_degraded else set())
    assert {v.standing.name for v in made.verdicts} == {s.name for s in standings}
    assert all(v.reason for v in made.verdicts)
    if isinstance(made, Unplannable):
        assert not wanted
        assert set(made.reasons) == {s.name for s in standings}
        return
    assert {step.name for step in made.steps} == wanted
    assert len(made.steps) == len(wanted)
    assert {step.name for step in made.steps if step.stale} == wanted - fresh
    # What is fresh comes before what is not; of what is not, the freshest first.
    stales = [step.stale for step in made.steps]
    assert stales == sorted(stales)
    by_name = {s.name: s for s in standings}
    ages = [by_name[step.name].as_of_us or 0 for step in made.steps if step.stale]
    assert ages == sorted(ages, reverse=True)
    assert sorted(v.place for v in made.verdicts if v.place is not None) == list(range(len(wanted)))


@settings(max_examples=150, deadline=None)
@given(inquiries(), all_standings())
def test_the_primary_is_spared(inquiry: Inquiry, standings: list[Standing]) -> None:
    made = plan(inquiry, standings, POLICY)
    if isinstance(made, Unplannable):
        return
    order = [step.kind for step in made.steps if not step.stale]
    if SourceKind.PRIMARY in order:
        place = order.index(SourceKind.PRIMARY)
        assert SourceKind.REPLICA not in order[place:]
        if inquiry.need.max_staleness_us >= POLICY.analytical_us:
            assert place == len(order) - 1
    for step in made.steps:
        if step.fallback:
            assert step.kind is SourceKind.PRIMARY
            assert inquiry.need.max_staleness_us > 0


def inquiry(shape: Shape = Shape.SCAN, *, staleness: int = 0, **changes: object) -> Inquiry:
    made = Inquiry(shape, Need(staleness), Instant(NOW - 10, NOW), NOW - DAY_US, NOW)
    return replace(made, **changes)  # type: ignore[arg-type]


PRIMARY = Standing(SourceKind.PRIMARY, "primary")
REPLICA = Standing(SourceKind.REPLICA, "replica-1", as_of_us=NOW - 20_000, measured_us=NOW)
WAREHOUSE = Standing(SourceKind.WAREHOUSE, "warehouse", as_of_us=NOW - 60_000_000)
SPLIT = Standing(SourceKind.SPLIT, "split")
ROLLUPS = replace(REPLICA, kind=SourceKind.ROLLUP, name="rollups", host="replica-1")
ALL = [PRIMARY, REPLICA, WAREHOUSE, SPLIT, ROLLUPS]


@pytest.mark.parametrize(
    ("asked", "order"),
    [
        (inquiry(), ["primary", "split"]),
        (inquiry(staleness=100_000), ["replica-1", "primary", "split"]),
        (inquiry(staleness=30_000_000), ["split", "replica-1", "primary"]),
        (inquiry(staleness=30_000_000, start_us=NOW - 3_600_000_000), ["replica-1", "primary", "split"]),
        (inquiry(staleness=60_000_000, start_us=NOW - 3_600_000_000), ["replica-1", "warehouse", "primary", "split"]),
        (inquiry(staleness=900_000_000), ["warehouse", "split", "replica-1", "primary"]),
        (inquiry(Shape.AGGREGATE, staleness=900_000_000), ["rollups", "warehouse", "split", "replica-1", "primary"]),
        (inquiry(Shape.AGGREGATE, staleness=30_000_000), ["rollups", "split", "replica-1", "primary"]),
        (inquiry(Shape.AGGREGATE, staleness=1_000_000), ["replica-1", "primary", "split"]),
        (inquiry(Shape.LOOKUP, staleness=900_000_000), ["replica-1", "primary"]),
        (inquiry(Shape.LIST, staleness=900_000_000), ["replica-1", "primary"]),
        (replace(inquiry(staleness=0), need=Need(900_000_000, token=7)), ["split", "replica-1", "primary"]),
    ],
)
def test_the_order_of_sources(asked: Inquiry, order: list[str]) -> None:
    made = plan(asked, ALL, POLICY)
    assert isinstance(made, Plan)
    assert [step.name for step in made.steps] == order


@pytest.mark.parametrize(
    ("standings", "staleness", "counts"),
    [
        ([PRIMARY], 100_000, False),
        # Without a replica dashboards are the primary's own, whatever stands behind the log.
        ([PRIMARY, WAREHOUSE, SPLIT], 100_000, False),
        ([PRIMARY, WAREHOUSE, SPLIT], 900_000_000, True),
        ([PRIMARY, REPLICA], 100_000, True),
        ([PRIMARY, REPLICA], 0, False),
        ([PRIMARY, replace(REPLICA, available=False, reason="down")], 100_000, True),
    ],
)
def test_whose_questions_the_primary_takes_in_limited_numbers(
    standings: list[Standing], staleness: int, counts: bool
) -> None:
    made = plan(inquiry(staleness=staleness), standings, POLICY)
    assert isinstance(made, Plan)
    assert [step.fallback for step in made.steps if step.kind is SourceKind.PRIMARY] == [counts]


@pytest.mark.parametrize(
    ("standing", "asked", "word"),
    [
        (WAREHOUSE, inquiry(Shape.LOOKUP, staleness=900_000_000), "kind of question"),
        (replace(REPLICA, available=False, reason="it is down"), inquiry(staleness=100_000), "it is down"),
        (WAREHOUSE, replace(inquiry(), need=Need(900_000_000, token=1)), "read token"),
        (replace(REPLICA, as_of_us=NOW - 200_000), inquiry(staleness=100_000), "lags 200.0 ms"),
        (REPLICA, inquiry(), "0.0 ms are allowed"),
        (WAREHOUSE, inquiry(staleness=30_000_000), "30.000 s short"),
        (replace(WAREHOUSE, as_of_us=None), inquiry(staleness=900_000_000), "watermark is not known"),
        (WAREHOUSE, inquiry(staleness=900_000_000, arrival=None), "clock was not measured"),
        (REPLICA, inquiry(staleness=900_000_000, able=frozenset({SourceKind.PRIMARY})), "kind of question"),
    ],
)
def test_why_a_source_is_passed_over(standing: Standing, asked: Inquiry, word: str) -> None:
    made = plan(asked, [standing], POLICY)
    assert isinstance(made, Unplannable)
    assert word in made.reasons[standing.name]


def test_equal_replicas_take_turns() -> None:
    replicas = [replace(REPLICA, name=f"replica-{n}") for n in range(3)]
    firsts = []
    for turn in range(6):
        made = plan(inquiry(staleness=100_000, turn=turn), [PRIMARY, *replicas], POLICY)
        assert isinstance(made, Plan)
        firsts.append(made.steps[0].name)
    assert firsts == ["replica-0", "replica-1", "replica-2"] * 2


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2_000), st.integers(0, 2_000), st.integers(0, 5_000_000)), min_size=1),
    st.integers(-300, 300),
)
def test_the_clock_never_excludes_the_truth(measurements: list[tuple[int, int, int]], ppm: int) -> None:
    # The primary runs faster or slower than we do; each measurement has a way there, a way back, and a pause after it.
    own = 1_000_000
    begin = NOW

    def primary_at(time_us: int) -> int:
        return begin + time_us + int(time_us * ppm / 1e6)

    clock = PrimaryClock(lambda: own * 1000)
    for there, back, pause in measurements:
        asked = own
        answered = primary_at(own + there)
        own += there + back
        clock.observe(asked, answered, own)
        own += pause
        now = clock.now()
        assert now is not None
        assert now.earliest_us <= primary_at(own) <= now.latest_us
        assert now.uncertainty_us <= there + back + 2 + pause * 2e-3 + 3


def test_a_clock_that_was_set_is_believed() -> None:
    own = 0
    clock = PrimaryClock(lambda: own * 1000)
    assert clock.now() is None
    clock.observe(0, NOW, 10)
    clock.observe(20, NOW - 5_000_000, 30)
    now = clock.now()
    assert now is not None
    assert now.latest_us <= NOW - 5_000_000 + 1
