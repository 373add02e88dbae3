"""`atlasco rebuild`: make the warehouse again from PostgreSQL, then follow the topic from where it stands.

1. Begin a new generation in the warehouse: from now on loads are refused.
2. Read the log's end offsets E. Whatever stands before E was committed before the snapshot of step 4.
3. Read the primary's clock: the warehouse will be complete through it.
4. Open a snapshot in PostgreSQL, and read the clock again.
5. Copy every tenant's history from its floor on, names and recent deletions of devices included, in pieces of one
   partition's time range.
6. Put it in the old content's place, together with E and the snapshot.

Then loaders go on at E. The log there may still bring changes of transactions that the snapshot holds (committed
before, published after): they are recognised by their transaction id and passed over, and everything after is loaded.
What the warehouse holds of times before a tenant's floor stays: PostgreSQL no longer has it.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, LiteralString, TypeAlias

import psycopg
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.csv as pc  # type: ignore[import-untyped]
from psycopg import sql

from storage.database import Role, connection_info
from storage.errors import StorageDefect, translated
from storage.model import ValueType
from storage.warehouse.columns import SCHEMAS, UNIQUE_KEYS, base_kind
from storage.warehouse.port import Rebuild, RebuildResult, Warehouse
from storage.warehouse.statements import statements

log = logging.getLogger(__name__)

SQL = statements("rebuild.sql")

CHUNK_BYTES = 32 * 1024 * 1024
"""Rows are parsed and written in pieces of about this size."""

Connection: TypeAlias = psycopg.Connection[tuple[Any, ...]]
Progress: TypeAlias = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class LogEnd:
    """The topic and the offset after its last record, by partition."""

    topic_id: str
    offsets: Mapping[int, int]


def rebuild_warehouse(dsn: str, warehouse: Warehouse, log_end: Callable[[], LogEnd], progress: Progress) -> int:
    """Make the warehouse's content again from the primary at `dsn`; returns how many readings it has from there.

    `log_end` is asked once, after loads have stopped. A rebuild that fails leaves the old content in use and loads
    refused: run it again. The snapshot is held until the end and keeps vacuum from removing what it sees.

    Raises:
        StorageError: the database or the warehouse failed; a StorageDefect when `dsn` is a standby, whose snapshot
            says nothing about transactions of the primary.
    """
    info = connection_info(dsn, Role.MAINTAIN)
    with translated(), psycopg.connect(info, autocommit=True) as connection:
        if _one(connection, SQL["is_standby"]):
            raise StorageDefect("a rebuild reads the primary, and this is a standby")
        rebuild = warehouse.begin_rebuild()
        progress(f"generation {rebuild.generation}: loads are refused until this is finished")
        end = log_end()
        complete_through = _one(connection, SQL["clock"])
        with connection.transaction():
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            snapshot = _one(connection, SQL["snapshot"])
            through = _one(connection, SQL["clock"])
            floors: dict[int, int] = dict(connection.execute(SQL["floors"]).fetchall())
            lanes = _one(connection, SQL["lanes"])
            for kind in UNIQUE_KEYS:
                for table in _copied(connection, SQL[kind], kind):
                    rebuild.add(kind, table)
            rows: int = sum(_copy_tenant(connection, rebuild, t, floor, progress) for t, floor in floors.items())
        progress("putting it in place")
        rebuild.finish(RebuildResult(end.topic_id, end.offsets, lanes, complete_through, through, snapshot, floors))
    progress(f"done: {rows} readings of {len(floors)} tenants")
    return rows


def _copy_tenant(connection: Connection, rebuild: Rebuild, tenant_id: int, floor_us: int, progress: Progress) -> int:
    rows = 0
    ranges = connection.execute(SQL["ranges"], {"tenant_id": tenant_id, "floor_us": floor_us}).fetchall()
    for number, (start, end) in enumerate(ranges, 1):
        for value_type in ValueType:
            table = sql.Identifier(f"entity_attributes_{value_type}")
            query = sql.SQL(SQL["readings"]).format(
                table, sql.Literal(tenant_id), sql.Literal(start), sql.Literal(end), sql.Literal(floor_us)
            )
            for piece in _copied(connection, query, base_kind(value_type)):
                rebuild.add(base_kind(value_type), piece)
                rows += piece.num_rows
        progress(f"tenant {tenant_id}: {number} of {len(ranges)} time ranges, {rows} readings")
    return rows


def _copied(connection: Connection, query: LiteralString | sql.Composed, kind: str) -> Iterator[pa.Table]:
    """The rows of a COPY … TO STDOUT (FORMAT csv), in pieces."""
    with connection.cursor() as cursor, cursor.copy(query) as copy:
        pieces: list[bytes] = []
        size = 0
        for row in copy:
            pieces.append(bytes(row))
            size += len(row)
            if size >= CHUNK_BYTES:
                yield _parsed(b"".join(pieces), kind)
                pieces, size = [], 0
        if pieces:
            yield _parsed(b"".join(pieces), kind)


def _parsed(text: bytes, kind: str) -> pa.Table:
    schema = SCHEMAS[kind]
    read = {field.name: pa.int64() if field.name == "ts" else field.type for field in schema}
    table = pc.read_csv(
        pa.BufferReader(text),
        # One block: a value may hold a line break, where a block must not end.
        pc.ReadOptions(column_names=schema.names, block_size=len(text) + 1),
        pc.ParseOptions(newlines_in_values=True),
        pc.ConvertOptions(
            column_types=read, null_values=[], strings_can_be_null=False, true_values=["t"], false_values=["f"]
        ),
    )
    return table.cast(schema)


def _one(connection: Connection, query: LiteralString) -> Any:
    row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]
