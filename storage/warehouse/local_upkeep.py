"""Upkeep of a local warehouse: merge, fold, leave out the names of devices that are gone, expire, delete.

Loads only ever add files, so upkeep and loads do not meet: upkeep replaces a set of files it has read by what it made
of them, whatever was added in between.

Folding a correction into the base is safe only where the base has the reading's row: a first value (revision 0) comes
once, so none can follow it. Corrections that arrived before their first value stay in the delta, and so do deletions,
for an older correction may still arrive and must lose to them.
"""

from dataclasses import replace
from pathlib import Path

import duckdb

from storage.model import ValueType
from storage.warehouse import catalog
from storage.warehouse.catalog import SQL, Catalog, CataloguedFile, NewFile
from storage.warehouse.columns import GONE, KEY, SCHEMAS, UNIQUE_KEYS, base_kind, delta_kind
from storage.warehouse.compaction import plan_merges
from storage.warehouse.folder import WarehouseFolder
from storage.warehouse.local_limits import LocalLimits
from storage.warehouse.port import Scope, Upkeep
from storage.warehouse.relations import quoted, resolved, source, without_gone
from storage.warehouse.rewrite import OpenDuckDB, duckdb_errors, swap, upkeep_lock, write_select

_KEYS = ", ".join(KEY)


def compact(source_catalog: Catalog, folder: WarehouseFolder, open_duckdb: OpenDuckDB, limits: LocalLimits) -> Upkeep:
    """See `port.Warehouse.compact`."""
    with upkeep_lock(source_catalog, wait=False) as mine:
        if not mine:
            return Upkeep()
        with source_catalog.session() as connection:
            files = catalog.files(connection, Scope())
        done = Upkeep()
        for value_type in ValueType:
            done = _add(done, _fold(source_catalog, folder, open_duckdb, limits, value_type, files))
        for kind in UNIQUE_KEYS:
            done = _add(done, _merge_unique(source_catalog, folder, open_duckdb, limits, kind, files))
        with source_catalog.transaction() as connection:
            connection.execute(SQL["forget_batches"], {"age_s": limits.batch_memory_s})
            gone = [row[0] for row in connection.execute(SQL["forget_removed"], {"grace_s": limits.grace_s})]
            paths = [row[0] for row in connection.execute(SQL["all_paths"])]
        # After the commit: a file without an entry is an orphan and found again, an entry without its file is not.
        deleted = folder.delete([*gone, *folder.orphans(paths, limits.grace_s)])
        return replace(done, files_deleted=deleted)


def _add(one: Upkeep, two: Upkeep) -> Upkeep:
    return Upkeep(
        one.files_merged + two.files_merged,
        one.files_written + two.files_written,
        one.corrections_folded + two.corrections_folded,
        one.rows_expired + two.rows_expired,
        one.files_deleted + two.files_deleted,
    )


def _fold(
    source_catalog: Catalog,
    folder: WarehouseFolder,
    open_duckdb: OpenDuckDB,
    limits: LocalLimits,
    value_type: ValueType,
    files: list[CataloguedFile],
) -> Upkeep:
    """Merge the small base files of a type, with the corrections folded in."""
    base = [file for file in files if file.kind == base_kind(value_type)]
    delta = [file for file in files if file.kind == delta_kind(value_type)]
    with open_duckdb() as query:
        corrected = _corrected(query, folder, base, delta, value_type)
        bins = plan_merges(base, target_bytes=limits.file_bytes, must=corrected)
        old: list[CataloguedFile] = []
        new: list[NewFile | None] = []
        for merged in bins:
            paths = [folder.absolute(file.path) for file in merged.files]
            select = source(merged.kind, paths)
            mine: list[str] = []
            if corrected.intersection(file.file_id for file in merged.files):
                # Only the delta rows whose reading is in this very bin: any other would be made a base row twice.
                mine = _delta_of(query, folder, delta, value_type, paths)
                select = resolved(value_type, paths, mine)
            new.append(write_select(query, folder, merged.kind, "merged", select))
            for path in mine:
                Path(path).unlink(missing_ok=True)
            old += merged.files
        folded = 0
        if corrected or len(delta) >= 4:
            kept = _rest_of_delta(query, folder, delta, value_type, [f for f in base if f.file_id in corrected])
            folded = sum(file.rows for file in delta) - (kept.statistics.rows if kept else 0)
            if folded or len(delta) >= 4:
                old += delta
                new.append(kept)
            elif kept is not None:
                folder.delete([kept.path])
    if not old:
        return Upkeep()
    made = [file for file in new if file is not None]
    with source_catalog.transaction() as connection:
        swap(connection, old, made)
    return Upkeep(files_merged=len(old), files_written=len(made), corrections_folded=folded)


def _corrected(
    query: duckdb.DuckDBPyConnection,
    folder: WarehouseFolder,
    base: list[CataloguedFile],
    delta: list[CataloguedFile],
    value_type: ValueType,
) -> set[int]:
    """The base files with a reading that the delta names."""
    if not delta:
        return set()
    first, last = min(f.min_ts_us or 0 for f in delta), max(f.max_ts_us or 0 for f in delta)
    near = {
        folder.absolute(file.path): file.file_id
        for file in base
        if (file.min_ts_us or 0) <= last and (file.max_ts_us or 0) >= first
    }
    if not near:
        return set()
    names = ", ".join(map(quoted, near))
    deltas = source(delta_kind(value_type), [folder.absolute(file.path) for file in delta])
    with duckdb_errors():
        found = query.execute(
            f"SELECT DISTINCT filename FROM read_parquet([{names}], filename = true) "
            f"SEMI JOIN ({deltas}) USING ({_KEYS})"
        ).fetchall()
    return {near[row[0]] for row in found}


