"""What of a batch is written, and in which order: against slow references that say the rule."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.arrange import (
    all_new,
    arrange,
    changed_only,
    differ,
    judge,
    latest_candidates,
    latest_contenders,
)
from storage.model import BatchMessage, Columns, Outcome, Reason, ValueType

BUCKETS = 3
Reading = tuple[int, int, int, int, Any, bool]
"""Tenant, entity, attribute, time, value, historical."""

readings = st.tuples(
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2, 3, 4, 2**52]),
    st.integers(1, 2),
    st.sampled_from([-5, 0, 1, 2]),
    st.sampled_from([1.0, 2.0, math.nan, 0.0, -0.0]),
    st.booleans(),
)
messages = st.lists(
    st.tuples(st.lists(readings, max_size=6), st.sampled_from([*Outcome] + [Outcome.COMMITTED] * 3)), max_size=5
)


def columns_of(batches: list[list[Reading]], value_type: ValueType = ValueType.DOUBLE) -> Columns:
    """The readings of messages, in the order of arrival."""
    flat = [(source, index, *r) for source, part in enumerate(batches) for index, r in enumerate(part)]
    values = np.empty(len(flat), np.float64 if value_type is ValueType.DOUBLE else object)
    values[:] = [row[6] for row in flat]
    return Columns(
        tenant=np.array([row[2] for row in flat], np.int32),
        entity=np.array([row[3] for row in flat], np.int64),
        attribute=np.array([row[4] for row in flat], np.int32),
        time_us=np.array([row[5] for row in flat], np.int64),
        value=values,
        source=np.array([row[0] for row in flat], np.int32),
        index=np.array([row[1] for row in flat], np.int32),
        historical=np.array([row[7] for row in flat], bool),
    )


def rows(columns: Columns) -> list[tuple[Any, ...]]:
    return [
        (*key, repr(value), source, index)
        for *key, value, source, index in zip(
            columns.tenant.tolist(),
            columns.entity.tolist(),
            columns.attribute.tolist(),
            columns.time_us.tolist(),
            columns.value.tolist(),
            columns.source.tolist(),
            columns.index.tolist(),
            strict=True,
        )
    ]


def same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


@given(messages)
def test_arranged_readings_are_sorted_and_the_last_of_each_key(given: list[tuple[list[Reading], Outcome]]) -> None:
    outcomes = [outcome for _, outcome in given]
    arranged = arrange({ValueType.DOUBLE: columns_of([part for part, _ in given])}, outcomes, buckets=BUCKETS)
    last: dict[tuple[int, ...], tuple[Any, ...]] = {}
    told = set()
    for source, (part, outcome) in enumerate(given):
        if outcome is not Outcome.COMMITTED:
            continue
        own: dict[tuple[int, ...], list[tuple[int, float]]] = {}
        for index, (tenant, entity, attribute, time, value, _) in enumerate(part):
            key = (tenant, entity % BUCKETS, entity, attribute, time)
            last[key] = (tenant, entity, attribute, time, repr(value), source, index)
            own.setdefault(key, []).append((index, value))
        for values in own.values():
            told |= {(source, index) for index, value in values if not same(value, values[-1][1])}
    expected = [last[key] for key in sorted(last)]
    assert [row for part in arranged.readings.values() for row in rows(part)] == expected
    assert {(source, rejection.index) for source, rejection in arranged.superseded} == told
    assert len(arranged.superseded) == len(told)
    assert all(rejection.reason is Reason.SUPERSEDED_IN_MESSAGE for _, rejection in arranged.superseded)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ((1.0, 1.0), []),
        ((1.0, 2.0), [0]),
        ((1.0, 1.0, 2.0), [0, 1]),
        ((1.0, 2.0, 1.0), [1]),
        ((math.nan, math.nan), []),
        ((math.nan, 1.0), [0]),
        ((0.0, -0.0), []),
    ],
    ids=["same", "other", "both-of-a-pair", "back-again", "nan", "nan-to-number", "zeros"],
)
def test_only_values_that_the_message_itself_replaced_are_told(values: tuple[float, ...], told: list[int]) -> None:
    columns = columns_of([[(1, 1, 1, 1, value, False) for value in values]])
    arranged = arrange({ValueType.DOUBLE: columns}, [Outcome.COMMITTED], buckets=BUCKETS)
    assert [rejection.index for _, rejection in arranged.superseded] == told
    assert len(arranged.readings[ValueType.DOUBLE]) == 1


def test_a_correction_by_another_message_is_no_rejection() -> None:
    columns = columns_of([[(1, 1, 1, 1, 1.0, False)], [(1, 1, 1, 1, 2.0, False)]])
    arranged = arrange({ValueType.DOUBLE: columns}, [Outcome.COMMITTED] * 2, buckets=BUCKETS)
    assert arranged.superseded == []
    assert arranged.readings[ValueType.DOUBLE].value.tolist() == [2.0]


@pytest.mark.parametrize("order", [[*ValueType], [*ValueType][::-1]], ids=["forward", "backward"])
def test_types_are_written_in_one_order_whatever_the_batch_says(order: list[ValueType]) -> None:
    given = {t: columns_of([[(1, 1, n, 1, b"x", False)]], ValueType.TEXT) for n, t in enumerate(order)}
    assert list(arrange(given, [Outcome.COMMITTED], buckets=BUCKETS).readings) == [*ValueType]


def test_nothing_left_is_nothing_arranged() -> None:
    columns = columns_of([[(1, 1, 1, 1, 1.0, False)]])
    assert arrange({ValueType.DOUBLE: columns}, [Outcome.STALE], buckets=BUCKETS).readings == {}
    assert arrange({}, [], buckets=BUCKETS).readings == {}


def test_texts_are_compared_as_bytes() -> None:
    part: list[Reading] = [(1, 1, 1, 1, "ä".encode(), False), (1, 1, 1, 1, b"", False)]
    arranged = arrange({ValueType.TEXT: columns_of([part], ValueType.TEXT)}, [Outcome.COMMITTED], buckets=BUCKETS)
    assert [rejection.index for _, rejection in arranged.superseded] == [0]


@given(st.lists(readings, max_size=30))
def test_latest_candidates_are_the_newest_that_are_not_historical(given: list[Reading]) -> None:
    arranged = arrange({ValueType.DOUBLE: columns_of([given])}, [Outcome.COMMITTED], buckets=BUCKETS)
    for columns in arranged.readings.values():
        newest: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        for row, historical in zip(rows(columns), columns.historical.tolist(), strict=True):
            if not historical:
                newest[row[:3]] = row
        assert rows(latest_candidates(columns)) == list(newest.values())


@given(st.lists(readings, min_size=1, max_size=30), st.data())
def test_contenders_are_the_candidates_and_the_historical_corrections(
    given: list[Reading], data: st.DataObject
) -> None:
    columns = arrange({ValueType.DOUBLE: columns_of([given])}, [Outcome.COMMITTED], buckets=BUCKETS).readings[
        ValueType.DOUBLE
    ]
    revisions = data.draw(st.dictionaries(st.integers(0, len(columns) - 1), st.integers(0, 2), max_size=len(columns)))
    changed = np.array(sorted(revisions), np.intp)
    taken = np.array([revisions[position] for position in sorted(revisions)], np.int32)
    corrected = {p for p, revision in revisions.items() if revision and columns.historical[p]}
    candidates = rows(latest_candidates(columns))
    expected = [row for p, row in enumerate(rows(columns)) if p in corrected or row in candidates]
    assert rows(latest_contenders(columns, changed, taken)) == expected


@pytest.mark.parametrize(
    ("one", "other", "different"),
    [
        (1.0, 1.0, False),
        (1.0, 2.0, True),
        (math.nan, math.nan, False),
        (math.nan, 0.0, True),
        (0.0, -0.0, False),
        (b"a", b"a", False),
        (b"a", b"b", True),
        (True, False, True),
    ],
)
def test_values_differ_as_the_database_sees_it(one: Any, other: Any, different: bool) -> None:
    assert differ(one, other) is different


def test_changes_carry_their_revisions() -> None:
    columns = columns_of([[(1, 1, 1, time, float(time), False) for time in range(4)]])
    assert all_new(columns).revision.tolist() == [0] * 4
    changes = changed_only(columns, np.array([1, 3]), np.array([0, 7], np.int32))
    assert (changes.time_us.tolist(), changes.revision.tolist()) == ([1, 3], [0, 7])


# -- judge


def message(entity: int, epoch: int | None, sequence: int) -> BatchMessage:
    return BatchMessage(1, entity, None, epoch, sequence)


@pytest.mark.parametrize(
    ("given", "standing", "outcomes"),
    [
        ([message(1, None, 0)], {}, [Outcome.COMMITTED]),
        ([message(1, 4, 1)], {}, [Outcome.STALE]),
        ([message(1, 4, 5), message(1, 4, 6)], {1: 5}, [Outcome.REPEATED, Outcome.COMMITTED]),
        ([message(1, 3, 9), message(1, 4, 6)], {1: 5}, [Outcome.STALE, Outcome.COMMITTED]),
        ([message(1, 4, 6), message(2, 4, 6)], {1: 5}, [Outcome.COMMITTED, Outcome.STALE]),
        ([], {}, []),
    ],
    ids=["unary", "newer-stream-elsewhere", "repeated", "two-streams-in-one-batch", "of-two-devices", "nothing"],
)
def test_the_judgement(given: list[BatchMessage], standing: dict[int, int], outcomes: list[Outcome]) -> None:
    assert judge(given, standing) == outcomes
