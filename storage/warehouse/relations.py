"""What everybody queries: SQL over Parquet files that resolves corrections and deletions, for DuckDB.

Resolution. Of all rows of a key, base and delta, the one with the highest revision counts; between a value and a
deletion of the same revision the deletion does; the key is gone if a deletion counts. Base rows that no delta row
names, nearly all, are passed through: the hash table of the join holds just the delta's keys.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import duckdb
import pyarrow as pa  # type: ignore[import-untyped]

from storage.model import ValueType
from storage.warehouse.columns import GONE, KEY, NAME_KEYS, SCHEMAS, base_kind, delta_kind, resolved_relation

_DUCKDB_TYPES: Final[Mapping[pa.DataType, str]] = {
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.float64(): "DOUBLE",
    pa.bool_(): "BOOLEAN",
    pa.string(): "VARCHAR",
    pa.timestamp("us"): "TIMESTAMP",
}
_KEYS: Final = ", ".join(KEY)

Paths = Mapping[str, Sequence[str]]
"""The files of each kind, as absolute paths."""


def quoted(text: str) -> str:
    """A text as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"


def source(kind: str, paths: Sequence[str]) -> str:
    """A SELECT of all rows in files of a kind; typed, also when there are none."""
    columns = SCHEMAS[kind]
    if not paths:
        empty = ", ".join(f"NULL::{_DUCKDB_TYPES[field.type]} AS {field.name}" for field in columns)
        return f"SELECT {empty} WHERE false"
    names = ", ".join(columns.names)
    return f"SELECT {names} FROM read_parquet([{', '.join(map(quoted, paths))}], hive_partitioning = false)"


def resolved(value_type: ValueType, base: Sequence[str], delta: Sequence[str], *, deletions: bool = False) -> str:
    """A SELECT of one type's readings as they are; with `deletions`, a column `deleted` and the deletions too."""
    base_rows = source(base_kind(value_type), base)
    flag = ", deleted" if deletions else ""
    if not delta:
        return f"SELECT {_KEYS}, value, revision{', false AS deleted' if deletions else ''} FROM ({base_rows})"
    delta_rows = source(delta_kind(value_type), delta)
    return f"""
        SELECT {_KEYS}, value, revision{", false AS deleted" if deletions else ""} FROM ({base_rows})
          ANTI JOIN ({delta_rows}) USING ({_KEYS})
        UNION ALL
        SELECT {_KEYS}, value, revision{flag} FROM (
            SELECT *, row_number() OVER (PARTITION BY {_KEYS} ORDER BY revision DESC, deleted DESC) AS place
              FROM (SELECT *, false AS deleted FROM ({base_rows}) SEMI JOIN ({delta_rows}) USING ({_KEYS})
                    UNION ALL
                    SELECT * FROM ({delta_rows}))
        ) WHERE place = 1 {"" if deletions else "AND NOT deleted"}"""


def without_gone(rows: str, gone: Sequence[str]) -> str:
    """A SELECT of what is of devices in another one, save of those that are gone by the files `gone`."""
    return f"SELECT * FROM ({rows}) ANTI JOIN ({source(GONE, gone)}) USING (tenant_id, entity_id)" if gone else rows


def relations(paths: Paths, statement: str) -> dict[str, str]:
    """The SELECT of each relation that a statement can use, by name; of those for the audit, which it does use."""
    gone = paths.get(GONE, ())
    found = {}
    if GONE in statement:
        # Said at the order of a deletion and once more at its end, and in files of their own until they are merged.
        found[GONE] = f"SELECT DISTINCT {', '.join(SCHEMAS[GONE].names)} FROM ({source(GONE, gone)})"
    for vt in ValueType:
        rows = resolved(vt, paths.get(base_kind(vt), ()), paths.get(delta_kind(vt), ()))
        if resolved_relation(vt) in statement:
            found[resolved_relation(vt)] = rows
        # A device is gone before its readings are: those are deleted one by one, and may be many.
        found[f"entity_attributes_{vt}"] = without_gone(rows, gone)
    for kind, key in NAME_KEYS.items():
        values = ", ".join(f"any_value({name}) AS {name}" for name in SCHEMAS[kind].names if name not in key)
        rows = source(kind, paths.get(kind, ()))
        if kind == "entities":
            rows = without_gone(rows, gone)
        found[kind] = f"SELECT {', '.join(key)}, {values} FROM ({rows}) GROUP BY {', '.join(key)}"
    found["entity_attributes"] = " UNION ALL ".join(
        f"SELECT {_KEYS}, '{vt}' AS type, "
        + ", ".join(f"{'value' if vt is column else 'NULL'}::{sql} AS {column}_value" for column, sql in _VALUE_SQL)
        + f", revision FROM entity_attributes_{vt}"
        for vt in ValueType
    )
    return found


_VALUE_SQL: Final = tuple((vt, _DUCKDB_TYPES[SCHEMAS[base_kind(vt)].field("value").type]) for vt in ValueType)


def open_duckdb(directory: Path, *, threads: int, memory_bytes: int) -> duckdb.DuckDBPyConnection:
    """A DuckDB of its own, in memory, that reads no file outside `directory` and installs nothing.

    Raises:
        duckdb.Error: a limit is not accepted.
    """
    connection = duckdb.connect(
        config={
            "threads": threads,
            "memory_limit": f"{memory_bytes // 1024}KiB",
            "temp_directory": str(directory / "tmp"),
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "preserve_insertion_order": "false",
        }
    )
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute(f"SET allowed_directories = [{quoted(str(directory))}]")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return connection


def to_qmark(statement: str) -> str:
    """A statement with `%s` parameters in DuckDB's form; `%%` becomes `%`, quoted texts included.

    Raises:
        ValueError: a lone percent sign, which the other adapter would refuse too.
    """
    parts = statement.split("%%")
    for part in parts:
        if part.replace("%s", "").count("%"):
            raise ValueError("a percent sign must be written as %%, a parameter as %s")
    return "%".join(part.replace("%s", "?") for part in parts)
