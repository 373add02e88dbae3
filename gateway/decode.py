"""Received messages to columns: every reading checked, the bad ones named. Pure.

Decoding happens once per flush over all its messages, not once per message: numpy's cost per call, about a
microsecond, is then paid a few dozen times per thousand readings.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias
from uuid import UUID

import numpy as np
from atlasco.telemetry.v1 import ingest_pb2
from numpy.typing import NDArray

from gateway.aliases import KINDS, AliasTable, brief
from storage.model import Columns, Reason, RejectedReading, ValueType
from storage.registry import Tenant

# 9999-12-31T23:59:59.999999Z. Beyond it the common clients cannot print a timestamp, and no clock is right.
MAX_TIME_US = 253_402_300_799_999_999
# A time or delta beyond this is nonsense, and adding two of them would overflow 64 bits unnoticed.
_FAR_US = 1 << 61
# The largest integer below which a double holds every one.
_EXACT = 1 << 53
# A reading with its alias and time takes far less on the wire, unless it is a long text.
_BYTES_PER_READING = 64
# Rejections of one message that carry a text for people; what is wrong with the rest is then known.
_TEXTS_PER_MESSAGE = 100

_ColumnName: TypeAlias = Literal["doubles", "int64s", "bools", "strings"]

# In the order in which the protocol counts readings.
_COLUMNS: tuple[tuple[_ColumnName, ValueType, np.dtype[Any]], ...] = (
    ("doubles", ValueType.DOUBLE, np.dtype(np.float64)),
    ("int64s", ValueType.BIGINT, np.dtype(np.int64)),
    ("bools", ValueType.BOOLEAN, np.dtype(np.bool_)),
    ("strings", ValueType.TEXT, np.dtype(object)),
)


@dataclass(slots=True)
class Received:
    """One device's readings as they came, with all that is needed to judge them."""

    tenant: Tenant
    entity_id: int
    entity_name: str
    aliases: AliasTable
    readings: ingest_pb2.Readings
    # Size on the wire in bytes, and its weight in readings, see `weight`.
    size: int
    count: int
    # Stream messages only.
    session_id: UUID | None = None
    epoch: int | None = None
    sequence: int = 0
    # Set when the message is refused as a whole; its readings are not looked at.
    refused: RejectedReading | None = None


@dataclass(slots=True)
class Decoded:
    """The readings of a flush; `rejections` has one list for each message."""

    readings: dict[ValueType, Columns]
    quarantined: dict[ValueType, Columns]
    rejections: list[list[RejectedReading]]


@dataclass(slots=True)
class _Gathered:
    """One wire column over all messages of a flush."""

    aliases: list[NDArray[Any]] = field(default_factory=list)
    deltas: list[NDArray[Any]] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)