def _delta_of(
    query: duckdb.DuckDBPyConnection,
    folder: WarehouseFolder,
    delta: list[CataloguedFile],
    value_type: ValueType,
    base_paths: list[str],
) -> list[str]:
    """Write the delta rows of readings in these base files to a scratch file; its path."""
    kind = delta_kind(value_type)
    rows = source(kind, [folder.absolute(file.path) for file in delta])
    keys = source(base_kind(value_type), base_paths)
    scratch = folder.root / "tmp" / f"{kind}.parquet"
    with duckdb_errors():
        query.execute(
            f"COPY (SELECT * FROM ({rows}) SEMI JOIN ({keys}) USING ({_KEYS})) "
            f"TO {quoted(str(scratch))} (FORMAT parquet)"
        )
    return [str(scratch)]


def _rest_of_delta(
    query: duckdb.DuckDBPyConnection,
    folder: WarehouseFolder,
    delta: list[CataloguedFile],
    value_type: ValueType,
    rewritten: list[CataloguedFile],
) -> NewFile | None:
    """What stays in the delta: of each reading the highest revision, if it is a deletion or not in the base."""
    kind = delta_kind(value_type)
    rows = source(kind, [folder.absolute(file.path) for file in delta])
    base = source(base_kind(value_type), [folder.absolute(file.path) for file in rewritten])
    best = (
        f"SELECT {', '.join(SCHEMAS[kind].names)} FROM (SELECT *, row_number() OVER "
        f"(PARTITION BY {_KEYS} ORDER BY revision DESC, deleted DESC) AS place FROM ({rows})) WHERE place = 1"
    )
    select = (
        f"SELECT * FROM ({best}) WHERE deleted UNION ALL "
        f"SELECT * FROM ({best}) ANTI JOIN ({base}) USING ({_KEYS}) WHERE NOT deleted"
    )
    return write_select(query, folder, kind, "rest", select)


def _merge_unique(
    source_catalog: Catalog,
    folder: WarehouseFolder,
    open_duckdb: OpenDuckDB,
    limits: LocalLimits,
    kind: str,
    files: list[CataloguedFile],
) -> Upkeep:
    """Merge files of names: every load repeats the names it met. Names of devices that are gone are left out, however
    few the files are."""
    of_kind = [file for file in files if file.kind == kind]
    gone = [folder.absolute(file.path) for file in files if file.kind == GONE] if kind == "entities" else []
    rows = source(kind, [folder.absolute(file.path) for file in of_kind])
    with open_duckdb() as query:
        if len(of_kind) < 4 and not _names_gone(query, rows, gone):
            return Upkeep()
        key = UNIQUE_KEYS[kind]
        values = [f"any_value({name}) AS {name}" for name in SCHEMAS[kind].names if name not in key]
        rows = without_gone(rows, gone)
        select = f"SELECT {', '.join([*key, *values])} FROM ({rows}) GROUP BY {', '.join(key)}"
        made = write_select(query, folder, kind, "merged", select)
    new = [made] if made else []
    with source_catalog.transaction() as connection:
        swap(connection, of_kind, new)
    return Upkeep(files_merged=len(of_kind), files_written=len(new))


def _names_gone(query: duckdb.DuckDBPyConnection, names: str, gone: list[str]) -> bool:
    """Whether there is a name of a device that is gone."""
    if not gone:
        return False
    with duckdb_errors():
        found = query.execute(
            f"SELECT 1 FROM ({names}) SEMI JOIN ({source(GONE, gone)}) USING (tenant_id, entity_id) LIMIT 1"
        ).fetchone()
    return found is not None


def expire(
    source_catalog: Catalog, folder: WarehouseFolder, open_duckdb: OpenDuckDB, before_us: int, tenant_id: int | None
) -> Upkeep:
    """See `port.Warehouse.expire`."""
    with upkeep_lock(source_catalog, wait=True):
        with source_catalog.session() as connection:
            files = [
                file
                for file in catalog.files(connection, Scope(tenant_id, None, before_us))
                if file.min_ts_us is not None
            ]
        new: list[NewFile] = []
        doomed = f"ts < make_timestamp({before_us:d})" + (
            f" AND tenant_id = {tenant_id:d}" if tenant_id is not None else ""
        )
        with open_duckdb() as query:
            for file in files:
                whole = tenant_id is None or file.min_tenant == file.max_tenant
                if whole and file.max_ts_us is not None and file.max_ts_us < before_us:
                    continue
                rows = source(file.kind, [folder.absolute(file.path)])
                kept = write_select(query, folder, file.kind, "kept", f"SELECT * FROM ({rows}) WHERE NOT ({doomed})")
                if kept is not None:
                    new.append(kept)
        with source_catalog.transaction() as connection:
            swap(connection, files, new)
            connection.execute(SQL["put_complete_from"], {"tenant_id": tenant_id or 0, "from_us": before_us})
        expired = sum(file.rows for file in files) - sum(file.statistics.rows for file in new)
        return Upkeep(files_merged=len(files), files_written=len(new), rows_expired=expired)
