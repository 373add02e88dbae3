"""Rewriting files of a local warehouse: DuckDB writes the new one, the catalog swaps it for the old ones."""

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import duckdb

from storage.errors import StorageDefect, StorageUnavailable, TransactionConflict
from storage.warehouse import catalog
from storage.warehouse.catalog import SQL, Catalog, CataloguedFile, Connection, NewFile
from storage.warehouse.columns import SCHEMAS
from storage.warehouse.folder import WarehouseFolder
from storage.warehouse.relations import quoted
from storage.warehouse.tables import ROW_GROUP_ROWS, FileStatistics

OpenDuckDB: TypeAlias = Callable[[], duckdb.DuckDBPyConnection]


@contextmanager
def duckdb_errors() -> Iterator[None]:
    """Raise storage errors instead of DuckDB's from the block.

    Raises:
        StorageUnavailable: a file cannot be read or written, or memory ran out.
        StorageDefect: anything else: our own statement is wrong.
    """
    try:
        yield
    except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
        raise StorageUnavailable(str(error)) from error
    except duckdb.Error as error:
        raise StorageDefect(str(error)) from error


def write_select(
    query: duckdb.DuckDBPyConnection, folder: WarehouseFolder, kind: str, name: str, select: str
) -> NewFile | None:
    """Write the rows of a SELECT as a file of a kind; None when there are none.

    Rows are sorted as queries ask for them: by tenant, then attribute or device, then time, so that most row groups
    can be left out by their statistics.

    Raises:
        StorageError: see `duckdb_errors`, and the folder's.
    """
    columns = SCHEMAS[kind].names
    order = [column for column in ("tenant_id", "attribute_id", "entity_id", "ts") if column in columns]
    # A name of its own for each attempt: what a crash leaves is an orphan, never half of something catalogued.
    name = f"{name}-{secrets.token_hex(6)}"
    unfinished = folder.temporary(kind, name)
    target = quoted(str(unfinished))
    with duckdb_errors():
        query.execute(
            f"COPY (SELECT {', '.join(columns)} FROM ({select}) ORDER BY {', '.join(order)}) TO {target} "
            f"(FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {ROW_GROUP_ROWS})"
        )
        times = "epoch_us(min(ts)), epoch_us(max(ts))" if "ts" in columns else "NULL, NULL"
        found = query.execute(
            f"SELECT count(*), min(tenant_id), max(tenant_id), {times} FROM read_parquet([{target}])"
        ).fetchone()
    if found is None or not found[0]:
        unfinished.unlink(missing_ok=True)
        return None
    return folder.adopt(kind, name, unfinished, FileStatistics(*found))


def swap(connection: Connection, old: Sequence[CataloguedFile], new: Sequence[NewFile]) -> None:
    """Put new files in the place of old ones, in the caller's transaction.

    Raises:
        TransactionConflict: somebody else replaced one of the old ones.
    """
    removed = connection.execute(SQL["remove_files"], {"file_ids": [file.file_id for file in old]}).rowcount
    if removed != len(old):
        raise TransactionConflict("files were replaced by somebody else meanwhile")
    catalog.add_files(connection, new)


@contextmanager
def upkeep_lock(source: Catalog, *, wait: bool) -> Iterator[bool]:
    """Be the only one that replaces files; yields False when another is at it and `wait` is not asked for."""
    with source.session() as connection:
        row = connection.execute(SQL["upkeep_lock" if wait else "try_upkeep_lock"]).fetchone()
        # pg_advisory_lock returns void, which reads as an empty text.
        if not wait and not (row and row[0]):
            yield False
            return
        try:
            yield True
        finally:
            if not connection.broken:
                connection.execute(SQL["release_upkeep_lock"])