def weight(readings: int, size: int) -> int:
    """What a message counts for while it waits, in readings.

    Never nothing, or there would be no bound to how many empty ones wait; and by its bytes when those are many for its
    readings, for what is bounded in the end is memory.
    """
    return max(1, readings, size // _BYTES_PER_READING)


def count_readings(readings: ingest_pb2.Readings) -> int:
    """How many readings there are; a column whose lists differ in length counts with the longest."""
    count = 0
    for name, _, _ in _COLUMNS:
        if readings.HasField(name):
            column = getattr(readings, name)
            count += max(len(column.aliases), len(column.time_deltas_us), len(column.values))
    return count


def count_by_type(messages: Sequence[Received]) -> dict[ValueType, int]:
    """The readings of a flush by the type they were sent as."""
    return {
        value_type: sum(len(getattr(m.readings, name).values) for m in messages if m.readings.HasField(name))
        for name, value_type, _ in _COLUMNS
    }


def decode(messages: Sequence[Received], *, now_us: int, max_string_bytes: int) -> Decoded:
    """Check and convert the readings of a flush.

    `now_us` is the server's clock, on which the clock windows are placed.
    """
    decoded = Decoded({}, {}, [[m.refused] if m.refused else [] for m in messages])
    firsts = [0] * len(messages)
    tables = _Tables(messages)
    good: dict[ValueType, list[Columns]] = {}
    aside: dict[ValueType, list[Columns]] = {}
    for name, wire_type, dtype in _COLUMNS:
        gathered = _gather(messages, name, firsts, decoded.rejections)
        if not gathered.counts:
            continue
        for value_type, kept, quarantined in _check(
            messages, tables, gathered, wire_type, dtype, now_us, max_string_bytes, decoded.rejections
        ):
            good.setdefault(value_type, []).append(kept)
            if len(quarantined):
                aside.setdefault(value_type, []).append(quarantined)
    decoded.readings = {value_type: _joined(parts) for value_type, parts in good.items()}
    decoded.quarantined = {value_type: _joined(parts) for value_type, parts in aside.items()}
    return decoded


class _Tables:
    """The alias tables of all messages as one, with an offset for each message."""

    def __init__(self, messages: Sequence[Received]) -> None:
        offsets: dict[int, int] = {}
        distinct: list[AliasTable] = []
        total = 0
        for message in messages:
            if id(message.aliases) not in offsets:
                offsets[id(message.aliases)] = total
                distinct.append(message.aliases)
                total += len(message.aliases.attribute)
        self.offset = np.array([offsets[id(m.aliases)] for m in messages], np.int64)
        self.last = np.array([len(m.aliases.attribute) - 1 for m in messages], np.int64)
        self.attribute = np.concatenate([t.attribute for t in distinct])
        self.kind = np.concatenate([t.kind for t in distinct])
        self.reason = np.concatenate([t.reason for t in distinct])
        self.keeps_latest = np.concatenate([t.keeps_latest for t in distinct])


def _gather(
    messages: Sequence[Received], name: _ColumnName, firsts: list[int], rejections: list[list[RejectedReading]]
) -> _Gathered:
    gathered = _Gathered()
    for source, message in enumerate(messages):
        if message.refused or not message.readings.HasField(name):
            continue
        column = getattr(message.readings, name)
        counts = len(column.aliases), len(column.time_deltas_us), len(column.values)
        first = firsts[source]
        firsts[source] += max(counts)
        if counts[0] != counts[2] or (counts[1] and counts[1] != counts[0]):
            text = f"{name} has {counts[0]} aliases, {counts[1]} time deltas and {counts[2]} values"
            rejections[source] += [
                RejectedReading(first + i, Reason.COLUMN_LENGTH_MISMATCH, text if i < _TEXTS_PER_MESSAGE else "")
                for i in range(max(counts))
            ]
            continue
        if not counts[0]:
            continue
        gathered.aliases.append(np.array(column.aliases, np.int64))
        gathered.deltas.append(
            np.array(column.time_deltas_us, np.int64) if counts[1] else np.zeros(counts[0], np.int64)
        )
        gathered.values.append(column.values)
        gathered.counts.append(counts[0])
        gathered.sources.append(source)
        gathered.firsts.append(first)
    return gathered


def _values(gathered: _Gathered, dtype: np.dtype[Any]) -> NDArray[Any]:
    if dtype.kind != "O":
        return np.concatenate([np.array(values, dtype) for values in gathered.values])
    texts = [text for values in gathered.values for text in values]
    array = np.empty(len(texts), object)
    array[:] = texts
    return array


def _check(
    messages: Sequence[Received],
    tables: _Tables,
    gathered: _Gathered,
    wire_type: ValueType,
    dtype: np.dtype[Any],
    now_us: int,
    max_string_bytes: int,
    rejections: list[list[RejectedReading]],
) -> list[tuple[ValueType, Columns, Columns]]:
    """For each attribute type found in one wire column: the good readings, and those to set aside."""
    counts = np.array(gathered.counts)
    source = np.repeat(np.array(gathered.sources, np.int32), counts)
    starts = np.cumsum(counts) - counts
    index = np.arange(len(source)) - np.repeat(starts - np.array(gathered.firsts), counts)
    alias = np.concatenate(gathered.aliases)
    values = _values(gathered, dtype)

    slot = tables.offset[source] + np.minimum(alias, tables.last[source])
    kind = tables.kind[slot]
    # The first reason found stands; the order is that of Reason, alias before type before value before time.
    reason = tables.reason[slot].copy()
    widened = np.zeros(len(source), bool)
    if wire_type is ValueType.BIGINT:
        widened = (reason == 0) & (kind == KINDS[ValueType.DOUBLE])
        _mark(reason, widened & ~_fits_double(values), Reason.VALUE_NOT_REPRESENTABLE)
    _mark(reason, (kind != KINDS[wire_type]) & ~widened, Reason.TYPE_MISMATCH)
    if wire_type is ValueType.TEXT:
        too_long, invalid = _text_problems(values, max_string_bytes)
        _mark(reason, too_long, Reason.STRING_TOO_LONG)
        _mark(reason, invalid, Reason.STRING_INVALID)

    base = np.array([m.readings.base_time_us for m in messages], np.int64)
    delta = np.concatenate(gathered.deltas)
    far = (np.abs(base) > _FAR_US)[source] | (delta > _FAR_US) | (delta < -_FAR_US)
    time_us = np.where(far, 0, base[source]) + np.where(far, 0, delta)
    _mark(reason, far | (time_us <= 0) | (time_us > MAX_TIME_US), Reason.TIMESTAMP_INVALID)
    oldest = np.array([now_us - m.tenant.window_past_us for m in messages], np.int64)
    newest = np.array([now_us + m.tenant.window_future_us for m in messages], np.int64)
    _mark(reason, time_us < oldest[source], Reason.TIMESTAMP_TOO_OLD)
    _mark(reason, time_us > newest[source], Reason.TIMESTAMP_TOO_NEW)

    quarantines = np.array([m.tenant.quarantines for m in messages], bool)
    outside = (reason == Reason.TIMESTAMP_TOO_OLD) | (reason == Reason.TIMESTAMP_TOO_NEW)
    aside = outside & quarantines[source]
    for position in np.flatnonzero(reason).tolist():
        where = int(source[position])
        text = ""
        if len(rejections[where]) < _TEXTS_PER_MESSAGE:
            text = _text(
                messages[where],
                Reason(int(reason[position])),
                int(alias[position]),
                values[position],
                int(time_us[position]),
                now_us,
                max_string_bytes,
            )
        rejections[where].append(
            RejectedReading(int(index[position]), Reason(int(reason[position])), brief(text), bool(aside[position]))
        )

    every = Columns(
        tenant=np.array([m.tenant.tenant_id for m in messages], np.int32)[source],
        entity=np.array([m.entity_id for m in messages], np.int64)[source],
        attribute=tables.attribute[slot],
        time_us=time_us,
        value=values,
        source=source,
        index=index.astype(np.int32),
        historical=np.array([m.readings.historical for m in messages], bool)[source] | ~tables.keeps_latest[slot],
    )
    found = [(wire_type, _chosen(every, (reason == 0) & ~widened), _chosen(every, aside & ~widened))]
    if widened.any():
        kept, quarantined = _chosen(every, (reason == 0) & widened), _chosen(every, aside & widened)
        found.append((ValueType.DOUBLE, _as_double(kept), _as_double(quarantined)))
    return found


def _mark(reason: NDArray[np.int16], where: NDArray[np.bool_], why: Reason) -> None:
    reason[where & (reason == 0)] = why


def _chosen(columns: Columns, mask: NDArray[np.bool_]) -> Columns:
    return columns if mask.all() else columns.take(mask)


def _as_double(columns: Columns) -> Columns:
    return Columns(
        columns.tenant,
        columns.entity,
        columns.attribute,
        columns.time_us,
        columns.value.astype(np.float64),
        columns.source,
        columns.index,
        columns.historical,
    )


def _fits_double(values: NDArray[np.int64]) -> NDArray[np.bool_]:
    fits: NDArray[np.bool_] = (values >= -_EXACT) & (values <= _EXACT)
    for position in np.flatnonzero(~fits).tolist():
        # Python compares int and float exactly; a cast back to int64 would overflow at 2^63.
        fits[position] = int(values[position]) == float(values[position])
    return fits


def _text_problems(values: NDArray[Any], max_bytes: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    too_long = np.array([len(text) > max_bytes for text in values], bool)
    invalid = np.array([b"\0" in text or not _is_utf8(text) for text in values], bool)
    return too_long, invalid


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _joined(parts: Sequence[Columns]) -> Columns:
    if len(parts) == 1:
        return parts[0]
    joined = Columns(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("tenant", "entity", "attribute", "time_us", "value", "source", "index", "historical")
        )
    )
    # In order of arrival again: a double may have come as an integer in one message and as a double in the next, and
    # of two values of one key the last one wins.
    return joined.take(np.lexsort((joined.index, joined.source)))


def _text(
    message: Received, reason: Reason, alias: int, value: Any, time_us: int, now_us: int, max_string_bytes: int
) -> str:
    name = message.aliases.definitions.get(alias, ("",))[0]
    match reason:
        case Reason.UNKNOWN_ALIAS:
            return f"alias {alias} is not defined on this stream"
        case Reason.TYPE_MISMATCH if alias not in message.aliases.problems:
            return f"alias {alias} ({name!r}) is of another type than its column"
        case Reason.VALUE_NOT_REPRESENTABLE:
            return f"{value} cannot be stored exactly in {name!r}, which is a double"
        case Reason.STRING_TOO_LONG:
            return f"{name!r}: {len(value)} bytes, at most {max_string_bytes} are allowed"
        case Reason.STRING_INVALID:
            return f"{name!r}: the text is not UTF-8, or holds U+0000"
        case Reason.TIMESTAMP_INVALID:
            return f"{name!r}: the time is zero, negative or past the year 9999; is the device's clock set?"
        case Reason.TIMESTAMP_TOO_OLD:
            late = (now_us - time_us) / 1e6
            return f"{name!r}: {late:.0f} s old, at most {message.tenant.window_past_us / 1e6:.0f} s are allowed"
        case Reason.TIMESTAMP_TOO_NEW:
            ahead = (time_us - now_us) / 1e6
            most = message.tenant.window_future_us / 1e6
            return f"{name!r}: {ahead:.0f} s ahead, at most {most:.0f} s are allowed"
        case _:
            problem = message.aliases.problems.get(alias)
            return problem.text if problem is not None else f"alias {alias} cannot be used"
