"""What the database sends and takes in reads, without the driver's conversions to objects.

A datetime costs about a microsecond to make and cannot hold every time that the wire can; arrays of 50,000 elements
are taken apart by numpy in a fraction of a millisecond.
"""

import struct
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg.abc import Buffer
from psycopg.adapt import Dumper, Loader
from psycopg.pq import Format

from storage.binary import decode_array
from storage.model import Int64s, ValueType
from storage.times import POSTGRES_EPOCH_US

# Where array_send puts the first element of a one-dimensional array.
_ELEMENTS_AT = 20

_FORMATS = {ValueType.DOUBLE: ">f8", ValueType.BIGINT: ">i8", ValueType.BOOLEAN: "u1"}


class Timestamp:
    """A timestamptz parameter, from microseconds since 1970. A constant to the planner, so that it prunes by it."""

    def __init__(self, time_us: int) -> None:
        self.time_us = time_us


class _TimestampDumper(Dumper):
    format = Format.BINARY
    oid = psycopg.adapters.types["timestamptz"].oid

    def dump(self, obj: Timestamp) -> bytes:
        return struct.pack(">q", obj.time_us - POSTGRES_EPOCH_US)


# Global, so that every connection of the process can take it: the type is ours alone.
psycopg.adapters.register_dumper(Timestamp, _TimestampDumper)


class MicrosLoader(Loader):
    """Loads a binary timestamptz as microseconds since 1970."""

    format = Format.BINARY

    def load(self, data: Buffer) -> int:
        """The time; infinity, which nothing of ours stores, is far outside every range."""
        (since_2000,) = struct.unpack(">q", data)
        return int(since_2000) + POSTGRES_EPOCH_US


def times_of(data: bytes | None) -> Int64s:
    """A timestamptz[] as microseconds since 1970."""
    times: Int64s = decode_array(data, ">i8") + POSTGRES_EPOCH_US
    return times


def values_of(value_type: ValueType, data: bytes | None) -> NDArray[Any]:
    """An array of values of one type: float64, int64, bool, or objects of type str."""
    if value_type is ValueType.TEXT:
        return _texts_of(data)
    values = decode_array(data, _FORMATS[value_type])
    return values.astype(np.bool_) if value_type is ValueType.BOOLEAN else values


def _texts_of(data: bytes | None) -> NDArray[Any]:
    texts = []
    at = _ELEMENTS_AT
    if data is not None:
        size_of = struct.Struct(">i").unpack_from
        while at < len(data):
            (size,) = size_of(data, at)
            texts.append(data[at + 4 : at + 4 + size].decode())
            at += 4 + size
    values = np.empty(len(texts), object)
    values[:] = texts
    return values
