"""Decoding: every reading ends up in one place, whatever a message holds; compared with a decoder that is just slow."""

import math
from collections import Counter
from typing import Any

from atlasco.telemetry.v1 import ingest_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.aliases import AliasProblem, AliasTable
from gateway.decode import MAX_TIME_US, Received, count_readings, decode
from storage.model import Attribute, Columns, Reason, RejectedReading, ValueType
from storage.registry import Tenant

NOW = 1_800_000_000_000_000
HOUR = 3_600_000_000
MOST_BYTES = 8
TYPES = {
    "doubles": ValueType.DOUBLE,
    "int64s": ValueType.BIGINT,
    "bools": ValueType.BOOLEAN,
    "strings": ValueType.TEXT,
}

# Alias -> registered attribute; 6 is defined and cannot be used, everything else is unknown.
REGISTERED = {
    1: Attribute(101, "d", ValueType.DOUBLE, True),
    2: Attribute(102, "i", ValueType.BIGINT, True),
    3: Attribute(103, "b", ValueType.BOOLEAN, True),
    4: Attribute(104, "s", ValueType.TEXT, True),
    5: Attribute(105, "history only", ValueType.DOUBLE, False),
}
PROBLEM = AliasProblem(6, Reason.ATTRIBUTE_QUOTA_EXCEEDED, "no more")
TABLE = AliasTable().with_aliases(
    {**{alias: (a.name, a.type) for alias, a in REGISTERED.items()}, 6: ("refused", ValueType.DOUBLE)},
    REGISTERED,
    {6: PROBLEM},
)
STRICT = Tenant(1, "strict", HOUR, HOUR, quarantines=False)
KEEPING = Tenant(2, "keeping", HOUR, HOUR, quarantines=True)


def received(readings: ingest_pb2.Readings, tenant: Tenant = STRICT, table: AliasTable = TABLE) -> Received:
    return Received(tenant, 7, "device", table, readings, 0, count_readings(readings))


def slowly(  # noqa: PLR0912 - as the rules stand in the protocol, one after the other
    message: Received,
) -> tuple[dict[int, tuple[Any, ...]], dict[int, tuple[Any, ...]], dict[int, Reason]]:
    """Good readings, readings set aside, rejections: by index, one reading at a time."""
    good: dict[int, tuple[Any, ...]] = {}
    aside: dict[int, tuple[Any, ...]] = {}
    rejected: dict[int, Reason] = {}
    index = 0
    for name, wire_type in TYPES.items():
        column = getattr(message.readings, name)
        aliases, deltas, values = list(column.aliases), list(column.time_deltas_us), list(column.values)
        longest = max(len(aliases), len(deltas), len(values))
        if len(aliases) != len(values) or (deltas and len(deltas) != len(aliases)):
            rejected |= dict.fromkeys(range(index, index + longest), Reason.COLUMN_LENGTH_MISMATCH)
            index += longest
            continue
        for place, (alias, value) in enumerate(zip(aliases, values, strict=True)):
            time_us = message.readings.base_time_us + (deltas[place] if deltas else 0)
            attribute, reason = REGISTERED.get(alias), None
            if attribute is None:
                reason = PROBLEM.reason if alias == PROBLEM.alias else Reason.UNKNOWN_ALIAS
            elif (wire_type, attribute.type) == (ValueType.BIGINT, ValueType.DOUBLE):
                if int(float(value)) != value:
                    reason = Reason.VALUE_NOT_REPRESENTABLE
                value = float(value)  # noqa: PLW2901
            elif attribute.type is not wire_type:
                reason = Reason.TYPE_MISMATCH
            elif wire_type is ValueType.TEXT:
                if len(value) > MOST_BYTES:
                    reason = Reason.STRING_TOO_LONG
                elif b"\0" in value or value.decode("utf-8", "ignore").encode() != value:
                    reason = Reason.STRING_INVALID
            if reason is None:
                if not 0 < time_us <= MAX_TIME_US:
                    reason = Reason.TIMESTAMP_INVALID
                elif time_us < NOW - message.tenant.window_past_us:
                    reason = Reason.TIMESTAMP_TOO_OLD
                elif time_us > NOW + message.tenant.window_future_us:
                    reason = Reason.TIMESTAMP_TOO_NEW
            if reason is None:
                assert attribute is not None
                good[index] = (attribute, time_us, value)
            else:
                rejected[index] = reason
                if message.tenant.quarantines and reason in {Reason.TIMESTAMP_TOO_OLD, Reason.TIMESTAMP_TOO_NEW}:
                    assert attribute is not None
                    aside[index] = (attribute, time_us, value)
            index += 1
    return good, aside, rejected


def found_in(columns: dict[ValueType, Columns], source: int) -> dict[int, tuple[Any, ...]]:
    found: dict[int, tuple[Any, ...]] = {}
    attributes = {a.attribute_id: a for a in REGISTERED.values()}
    for value_type, part in columns.items():
        for i in range(len(part)):
            if part.source[i] == source:
                attribute = attributes[int(part.attribute[i])]
                assert attribute.type is value_type
                assert int(part.index[i]) not in found, "a reading is in one place"
                found[int(part.index[i])] = (attribute, int(part.time_us[i]), part.value[i])
    return found


