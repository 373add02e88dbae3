"""PostgreSQL's binary formats, as the real server reads and writes them."""

import math
import struct
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg import sql

from storage.binary import (
    COPY_COLUMNS,
    BoolArray,
    ByteaArray,
    Float8Array,
    Int4Array,
    Int8Array,
    TextArray,
    TimestampArray,
    UuidArray,
    copy_rows,
    decode_array,
    value_array,
)
from storage.model import Columns, ValueType
from tests.storage.conftest import Database

TIMES = [0, 1, -1, 946_684_799_999_999, 946_684_800_000_000, 1_800_000_000_123_456, 253_402_300_799_999_999]
VALUES: dict[ValueType, list[Any]] = {
    ValueType.DOUBLE: [math.nan, math.inf, -math.inf, -0.0, 0.0, 5e-324, 1.7976931348623157e308, 0.1],
    ValueType.BIGINT: [-(2**63), 2**63 - 1, 0, -1, 1, 2**53 + 1],
    ValueType.BOOLEAN: [True, False],
    ValueType.TEXT: [b"", "käse".encode(), "𝄞\n\t\\N".encode(), b"x" * 70_000, b"NULL", b"{a,b}"],
}
DTYPES: dict[ValueType, Any] = {
    ValueType.DOUBLE: np.float64,
    ValueType.BIGINT: np.int64,
    ValueType.BOOLEAN: np.bool_,
    ValueType.TEXT: object,
}
SQL_TYPES = {
    ValueType.DOUBLE: "double precision",
    ValueType.BIGINT: "bigint",
    ValueType.BOOLEAN: "boolean",
    ValueType.TEXT: "text",
}


def array_of(value_type: ValueType, values: list[Any]) -> Any:
    made = np.empty(len(values), DTYPES[value_type])
    made[:] = values
    return made


def exact(value_type: ValueType, value: Any) -> Any:
    """A form that tells -0.0 from 0.0 and finds NaN equal to NaN."""
    if value_type is ValueType.DOUBLE:
        return struct.pack(">d", value)
    return value.encode() if isinstance(value, str) else value


@pytest.mark.parametrize("value_type", ValueType)
@pytest.mark.parametrize("empty", [False, True], ids=["rows", "no-rows"])
def test_copied_rows_are_what_was_written(module_database: Database, value_type: ValueType, empty: bool) -> None:
    expected = [] if empty else [(time, value) for time in TIMES for value in VALUES[value_type]]
    count = len(expected)
    columns = Columns(
        tenant=np.full(count, 2**31 - 1, np.int32),
        entity=np.arange(count, dtype=np.int64) + 2**40,
        attribute=np.arange(count, dtype=np.int32),
        time_us=np.array([time for time, _ in expected], np.int64),
        value=array_of(value_type, [value for _, value in expected]),
        source=np.zeros(count, np.int32),
        index=np.arange(count, dtype=np.int32),
        historical=np.zeros(count, bool),
    )
    with psycopg.connect(module_database()) as connection:
        connection.execute(
            sql.SQL(
                "CREATE TEMP TABLE t (value {}, ts timestamptz, entity_id bigint, tenant_id integer, "
                "attribute_id integer)"
            ).format(sql.SQL(SQL_TYPES[value_type]))
        )
        names = sql.SQL(", ").join(map(sql.Identifier, COPY_COLUMNS))
        with connection.cursor().copy(sql.SQL("COPY t ({}) FROM STDIN (FORMAT BINARY)").format(names)) as copy:
            copy.write(copy_rows(value_type, columns))
        rows = connection.execute(
            "SELECT tenant_id, entity_id - 2::bigint ^ 40, attribute_id, (extract(epoch FROM ts) * 1000000)::bigint, "
            "value FROM t ORDER BY attribute_id",
            binary=True,
        ).fetchall()
    assert [(row[0], int(row[1]), row[2], row[3], exact(value_type, row[4])) for row in rows] == [
        (2**31 - 1, i, i, time, exact(value_type, value)) for i, (time, value) in enumerate(expected)
    ]


@pytest.mark.parametrize("value_type", ValueType)
def test_value_arrays_reach_the_server(module_database: Database, value_type: ValueType) -> None:
    for values in (VALUES[value_type], []):
        with psycopg.connect(module_database()) as connection:
            [(received,)] = connection.execute(
                "SELECT %s", [value_array(value_type, array_of(value_type, values))], binary=True
            ).fetchall()
        assert [exact(value_type, value) for value in received] == [exact(value_type, value) for value in values]


@pytest.mark.parametrize(
    ("parameter", "expected"),
    [
        (Int4Array([-(2**31), 0, 2**31 - 1]), [-(2**31), 0, 2**31 - 1]),
        (Int8Array([-(2**63), 2**63 - 1]), [-(2**63), 2**63 - 1]),
        (Float8Array(np.array([0.5, -math.inf])), [0.5, -math.inf]),
        (BoolArray(np.array([True, False])), [True, False]),
        (TextArray([b"", "ä".encode()]), ["", "ä"]),
        (ByteaArray([b"", b"\x00\xff"]), [b"", b"\x00\xff"]),
        (UuidArray([bytes(range(16))]), ["00010203-0405-0607-0809-0a0b0c0d0e0f"]),
        (UuidArray([]), []),
    ],
    ids=["int4", "int8", "float8", "bool", "text", "bytea", "uuid", "empty"],
)
def test_arrays_reach_the_server(module_database: Database, parameter: Any, expected: list[Any]) -> None:
    with psycopg.connect(module_database()) as connection:
        [(received,)] = connection.execute("SELECT %s", [parameter]).fetchall()
    assert [str(value) if isinstance(parameter, UuidArray) else value for value in received] == expected


def test_timestamps_reach_the_server(module_database: Database) -> None:
    with psycopg.connect(module_database()) as connection:
        rows = connection.execute(
            "SELECT (extract(epoch FROM ts) * 1000000)::bigint FROM unnest(%s) ts",
            [TimestampArray(np.array(TIMES, np.int64))],
        ).fetchall()
    assert [row[0] for row in rows] == TIMES


@pytest.mark.parametrize(
    ("query", "element", "expected"),
    [
        ("SELECT ARRAY[1, -2, 2147483647]", ">i4", [1, -2, 2**31 - 1]),
        ("SELECT ARRAY[(-9223372036854775808)::bigint, 5]", ">i8", [-(2**63), 5]),
        ("SELECT ARRAY[0.5::float8, '-Infinity']", ">f8", [0.5, -math.inf]),
        ("SELECT ARRAY[true, false]", "u1", [1, 0]),
        ("SELECT '{}'::bigint[]", ">i8", []),
        ("SELECT array_agg(n) FROM generate_series(1, 0) n", ">i4", []),
    ],
    ids=["int4", "int8", "float8", "bool", "empty", "null"],
)
def test_the_servers_arrays_are_decoded(
    module_database: Database, query: str, element: str, expected: list[Any]
) -> None:
    with psycopg.connect(module_database()) as connection, connection.cursor(binary=True) as cursor:
        cursor.execute(query.encode())
        assert cursor.pgresult is not None
        decoded = decode_array(cursor.pgresult.get_value(0, 0), element)
    assert decoded.tolist() == expected
    # Native byte order, so that arithmetic does not pay for swapping.
    assert decoded.dtype.isnative
