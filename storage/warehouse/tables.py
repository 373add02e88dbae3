"""From units to the Parquet files of a load: which rows go where, in a form that is the same every time.

The same unit gives the same files, byte for byte, so that a load tried again overwrites what a crash left instead of
adding to it.
"""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from numpy.typing import NDArray

from storage.model import ValueType
from storage.warehouse.batch import BatchKey, ChangedColumns, ChangeSet
from storage.warehouse.columns import GONE, SCHEMAS, TIMESTAMP, VALUE, base_kind, delta_kind
from storage.warehouse.port import Unit

ROW_GROUP_ROWS = 256 * 1024


@dataclass(frozen=True, slots=True)
class FileStatistics:
    """What lets a query leave a file out. Times in microseconds; None for kinds without a timestamp."""

    rows: int
    min_tenant: int
    max_tenant: int
    min_ts_us: int | None
    max_ts_us: int | None


def file_name(unit: Unit, excluded: Collection[BatchKey]) -> str:
    """The name, without ending, of a unit's files: it says all their content follows from."""
    name = f"g{unit.generation}-p{unit.partition:04d}-{unit.first:012d}-{unit.end:012d}"
    left_out = sorted(change.key for change in unit.changes if change.key in excluded)
    if left_out:
        name += "-x" + hashlib.sha256(repr(left_out).encode()).hexdigest()[:12]
    # A topic made anew begins at offset 0 again.
    return f"{name}-{hashlib.sha256(unit.topic_id.encode()).hexdigest()[:8]}"


def distinct(changes: Iterable[ChangeSet], excluded: Collection[BatchKey]) -> list[ChangeSet]:
    """The change sets to load: each identity once, and none that is excluded."""
    seen = set(excluded)
    kept = []
    for change in changes:
        if change.key not in seen:
            seen.add(change.key)
            kept.append(change)
    return kept


def tables_of(changes: Sequence[ChangeSet]) -> dict[str, pa.Table]:
    """The rows of change sets by kind; kinds without rows are missing."""
    tables = {}
    for value_type in ValueType:
        upserts = [c for c in changes if not c.deletes and value_type in c.columns]
        deletes = [c for c in changes if c.deletes and value_type in c.columns]
        corrected: list[pa.Table] = []
        if upserts:
            first, corrected = _split(upserts, value_type)
            if first is not None:
                tables[base_kind(value_type)] = first
        if deletes:
            corrected.append(_columns(deletes, value_type, deleted=True))
        if corrected:
            tables[delta_kind(value_type)] = pa.concat_tables(corrected).combine_chunks()
    tables.update(_names(changes))
    return tables


def _split(upserts: Sequence[ChangeSet], value_type: ValueType) -> tuple[pa.Table | None, list[pa.Table]]:
    """First values for the base, corrections for the delta."""
    if all(change.columns[value_type].revision is None for change in upserts):
        return _columns(upserts, value_type, deleted=None), []
    rows = _columns(upserts, value_type, deleted=False)
    is_first = pc.equal(rows["revision"], 0)
    first = rows.filter(is_first).drop_columns(["deleted"])
    corrections = rows.filter(pc.invert(is_first))
    return (first if first.num_rows else None), ([corrections] if corrections.num_rows else [])


def _columns(changes: Sequence[ChangeSet], value_type: ValueType, *, deleted: bool | None) -> pa.Table:
    parts: list[ChangedColumns] = [change.columns[value_type] for change in changes]
    lengths = [len(part) for part in parts]
    total = sum(lengths)
    tenants = np.repeat(np.array([change.tenant_id for change in changes], np.int32), lengths)
    revisions: NDArray[Any] = np.concatenate(
        [np.zeros(len(p), np.int32) if p.revision is None else p.revision for p in parts]
    )
    columns: list[Any] = [
        pa.array(tenants),
        pa.array(np.concatenate([part.entity for part in parts])),
        pa.array(np.concatenate([part.attribute for part in parts])),
        pa.array(np.concatenate([part.ts_us for part in parts])).cast(TIMESTAMP),
        _values(parts, value_type, total, empty=deleted is True),
        pa.array(revisions),
    ]
    if deleted is None:
        return pa.Table.from_arrays(columns, schema=SCHEMAS[base_kind(value_type)])
    columns.append(pa.array(np.full(total, deleted)))
    return pa.Table.from_arrays(columns, schema=SCHEMAS[delta_kind(value_type)])


def _values(parts: Sequence[ChangedColumns], value_type: ValueType, total: int, *, empty: bool) -> pa.Array:
    if empty:
        return pa.nulls(total, VALUE[value_type])
    if value_type is ValueType.TEXT:
        return pa.concat_arrays([part.value for part in parts])
    return pa.array(np.concatenate([part.value for part in parts]), VALUE[value_type])


def _names(changes: Iterable[ChangeSet]) -> dict[str, pa.Table]:
    entities: defaultdict[int, dict[int, str]] = defaultdict(dict)
    attributes: defaultdict[int, dict[int, tuple[str, ValueType]]] = defaultdict(dict)
    tenants: dict[int, str] = {}
    gone: set[tuple[int, int]] = set()
    for change in changes:
        gone.update((change.tenant_id, entity) for entity in change.gone)
        tenants[change.tenant_id] = change.tenant
        entities[change.tenant_id].update(change.entities)
        attributes[change.tenant_id].update(change.attributes)
    rows: dict[str, list[tuple[Any, ...]]] = {
        GONE: sorted(gone),
        # A name that goes within the same load is never written.
        "entities": sorted(
            (t, e, name) for t, names in entities.items() for e, name in names.items() if (t, e) not in gone
        ),
        "attributes": sorted(
            (t, a, name, str(vt)) for t, names in attributes.items() for a, (name, vt) in names.items()
        ),
        "tenants": sorted(tenants.items()),
    }
    return {kind: named_table(kind, found) for kind, found in rows.items() if found}


def named_table(kind: str, rows: Sequence[tuple[Any, ...]]) -> pa.Table:
    """Rows as a table of a kind."""
    schema = SCHEMAS[kind]
    columns = zip(*rows, strict=True) if rows else [()] * len(schema)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def statistics(table: pa.Table) -> FileStatistics:
    """The statistics of rows about to be written; there is at least one."""
    tenants = pc.min_max(table["tenant_id"]).as_py()
    times: Mapping[str, int | None] = {"min": None, "max": None}
    if "ts" in table.column_names:
        times = pc.min_max(table["ts"].cast(pa.int64())).as_py()
    return FileStatistics(table.num_rows, tenants["min"], tenants["max"], times["min"], times["max"])


def write_parquet(table: pa.Table, sink: Any) -> None:
    """Write rows as Parquet, in the form that Redshift's COPY, DuckDB and people's own tools read.

    Raises:
        OSError: the sink cannot be written.
    """
    pq.write_table(
        table,
        sink,
        version="2.6",  # microseconds as INT64; the older form would be INT96 or milliseconds
        compression="zstd",
        compression_level=1,
        row_group_size=ROW_GROUP_ROWS,
        use_dictionary=[name for name in table.column_names if name not in {"ts", "value"}]
        + (
            ["value"]
            if table.schema.get_field_index("value") >= 0 and table.schema.field("value").type == pa.string()
            else []
        ),
        write_statistics=True,
        store_schema=False,
    )
