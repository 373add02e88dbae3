"""What the demo's witness takes for dishonest, and what it does not."""

import pytest
from atlasco.telemetry.v1 import query_pb2

from demo.witness import Shown, Witness

MINUTE = 60_000_000
DASHBOARD = 100_000
TOO_OLD = DASHBOARD + 1


def witness_of(stamps: int, *, acked: int) -> Witness:
    """Stamps at 1 to `stamps` seconds after a minute began; each acked one was committed half a second after."""
    witness = Witness()
    for number in range(1, stamps + 1):
        stamp = witness.next_stamp(MINUTE + number * 1_000_000)
        if number <= acked:
            witness.note_acked()
            witness.note_committed(stamp + 500_000)
    return witness


def at(number: int) -> int:
    """The stamp of that number."""
    return MINUTE + number * 1_000_000 if number else 0


def provenance(as_of_us: int, *, staleness_us: int = 0, degraded: tuple[str, ...] = ()) -> query_pb2.Provenance:
    reasons = [query_pb2.Degradation.Reason.Value(f"REASON_{name}") for name in degraded]
    marks = [query_pb2.Degradation(reason=reason) for reason in reasons]
    return query_pb2.Provenance(as_of_us=as_of_us, staleness_us=staleness_us, degraded=marks)


@pytest.mark.parametrize(
    ("bound_us", "claim", "shown", "wrong"),
    [
        pytest.param(0, provenance(at(9)), Shown(at(9)), "", id="critical, all"),
        pytest.param(0, provenance(at(9)), Shown(at(10)), "", id="critical, also what is not acked yet"),
        pytest.param(0, provenance(at(2)), Shown(at(8)), "had been acked", id="critical, one short"),
        pytest.param(DASHBOARD, provenance(at(6)), Shown(at(5)), "", id="as old as it says"),
        pytest.param(DASHBOARD, provenance(at(6)), Shown(at(4)), "were committed", id="older than it says"),
        pytest.param(DASHBOARD, provenance(at(6)), Shown(0), "were committed", id="empty"),
        pytest.param(DASHBOARD, provenance(at(6), staleness_us=TOO_OLD), Shown(at(6)), "old", id="too old"),
        pytest.param(
            DASHBOARD,
            provenance(at(6), staleness_us=TOO_OLD, degraded=("STALE",)),
            Shown(at(6)),
            "",
            id="says so",
        ),
        pytest.param(DASHBOARD, provenance(at(6), degraded=("INCOMPLETE",)), Shown(at(2)), "", id="says it has gaps"),
        pytest.param(DASHBOARD, provenance(at(6), degraded=("STALE",)), Shown(at(2)), "committed", id="no excuse"),
        pytest.param(DASHBOARD, provenance(at(6)), Shown(at(7) + 1), "never written", id="made up"),
        pytest.param(DASHBOARD, provenance(at(6)), Shown(at(7), 7, MINUTE), "", id="counted"),
        pytest.param(DASHBOARD, provenance(at(6)), Shown(at(7), 5, at(3)), "", id="counted from the third on"),
        pytest.param(DASHBOARD, provenance(at(6)), Shown(at(7), 6, MINUTE), "shows 6 stamps", id="a gap"),
        pytest.param(DASHBOARD, provenance(at(6)), Shown(at(7), 8, MINUTE), "shows 8 stamps", id="twice"),
    ],
)
def test_an_answer_is_held_to_what_it_claims(
    bound_us: int, claim: query_pb2.Provenance, shown: Shown, wrong: str
) -> None:
    witness = witness_of(10, acked=9)
    problem = witness.judge(bound_us, claim, shown, witness.acked)
    assert wrong in problem
    assert bool(problem) == bool(wrong)


def test_stamps_rise_whatever_the_clock_does() -> None:
    witness = Witness()
    assert [witness.next_stamp(time) for time in (5, 5, 3, 9)] == [5, 6, 7, 9]


def test_a_bounded_question_begins_at_a_minute() -> None:
    witness = witness_of(100, acked=0)
    assert witness.since(1_000) == MINUTE
    assert witness.since(10) == 2 * MINUTE
