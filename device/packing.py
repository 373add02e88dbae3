"""Readings to wire form and back: packed columns per type, split so that every message is within the limits.

Pure: nothing here waits, sends or remembers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from atlasco.telemetry.v1 import ingest_pb2

from device.dictionary import Dictionary, ValueType
from device.errors import MessageTooLargeError, ValueMismatchError
from device.wire import FRAME_OVERHEAD

Value = float | int | bool | str
INT64_MIN = -(2**63)
INT64_MAX = 2**63 - 1

# The most bytes one reading can take: alias 2 (3 when it is out of range), time delta 10, value 8 or 10.
_SCALAR_BYTES = 23
# As above, without the text itself: alias, delta, tag and length.
_STRING_BYTES = 23
# base_time_us, historical, and the tags and lengths of four columns of three lists each.
_MESSAGE_BYTES = 128 + FRAME_OVERHEAD


class Reading(NamedTuple):
    """One value of one attribute at one time (microseconds since the epoch, UTC)."""

    attribute: str
    time_us: int
    value: Value


@dataclass(frozen=True, slots=True)
class Packed:
    """A serialized `Readings` and the number of readings in it."""

    payload: bytes
    count: int


@dataclass(frozen=True, slots=True)
class PackingLimits:
    """The server's Limits that bound one message.

    The defaults hold until the first Welcome says otherwise; a client that never met the server packs by them.
    """

    max_message_bytes: int = 256 * 1024
    max_readings_per_message: int = 1000
    max_string_bytes: int = 4096


@dataclass(frozen=True, slots=True)
class Column:
    """Readings of one type as parallel sequences: lists or numpy arrays of equal length.

    `times_us` may be one number: every reading of the column is at that time.
    """

    aliases: Sequence[int]
    times_us: Sequence[int] | int
    values: Sequence[Any]


def pack(
    readings: Iterable[Reading | tuple[str, int, Value]],
    dictionary: Dictionary,
    limits: PackingLimits,
    *,
    historical: bool = False,
) -> list[Packed]:
    """Pack single readings, keeping their order per attribute.

    Raises UndefinedAttributeError for an attribute that was not defined, ValueMismatchError for a value that is
    not of its attribute's type, MessageTooLargeError for a text that no message can hold. Nothing is packed then.
    """
    lists: dict[ValueType, tuple[list[int], list[int], list[Any]]] = {kind: ([], [], []) for kind in ValueType}
    for name, time_us, value in readings:
        alias, attribute = dictionary.lookup(name)
        aliases, times, values = lists[attribute.type]
        values.append(_checked(name, attribute.type, value))
        aliases.append(alias)
        times.append(time_us)
    columns = {kind: Column(*parts) for kind, parts in lists.items() if parts[0]}
    return pack_columns(
        limits,
        doubles=columns.get(ValueType.DOUBLE),
        int64s=columns.get(ValueType.INT64),
        bools=columns.get(ValueType.BOOL),
        strings=columns.get(ValueType.STRING),
        historical=historical,
    )


def _checked(name: str, kind: ValueType, value: Value) -> Any:
    if kind is ValueType.DOUBLE and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueMismatchError(f"{name!r} is DOUBLE and cannot carry an integer this large") from None
    if kind is ValueType.INT64 and isinstance(value, int) and not isinstance(value, bool):
        if INT64_MIN <= value <= INT64_MAX:
            return value
        # A wrapped value would be indistinguishable from a negative one at the other end.
        raise ValueMismatchError(f"{name!r} is INT64 and cannot carry {value}: outside -2^63 to 2^63-1")
    if kind is ValueType.BOOL and isinstance(value, bool):
        return value
    if kind is ValueType.STRING and isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    raise ValueMismatchError(f"{name!r} is {kind.name} and cannot carry a {type(value).__name__}")


def pack_columns(
    limits: PackingLimits,
    *,
    doubles: Column | None = None,
    int64s: Column | None = None,
    bools: Column | None = None,
    strings: Column | None = None,
    historical: bool = False,
) -> list[Packed]:
    """Pack whole columns; the fast way (about 0.1 µs per reading). Values are not checked one by one.

    Strings may be `str` or `bytes`. Raises ValueMismatchError when the columns' lengths differ or a value cannot
    be encoded, MessageTooLargeError for a text that no message can hold.
    """
    packed: list[Packed] = []
    builder = _Builder(historical)
    used_bytes, used_readings = _MESSAGE_BYTES, 0
    most_readings = max(1, limits.max_readings_per_message)
    for kind, column in zip(ValueType, (doubles, int64s, bools, strings), strict=True):
        if column is None or len(column.values) == 0:
            continue
        aliases, times, values = _as_lists(kind, column)
        start = 0
        while start < len(values):
            room = most_readings - used_readings
            free_bytes = limits.max_message_bytes - used_bytes
            if kind is ValueType.STRING:
                taken, size = _texts_that_fit(values, start, room, free_bytes)
            else:
                taken = min(room, free_bytes // _SCALAR_BYTES, len(values) - start)
                size = taken * _SCALAR_BYTES
            if taken > 0:
                stop = start + taken
                some_times = times if isinstance(times, int) else times[start:stop]
                builder.add(kind, aliases[start:stop], some_times, values[start:stop])
                used_readings += taken
                used_bytes += size
                start = stop
            elif used_readings == 0:
                raise MessageTooLargeError(f"a reading does not fit a message of {limits.max_message_bytes} bytes")
            if start < len(values):
                packed.append(builder.finish())
                builder = _Builder(historical)
                used_bytes, used_readings = _MESSAGE_BYTES, 0
    if used_readings:
        packed.append(builder.finish())
    return packed


def _texts_that_fit(values: list[bytes], start: int, room: int, free_bytes: int) -> tuple[int, int]:
    taken = size = 0
    for text in values[start : start + max(room, 0)]:
        grown = size + len(text) + _STRING_BYTES
        if grown > free_bytes:
            break
        size = grown
        taken += 1
    return taken, size


def _as_lists(kind: ValueType, column: Column) -> tuple[list[int], list[int] | int, list[Any]]:
    aliases, times, values = _plain(column.aliases), column.times_us, _plain(column.values)
    if not isinstance(times, int):
        times = _plain(times)
    if len(aliases) != len(values) or (not isinstance(times, int) and len(times) != len(values)):
        raise ValueMismatchError(f"the lists of the {kind.name} column differ in length")
    if kind is ValueType.STRING:
        values = [text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text for text in values]
    return aliases, times, values


def _plain(numbers: Any) -> list[Any]:
    # numpy scalars are several times slower to encode than Python's own numbers.
    if hasattr(numbers, "tolist"):
        return list(numbers.tolist())
    return numbers if isinstance(numbers, list) else list(numbers)


class _Builder:
    """One `Readings` in the making. Its base time is the first time it meets."""

    def __init__(self, historical: bool) -> None:
        self._message = ingest_pb2.Readings(historical=historical)
        self._base: int | None = None
        self._count = 0

    def add(self, kind: ValueType, aliases: list[int], times: list[int] | int, values: list[Any]) -> None:
        base = self._base
        if base is None:
            base = self._base = times if isinstance(times, int) else times[0]
        if isinstance(times, int):
            deltas = [times - base] * len(values) if times != base else []
        else:
            deltas = [time_us - base for time_us in times]
            # No list at all says "every reading at the base time": the common case of one sample of a device.
            if not any(deltas):
                deltas = []
        try:
            self._message.base_time_us = base
            column: Any = {
                ValueType.DOUBLE: self._message.doubles,
                ValueType.INT64: self._message.int64s,
                ValueType.BOOL: self._message.bools,
                ValueType.STRING: self._message.strings,
            }[kind]
            column.aliases.extend(aliases)
            column.time_deltas_us.extend(deltas)
            column.values.extend(values)
        except (TypeError, ValueError) as error:
            raise ValueMismatchError(f"the {kind.name} column cannot be encoded: {error}") from error
        self._count += len(values)

    def finish(self) -> Packed:
        return Packed(self._message.SerializeToString(), self._count)


def count_readings(message: ingest_pb2.Readings) -> int:
    """The number of readings in a message; a column of unequal lists counts with the longest of them."""
    return sum(
        max(len(column.aliases), len(column.time_deltas_us), len(column.values))
        for column in (message.doubles, message.int64s, message.bools, message.strings)
    )


def iterate(payload: bytes, dictionary: Dictionary) -> Iterator[Reading | None]:
    """The readings of a serialized `Readings` in index order.

    None stands for an index without a reading that can be named: an alias that is not defined, a column whose
    lists differ in length, a text that is not UTF-8.
    """
    message = ingest_pb2.Readings.FromString(payload)
    base = message.base_time_us
    for column in (message.doubles, message.int64s, message.bools, message.strings):
        aliases, deltas, values = column.aliases, column.time_deltas_us, column.values
        length = max(len(aliases), len(deltas), len(values))
        if len(aliases) != length or len(values) != length or len(deltas) not in (0, length):
            yield from [None] * length
            continue
        for position in range(length):
            attribute = dictionary.attribute(aliases[position])
            value: Any = values[position]
            if isinstance(value, bytes):
                try:
                    value = value.decode()
                except UnicodeDecodeError:
                    attribute = None
            if attribute is None:
                yield None
            else:
                yield Reading(attribute.name, base + (deltas[position] if deltas else 0), value)
