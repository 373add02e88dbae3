"""When a source is left alone, and for how long."""

import pytest

from router.breaker import FAILURES, Breaker
from tests.manual_clock import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(100.0)


@pytest.fixture
def breaker(clock: ManualClock) -> Breaker:
    return Breaker(clock)


def open_it(breaker: Breaker, *, probe: bool = False) -> None:
    for _ in range(FAILURES):
        breaker.failed("it is down", probe=probe)
    assert breaker.is_open


@pytest.mark.parametrize("probe", [False, True], ids=["questions", "probes"])
def test_failures_in_a_row_open_it(breaker: Breaker, probe: bool) -> None:
    for _ in range(FAILURES - 1):
        breaker.failed("it is down", probe=probe)
    assert not breaker.is_open
    breaker.failed("it is still down", probe=probe)
    assert breaker.is_open
    assert breaker.problem == "it is still down"


def test_an_answer_ends_a_row(breaker: Breaker) -> None:
    for _ in range(3 * FAILURES):
        breaker.failed("a probe was late", probe=True)
        breaker.failed("a question was lost")
        breaker.answered()
    assert not breaker.is_open


def test_single_probes_that_fail_are_no_row(breaker: Breaker) -> None:
    """Nobody asks this source any questions, so nothing but probes can tell that it is well."""
    for _ in range(3 * FAILURES):
        breaker.failed("a probe was late", probe=True)
        breaker.answered(probe=True)
    assert not breaker.is_open


def test_probes_do_not_hide_that_questions_fail(breaker: Breaker) -> None:
    for _ in range(FAILURES):
        assert not breaker.is_open
        breaker.failed("it reads nothing")
        breaker.answered(probe=True)
    assert breaker.is_open


def test_only_a_probe_after_the_pause_closes_it(breaker: Breaker, clock: ManualClock) -> None:
    open_it(breaker)
    breaker.answered(probe=True)
    clock.now_s += 0.49
    breaker.answered(probe=True)
    assert breaker.is_open
    clock.now_s += 0.01
    # One that was under way when it opened.
    breaker.answered()
    assert breaker.is_open
    breaker.answered(probe=True)
    assert not breaker.is_open
    # The next row begins anew.
    breaker.failed("it is down")
    assert not breaker.is_open


def test_the_pause_doubles_up_to_a_bound_while_openings_follow_each_other(breaker: Breaker, clock: ManualClock) -> None:
    for pause_s in (0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0):
        open_it(breaker)
        clock.now_s += pause_s - 0.01
        breaker.answered(probe=True)
        assert breaker.is_open, pause_s
        clock.now_s += 0.02
        breaker.answered(probe=True)
        assert not breaker.is_open, pause_s
    clock.now_s += 11
    open_it(breaker, probe=True)
    clock.now_s += 0.5
    breaker.answered(probe=True)
    assert not breaker.is_open
