import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.backoff import Backoff
from device.latency import LatencyHistogram
from device.session import (
    Abandon,
    HalfClose,
    Resume,
    SendConfirmation,
    SendData,
    SendDefinitions,
    SendWholeDictionary,
    Session,
    SessionSettings,
    StartNewSession,
    Wait,
)


def welcome(session, committed=0, last=0, **changes):
    arguments = {
        "aliases": 1,
        "dictionary_unknown": False,
        "dictionary_conflict": False,
        "credit_messages": 4,
        "credit_bytes": 1000,
    }
    return session.on_welcome(committed=committed, last=last, **{**arguments, **changes})


def action(session, now=0.0, last=0, size=100, aliases=1):
    return session.next_action(now, last=last, next_size=size, aliases=aliases)


@pytest.mark.parametrize(
    ("acked", "last", "committed", "expected"),
    [
        pytest.param(0, 0, 0, Resume, id="new"),
        pytest.param(3, 7, 3, Resume, id="nothing happened"),
        pytest.param(3, 7, 5, Resume, id="acks were lost"),
        pytest.param(3, 7, 7, Resume, id="everything arrived"),
        pytest.param(3, 7, 0, StartNewSession, id="forgotten"),
        pytest.param(3, 7, 2, StartNewSession, id="restored from an older backup"),
        pytest.param(3, 7, 8, StartNewSession, id="numbers this buffer never gave"),
    ],
)
def test_welcome(acked, last, committed, expected):
    assert isinstance(welcome(Session(acked=acked), committed, last), expected)


def test_a_dictionary_conflict_is_met_with_the_whole_dictionary():
    session = Session()
    assert session.hello_carries() == (True, True)
    assert isinstance(welcome(session, dictionary_conflict=True), SendWholeDictionary)
    assert session.hello_carries() == (False, True)
    assert isinstance(welcome(session), Resume)
    assert session.hello_carries() == (False, True)


def test_the_order_of_actions():
    session = Session(settings=SessionSettings(ack_timeout_s=10))
    welcome(session, aliases=0)
    session.on_throttle(0.0, 5.0)
    session.on_rejections_taken(2)
    assert action(session, last=3, aliases=2) == SendConfirmation(2)
    session.on_confirmation_sent(2)
    assert action(session, last=3, aliases=2) == SendDefinitions(0)
    session.on_definitions_sent(2)
    assert action(session, last=3, aliases=2) == Wait(5.0)
    assert action(session, now=5.0, last=3, aliases=2) == SendData(1)
    session.on_sent(5.0, 1, 100)
    session.on_notice(6.0, drain_s=3, min_delay_s=1, max_delay_s=2)
    assert action(session, now=6.0, last=3, aliases=2) == Wait(9.0)
    assert action(session, now=9.0, last=3, aliases=2) == HalfClose()
    assert isinstance(action(session, now=15.0, last=3, aliases=2), Abandon)


def test_only_progress_extends_the_ack_deadline():
    session = Session(settings=SessionSettings(ack_timeout_s=10))
    welcome(session)
    session.on_sent(0.0, 1, 1)
    session.on_sent(0.0, 2, 1)
    session.on_ack(9.0, 0, [])
    assert isinstance(action(session, now=10.0, last=2), Abandon)
    session.on_ack(9.0, 1, [])
    assert action(session, now=10.0, last=2) == Wait(19.0)
    session.on_ack(11.0, 2, [])
    assert action(session, now=1000.0, last=2) == Wait(None)


def test_a_confirmed_rejection_is_forgotten_only_when_the_server_must_have_seen_it():
    session = Session()
    welcome(session, last=5)
    session.on_sent(0, 1, 1)
    assert session.on_ack(0, 1, [(1, 0), (1, 3)]).fresh == (0, 1)
    session.on_rejections_taken(1)
    session.on_confirmation_sent(1)
    assert session.on_ack(0, 1, [(1, 0)]).fresh == ()
    assert session.handed
    session.on_sent(0, 2, 1)
    session.on_ack(0, 2, [])
    assert not session.handed
    assert session.on_ack(0, 2, [(1, 0)]).fresh == ()


def test_a_new_session_has_rejections_of_its_own():
    session = Session()
    welcome(session, last=1)
    session.on_ack(0, 1, [(1, 0)])
    session.on_new_session()
    assert session.on_ack(0, 1, [(1, 0)]).fresh == (0,)


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(1, 5)),
        st.tuples(st.just("act"), st.integers(1, 10)),
        st.tuples(st.just("commit"), st.integers(0, 5)),
        st.tuples(st.just("ack"), st.just(0)),
        st.tuples(st.just("drop"), st.just(0)),
        st.tuples(st.just("forget"), st.just(0)),
    ),
    max_size=60,
)


@given(EVENTS)
def test_every_message_is_committed_in_order_whatever_happens(events):  # noqa: PLR0915
    """A model of buffer, wire and server around the session: nothing lost, nothing out of order, credits kept."""
    session = Session()
    held: list[int] = []
    acked = made = 0
    # The server: content by arrival for each session it knows, and what is on its way.
    committed: list[int] = []
    wire: list[tuple[int, int]] = []
    durable: list[int] = []

    def connect():
        nonlocal acked
        wire.clear()
        session.on_disconnect()
        while True:
            decision = welcome(session, len(committed), acked + len(held))
            if isinstance(decision, Resume):
                dropped = decision.drop_through - acked
                del held[:dropped]
                acked = decision.drop_through
                return
            acked = 0
            session.on_new_session()
            committed.clear()

    def act():
        step = session.next_action(0.0, last=acked + len(held), next_size=100, aliases=1)
        if isinstance(step, SendData):
            assert acked < step.sequence <= acked + len(held)
            session.on_sent(0.0, step.sequence, 100)
            wire.append((step.sequence, held[step.sequence - acked - 1]))
            assert session.messages_out <= 4
            return True
        return False

    def commit(number):
        for _ in range(min(number, len(wire))):
            sequence, content = wire.pop(0)
            assert sequence == len(committed) + 1
            committed.append(content)
            durable.append(content)

    def ack():
        nonlocal acked
        decision = session.on_ack(0.0, len(committed), [])
        del held[: decision.drop_through - acked]
        acked = decision.drop_through

    connect()
    for name, number in [*events, ("drop", 0)]:
        if name == "put":
            held.extend(range(made, made + number))
            made += number
        elif name == "act":
            for _ in range(number):
                act()
        elif name == "commit":
            commit(number)
        elif name == "ack":
            ack()
        else:
            if name == "forget":
                committed.clear()
            connect()
    while held:
        while act():
            pass
        commit(100)
        ack()
    assert list(dict.fromkeys(durable)) == list(range(made))


@given(st.integers(0, 100), st.integers(0, 2**32))
def test_backoff_is_bounded_jittered_and_resets(attempts, seed):
    backoff = Backoff(base_s=0.5, cap_s=60, rng=random.Random(seed))
    for attempt in range(attempts):
        ceiling = min(60, 0.5 * 2**attempt)
        assert backoff.ceiling_s == ceiling
        assert 0 <= backoff.next_delay() <= ceiling
    backoff.reset()
    assert backoff.ceiling_s == 0.5


@given(st.lists(st.floats(1e-4, 1000), min_size=1))
def test_percentiles_are_within_the_resolution(durations):
    histogram = LatencyHistogram()
    for duration in durations:
        histogram.record(duration)
    ordered = sorted(durations)
    for percent in (1, 50, 99, 100):
        exact = ordered[max(1, -(-len(ordered) * percent // 100)) - 1]
        assert exact * 0.95 <= histogram.percentile(percent) <= exact * 1.06