def same(one: dict[int, tuple[Any, ...]], other: dict[int, tuple[Any, ...]]) -> bool:
    def comparable(value: Any) -> Any:
        if isinstance(value, float):
            return "NaN" if math.isnan(value) else (float(value), math.copysign(1, value))
        return value

    return {k: (*v[:2], comparable(v[2])) for k, v in one.items()} == {
        k: (*v[:2], comparable(v[2])) for k, v in other.items()
    }


def check(messages: list[Received]) -> None:
    decoded = decode(messages, now_us=NOW, max_string_bytes=MOST_BYTES)
    for source, message in enumerate(messages):
        told = decoded.rejections[source]
        if message.refused is not None:
            assert told == [message.refused]
            assert not found_in(decoded.readings, source)
            continue
        good, aside, rejected = slowly(message)
        assert same(found_in(decoded.readings, source), good)
        assert same(found_in(decoded.quarantined, source), aside)
        assert {one.index: one.reason for one in told} == rejected
        assert {one.index for one in told if one.quarantined} == set(aside)
        assert max(Counter(one.index for one in told).values(), default=1) == 1
        assert len(good) + len(rejected) == count_readings(message.readings)
        assert all(0 < len(one.text.encode()) <= 200 for one in told)
    for part in decoded.readings.values():
        order = list(zip(part.source.tolist(), part.index.tolist(), strict=True))
        assert order == sorted(order), "in order of arrival"
        assert part.source.dtype.kind == part.index.dtype.kind == "i"


int64 = st.integers(-(2**63), 2**63 - 1)
aliases = st.one_of(st.integers(0, 8), st.integers(0, 2**32 - 1))
deltas = st.one_of(
    st.integers(-2 * HOUR, 2 * HOUR),
    st.sampled_from([-HOUR - 1, -HOUR, HOUR, HOUR + 1, -NOW, -NOW + 1, MAX_TIME_US - NOW, MAX_TIME_US - NOW + 1]),
    int64,
)
bases = st.one_of(st.just(NOW), st.just(0), int64)
VALUES: dict[str, Any] = {
    "doubles": st.floats(),
    "int64s": st.one_of(st.integers(-(2**54), 2**54), int64),
    "bools": st.booleans(),
    "strings": st.one_of(st.binary(max_size=10), st.text(max_size=4).map(lambda text: text.encode())),
}


@st.composite
def columns(draw: st.DrawFn, name: str, target: Any) -> None:
    length = draw(st.integers(0, 6))
    if draw(st.integers(0, 9)) == 0:
        lengths = draw(st.tuples(*[st.integers(0, 6)] * 3))
    else:
        lengths = (length, draw(st.sampled_from([0, length])), length)
    target.aliases.extend(draw(st.lists(aliases, min_size=lengths[0], max_size=lengths[0])))
    target.time_deltas_us.extend(draw(st.lists(deltas, min_size=lengths[1], max_size=lengths[1])))
    target.values.extend(draw(st.lists(VALUES[name], min_size=lengths[2], max_size=lengths[2])))


@st.composite
def messages(draw: st.DrawFn) -> Received:
    readings = ingest_pb2.Readings(base_time_us=draw(bases), historical=draw(st.booleans()))
    for name in TYPES:
        if draw(st.booleans()):
            target = getattr(readings, name)
            target.SetInParent()
            draw(columns(name, target))
    table = draw(st.sampled_from([TABLE, TABLE, TABLE.with_aliases({}, {}, {})]))
    message = received(readings, draw(st.sampled_from([STRICT, KEEPING])), table)
    if draw(st.integers(0, 9)) == 0:
        message.refused = RejectedReading(None, Reason.TOO_MANY_READINGS, "too many")
    return message


@settings(max_examples=300, deadline=None)
@given(st.lists(messages(), min_size=1, max_size=4))
def test_as_the_slow_decoder_has_it(found: list[Received]) -> None:
    check(found)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_whatever_parses_is_decoded(raw: bytes) -> None:
    try:
        readings = ingest_pb2.Readings.FromString(raw)
    except Exception:
        return
    check([received(readings)])


def test_nothing_at_all() -> None:
    check([received(ingest_pb2.Readings())])


def test_history_only_attributes_are_no_candidates_for_latest() -> None:
    readings = ingest_pb2.Readings(base_time_us=NOW)
    readings.doubles.aliases.extend([1, 5])
    readings.doubles.values.extend([1.0, 2.0])
    decoded = decode([received(readings)], now_us=NOW, max_string_bytes=8)
    assert decoded.readings[ValueType.DOUBLE].historical.tolist() == [False, True]
    readings.historical = True
    decoded = decode([received(readings)], now_us=NOW, max_string_bytes=8)
    assert decoded.readings[ValueType.DOUBLE].historical.tolist() == [True, True]
