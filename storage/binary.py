"""PostgreSQL's binary formats, made from numpy arrays: rows for COPY and arrays for parameters.

Why not the driver's own: psycopg's `write_row` costs about 300 ns per row, dumping a list of Python numbers about
100 ns per element; a structured array costs 5 to 50. The formats are those of "COPY … Binary Format" in the
PostgreSQL manual and of `array_send` in its source.
"""

import struct
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import AsyncCursor
from psycopg.adapt import Dumper
from psycopg.pq import Format

from storage.model import Columns, Int64s, ValueType
from storage.times import POSTGRES_EPOCH_US

_COPY_HEADER = b"PGCOPY\n\xff\r\n\x00" + struct.pack(">ii", 0, 0)
_COPY_TRAILER = struct.pack(">h", -1)

_VALUE_FORMATS: dict[ValueType, str] = {ValueType.DOUBLE: ">f8", ValueType.BIGINT: ">i8", ValueType.BOOLEAN: "u1"}

# The columns of a history table that COPY writes; revision stays NULL.
COPY_COLUMNS = ("tenant_id", "attribute_id", "entity_id", "ts", "value")


def copy_rows(value_type: ValueType, readings: Columns) -> bytes:
    """The readings as one COPY BINARY stream of `COPY_COLUMNS`, in their order."""
    fields: list[tuple[str, str]] = [("count", ">i2")]
    for name, kind in (("tenant", ">i4"), ("attribute", ">i4"), ("entity", ">i8"), ("ts", ">i8")):
        fields += [(f"{name}_size", ">i4"), (name, kind)]
    fields.append(("value_size", ">i4"))
    if value_type is not ValueType.TEXT:
        fields.append(("value", _VALUE_FORMATS[value_type]))
    rows = np.empty(len(readings), np.dtype(fields))
    rows["count"] = len(COPY_COLUMNS)
    rows["tenant_size"] = rows["attribute_size"] = 4
    rows["entity_size"] = rows["ts_size"] = 8
    rows["tenant"] = readings.tenant
    rows["attribute"] = readings.attribute
    rows["entity"] = readings.entity
    rows["ts"] = readings.time_us - POSTGRES_EPOCH_US
    if value_type is ValueType.TEXT:
        rows["value_size"] = [len(text) for text in readings.value]
        head, size = rows.tobytes(), rows.dtype.itemsize
        pieces = [_COPY_HEADER]
        for position, text in enumerate(readings.value):
            pieces += (head[position * size : (position + 1) * size], text)
        return b"".join((*pieces, _COPY_TRAILER))
    rows["value_size"] = rows.dtype["value"].itemsize
    rows["value"] = readings.value
    return b"".join((_COPY_HEADER, rows.tobytes(), _COPY_TRAILER))


class ArrayParameter:
    """A one-dimensional array without NULLs, as a statement's parameter; see the subclasses for the element type."""

    oid: ClassVar[int]
    element_oid: ClassVar[int]
    element: ClassVar[str]

    def __init__(self, values: NDArray[Any] | Sequence[Any]) -> None:
        self._values = values

    def encode(self) -> bytes:
        """The array in PostgreSQL's binary format."""
        elements = np.empty(len(self._values), np.dtype([("size", ">i4"), ("value", self.element)]))
        elements["size"] = elements.dtype["value"].itemsize
        elements["value"] = self._values
        return self._header(len(elements)) + elements.tobytes()

    def _header(self, count: int) -> bytes:
        if count == 0:
            return struct.pack(">iii", 0, 0, self.element_oid)
        return struct.pack(">iiiii", 1, 0, self.element_oid, count, 1)


class Int4Array(ArrayParameter):
    """integer[]"""

    oid, element_oid, element = 1007, 23, ">i4"


class Int8Array(ArrayParameter):
    """bigint[]"""

    oid, element_oid, element = 1016, 20, ">i8"


class Float8Array(ArrayParameter):
    """double precision[]"""

    oid, element_oid, element = 1022, 701, ">f8"


class BoolArray(ArrayParameter):
    """boolean[]"""

    oid, element_oid, element = 1000, 16, "u1"


class TimestampArray(ArrayParameter):
    """timestamptz[], from microseconds since 1970."""

    oid, element_oid, element = 1185, 1184, ">i8"

    def __init__(self, time_us: Int64s) -> None:
        super().__init__(np.asarray(time_us, np.int64) - POSTGRES_EPOCH_US)


class _SizedArray(ArrayParameter):
    def encode(self) -> bytes:
        pieces = [self._header(len(self._values))]
        for value in self._values:
            pieces += (struct.pack(">i", len(value)), value)
        return b"".join(pieces)


class TextArray(_SizedArray):
    """text[], from UTF-8 bytes."""

    oid, element_oid = 1009, 25


class ByteaArray(_SizedArray):
    """bytea[]"""

    oid, element_oid = 1001, 17


class UuidArray(_SizedArray):
    """uuid[], from 16-byte strings."""

    oid, element_oid = 2951, 2950


def value_array(value_type: ValueType, values: NDArray[Any]) -> ArrayParameter:
    """The values of `Columns.value` as an array parameter of the column's type."""
    match value_type:
        case ValueType.DOUBLE:
            return Float8Array(values)
        case ValueType.BIGINT:
            return Int8Array(values)
        case ValueType.BOOLEAN:
            return BoolArray(values)
        case ValueType.TEXT:
            return TextArray(values)


def decode_array(data: bytes | memoryview | None, element: str) -> NDArray[Any]:
    """A fixed-width array without NULLs that PostgreSQL sent in binary; `element` as in `ArrayParameter.element`.

    None, which is what array_agg gives for no rows, is an empty array.
    """
    native = np.dtype(element).newbyteorder("=")
    if data is None or len(data) <= 12:
        return np.empty(0, native)
    elements = np.frombuffer(data, np.dtype([("size", ">i4"), ("value", element)]), offset=20)
    return elements["value"].astype(native)


def received_arrays(cursor: AsyncCursor[tuple[Any, ...]], *elements: str) -> list[NDArray[Any]]:
    """The first row of a binary result whose columns are arrays, decoded as by `decode_array`."""
    result = cursor.pgresult
    if result is None or any(result.fformat(i) != Format.BINARY for i in range(len(elements))):
        raise AssertionError("a statement that answers with binary arrays did not")
    return [decode_array(result.get_value(0, i), element) for i, element in enumerate(elements)]


def _dumper(parameter: type[ArrayParameter]) -> type[Dumper]:
    class ArrayDumper(Dumper):
        format = Format.BINARY
        oid = parameter.oid

        def dump(self, obj: ArrayParameter) -> bytes:
            return obj.encode()

    return ArrayDumper


for _parameter in (
    Int4Array, Int8Array, Float8Array, BoolArray, TimestampArray, TextArray, ByteaArray, UuidArray,
):  # fmt: skip
    # Global, so that every connection of the process can take them: the types are ours alone.
    psycopg.adapters.register_dumper(_parameter, _dumper(_parameter))
