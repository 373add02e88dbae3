"""What the audit decides, on stores made by hand."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.model import ValueType
from storage.verify.readings import (
    HOUR_US,
    Fingerprint,
    Held,
    Key,
    Primary,
    digest,
    fingerprints,
    first_difference,
    verify,
)

values = st.one_of(
    st.tuples(st.just(ValueType.DOUBLE), st.floats()),
    st.tuples(st.just(ValueType.BIGINT), st.integers(-(2**63), 2**63 - 1)),
    st.tuples(st.just(ValueType.BOOLEAN), st.booleans()),
    st.tuples(st.just(ValueType.TEXT), st.text()),
)
readings = st.lists(
    st.builds(
        lambda typed, entity, attribute, time_us, revision: (
            (typed[0], entity, attribute, time_us),
            (typed[1], revision),
        ),
        values,
        st.integers(1, 2**40),
        st.integers(1, 10_000),
        st.integers(0, 5 * HOUR_US),
        st.integers(0, 5),
    )
)


@given(readings, st.randoms())
def test_a_fingerprint_does_not_depend_on_order(rows: list[tuple[Key, Held]], random: st.DataObject) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert fingerprints(rows) == fingerprints(shuffled)
    assert sum(f.readings for f in fingerprints(rows).values()) == len(rows)


@pytest.mark.parametrize(
    "other",
    [(1.5, 1), (1.25, 0), (float("nan"), 0)],
    ids=["another revision", "another value", "not a number"],
)
def test_a_reading_that_differs_has_another_digest(other: Held) -> None:
    key: Key = (ValueType.DOUBLE, 1, 2, 3)
    assert digest(key, (1.5, 0)) != digest(key, other)


def test_what_postgresql_calls_equal_has_one_digest() -> None:
    key: Key = (ValueType.DOUBLE, 1, 2, 3)
    assert digest(key, (float("nan"), 0)) == digest(key, (-float("nan"), 0))
    assert digest(key, (0.0, 0)) == digest(key, (-0.0, 0))


def test_the_first_difference_is_by_key() -> None:
    one = [((ValueType.BIGINT, 1, 1, t), (t, 0)) for t in range(5)]
    assert first_difference("acme", 0, "log", one, one) is None
    found = first_difference("acme", 0, "log", one, [*one[:2], one[4]])
    assert found is not None
    assert (found.key[3], found.one, found.other) == (2, (2, 0), None)


def test_a_reading_that_is_there_twice_is_a_difference() -> None:
    one = [((ValueType.BIGINT, 1, 1, 7), (7, 0))]
    found = first_difference("acme", 0, "warehouse", one, one * 2)
    assert found is not None
    assert "twice" in str(found)


@dataclass
class Store:
    """A store by hand; `late` readings arrive when it is waited for the second time."""

    name: str
    rows: list[tuple[Key, Held]]
    late: list[tuple[Key, Held]] = field(default_factory=list)
    waits: int = 0
    begins_us: int | None = None
    named: dict[int, str] = field(default_factory=dict)

    def wait_for(self, through_us: int, deadline: float) -> None:
        self.waits += 1
        if self.waits > 1:
            self.rows += self.late
            self.late = []

    def readings(self, tenant_id: int, from_us: int, to_us: int) -> Iterator[tuple[Key, Held]]:
        return iter([row for row in self.rows if from_us <= row[0][3] < to_us])

    def complete_from_us(self, tenant_id: int) -> int | None:
        return self.begins_us

    def names(self, tenant_id: int) -> Mapping[int, str]:
        return self.named

    def remains(self, tenant_id: int, entity_ids: Sequence[int]) -> Iterator[tuple[int, str]]:
        return iter([(key[1], "a reading") for key, _ in self.rows if key[1] in entity_ids])


class HandMadePrimary(Primary):
    def __init__(self, rows: list[tuple[Key, Held]], floor_us: int = 0) -> None:
        super().__init__("")
        self.rows = rows
        self.floor = floor_us

    def tenants(self, name: str | None) -> dict[int, str]:
        return {1: "acme"}

    def now_us(self) -> int:
        return 0

    def floor_us(self, tenant_id: int) -> int:
        return self.floor

    def readings(self, tenant_id: int, from_us: int, to_us: int) -> Iterator[tuple[Key, Held]]:
        return iter([row for row in self.rows if from_us <= row[0][3] < to_us])


ROWS: list[tuple[Key, Held]] = [((ValueType.BIGINT, 1, 1, h * HOUR_US + 5), (h, 0)) for h in range(4)]


def test_equal_stores_are_equal() -> None:
    result = verify(HandMadePrimary(ROWS), Store("warehouse", list(ROWS)))
    assert (result.hours, result.readings, result.differences) == (4, 4, ())


def test_a_reading_that_arrives_meanwhile_is_no_difference() -> None:
    store = Store("warehouse", ROWS[:3], late=[ROWS[3]])
    assert verify(HandMadePrimary(ROWS), store).differences == ()
    assert store.waits > 1


def test_a_reading_that_never_arrives_is_one() -> None:
    result = verify(HandMadePrimary(ROWS), Store("warehouse", [ROWS[0], *ROWS[2:]]))
    assert [difference.hour_us for difference in result.differences] == [HOUR_US]
    assert result.differences[0].other is None


@pytest.mark.parametrize("ours", [ROWS[1:3], []], ids=["outside of what PostgreSQL has", "of a tenant without any"])
def test_a_reading_that_only_the_other_store_has_is_found(ours: list[tuple[Key, Held]]) -> None:
    result = verify(HandMadePrimary(ours), Store("warehouse", ROWS))
    assert [d.hour_us for d in result.differences] == [key[3] - 5 for key, held in ROWS if (key, held) not in ours]
    assert all(difference.one is None for difference in result.differences)


@pytest.mark.parametrize(
    ("floor_us", "begins_us"),
    [(2 * HOUR_US, None), (HOUR_US + 1, None), (0, 2 * HOUR_US), (0, HOUR_US + 1)],
    ids=["retention of PostgreSQL", "within an hour", "retention of the warehouse", "within an hour of the warehouse"],
)
def test_what_retention_may_have_removed_is_not_compared(floor_us: int, begins_us: int | None) -> None:
    short, whole = ROWS[2:], ROWS
    one, other = (short, whole) if floor_us else (whole, short)
    result = verify(HandMadePrimary(one, floor_us), Store("warehouse", other, begins_us=begins_us))
    assert (result.hours, result.differences) == (2, ())
    assert verify(HandMadePrimary(one), Store("warehouse", other)).differences != ()


def test_no_readings_make_no_hours() -> None:
    assert verify(HandMadePrimary([]), Store("warehouse", [])).hours == 0
    assert fingerprints([]) == {}
    assert Fingerprint(1, 2**64 - 1) + Fingerprint(1, 1) == Fingerprint(2, 0)
