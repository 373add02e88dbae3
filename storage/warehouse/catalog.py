"""The catalog of a local warehouse in PostgreSQL: files, load state, batch ids, watermarks.

Every function takes the connection of a transaction that the caller opened, so that what belongs together commits
together.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias
from uuid import UUID

import psycopg
from psycopg_pool import ConnectionPool

from storage.database import RECONNECT_S, Role, connection_info
from storage.errors import StorageUnavailable, translated
from storage.warehouse.batch import BatchKey
from storage.warehouse.port import (
    Completeness,
    DeadLetter,
    LaneWatermark,
    LoadState,
    Scope,
    SnapshotFilter,
    WarehouseMissing,
)
from storage.warehouse.statements import statements
from storage.warehouse.tables import FileStatistics

SQL = statements("catalog.sql")

Connection: TypeAlias = psycopg.Connection[tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class CataloguedFile:
    """A Parquet file in use; `path` is below the warehouse's directory."""

    file_id: int
    kind: str
    path: str
    rows: int
    bytes: int
    min_tenant: int
    max_tenant: int
    min_ts_us: int | None
    max_ts_us: int | None


@dataclass(frozen=True, slots=True)
class NewFile:
    """A Parquet file written and flushed to disk, about to be catalogued."""

    kind: str
    path: str
    bytes: int
    statistics: FileStatistics


class Catalog:
    """Connections to the catalog's database, a few, checked before use."""

    def __init__(self, dsn: str, *, max_connections: int = 4, timeout_s: float = 10.0) -> None:
        self._pool: ConnectionPool[Connection] = ConnectionPool(
            connection_info(dsn, Role.MAINTAIN),
            min_size=0,
            max_size=max_connections,
            timeout=timeout_s,
            name="atlasco-warehouse",
            open=False,
            check=ConnectionPool.check_connection,
            reconnect_timeout=RECONNECT_S,
            reconnect_failed=ConnectionPool.check,
            kwargs={"autocommit": True},
        )
        self._timeout_s = timeout_s

    def close(self) -> None:
        """End the connections."""
        self._pool.close()

    @contextmanager
    def session(self) -> Iterator[Connection]:
        """A connection without a transaction.

        Raises:
            StorageError: the database cannot be reached, or what the block's statements ran into.
        """
        if self._pool.closed:
            self._pool.open()
        with translated():
            try:
                with self._pool.connection() as connection:
                    yield connection
            except psycopg.errors.UndefinedTable as error:
                raise WarehouseMissing("the warehouse has no catalog: run `atlasco warehouse init`") from error

    @contextmanager
    def transaction(self, *, snapshot: bool = False) -> Iterator[Connection]:
        """A connection in a transaction; with `snapshot` all its statements see one state."""
        with self.session() as connection, connection.transaction():
            if snapshot:
                connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            yield connection


def generation(connection: Connection, *, exclusively: bool = False) -> tuple[int, int | None]:
    """The generation, and the one a rebuild under way is making; locked until the transaction ends."""
    row = connection.execute(SQL["lock_generation_exclusively" if exclusively else "lock_generation"]).fetchone()
    if row is None:
        raise StorageUnavailable("the catalog has no generation row")
    return row[0], row[1]


def states(connection: Connection) -> dict[int, LoadState]:
    """The load state by partition."""
    rows = connection.execute(SQL["states"]).fetchall()
    floors: dict[int, int] = {}
    if any(row[5] for row in rows):
        floors = dict(connection.execute(SQL["rebuild_floors"]).fetchall())
    return {
        partition: LoadState(
            partition, topic, offset, number, halted, SnapshotFilter(snapshot, floors) if snapshot else None
        )
        for partition, topic, offset, number, halted, snapshot in rows
    }


def lock_states(connection: Connection, partitions: Collection[int]) -> dict[int, LoadState]:
    """Lock partitions against other loads; their state, without the rebuild's filter."""
    number, rebuilding = generation(connection)
    rows = connection.execute(SQL["lock_states"], {"partitions": sorted(partitions)}).fetchall()
    halt = "" if rebuilding is None else "a rebuild is under way"
    return {row[0]: LoadState(row[0], row[1], row[2], number, row[3] or halt) for row in rows}


def known_batches(connection: Connection, keys: Sequence[BatchKey]) -> set[BatchKey]:
    """Those of the change records that were loaded before."""
    if not keys:
        return set()
    ids, tenants, buckets, deletes, parts = (list(column) for column in zip(*keys, strict=True))
    found = connection.execute(
        SQL["known_batches"],
        {
            "ids": [UUID(bytes=i) for i in ids],
            "tenants": tenants,
            "buckets": buckets,
            "deletes": deletes,
            "parts": parts,
        },
    )
    return {BatchKey(batch.bytes, *rest) for batch, *rest in found}


def add_batches(connection: Connection, keys: Sequence[BatchKey]) -> None:
    """Remember change records as loaded."""
    if not keys:
        return
    with connection.cursor() as cursor, cursor.copy(SQL["copy_batches"]) as copy:
        # In key order the index's pages are written once; the text is written by hand, for write_row costs as much
        # as decoding the record did.
        copy.write(
            "".join(
                f"{key.batch_id.hex()}\t{key.tenant_id}\t{key.bucket}\t{key.deletes:d}\t{key.part}\n"
                for key in sorted(keys)
            )
        )


def add_files(connection: Connection, files: Sequence[NewFile]) -> None:
    """Make files part of the warehouse."""
    if files:
        rows = [{"kind": f.kind, "path": f.path, "bytes": f.bytes, **asdict(f.statistics)} for f in files]
        with connection.cursor() as cursor:
            cursor.executemany(SQL["add_file"], rows)


def files(connection: Connection, scope: Scope) -> list[CataloguedFile]:
    """The files in use that may hold something of a scope."""
    return [CataloguedFile(*row) for row in connection.execute(SQL["files"], asdict(scope))]


def put_watermarks(connection: Connection, watermarks: Sequence[LaneWatermark]) -> None:
    """Store watermarks; older ones are ignored."""
    if watermarks:
        with connection.cursor() as cursor:
            cursor.executemany(SQL["put_watermark"], [asdict(watermark) for watermark in watermarks])


def add_dead_letters(connection: Connection, topic_id: str, letters: Sequence[DeadLetter]) -> None:
    """Record what could not be decoded."""
    if letters:
        with connection.cursor() as cursor:
            cursor.executemany(SQL["add_dead_letter"], [{"topic_id": topic_id, **asdict(letter)} for letter in letters])


def dead_letters(connection: Connection) -> list[DeadLetter]:
    """The dead letters not redriven yet."""
    return [DeadLetter(*row) for row in connection.execute(SQL["dead_letters"])]


def completeness(connection: Connection, scope: Scope) -> Completeness:
    """How far the warehouse has come, in the transaction's snapshot."""
    as_of = connection.execute(SQL["as_of"]).fetchone()
    start = connection.execute(SQL["complete_from"], {"tenant_id": scope.tenant_id}).fetchone()
    return Completeness(
        as_of_us=as_of[0] if as_of else None,
        complete_from_us=start[0] if start else None,
        incomplete=tuple(letter for letter in dead_letters(connection) if touches(letter, scope)),
        halted=tuple(row[0] for row in connection.execute(SQL["halted"])),
    )


def touches(letter: DeadLetter, scope: Scope) -> bool:
    """Whether an answer to `scope` may lack what a dead letter held; what is unknown counts as yes."""
    if not letter.affects_readings:
        return False
    if None not in (letter.tenant_id, scope.tenant_id) and letter.tenant_id != scope.tenant_id:
        return False
    if letter.min_ts_us is not None and scope.to_us is not None and letter.min_ts_us >= scope.to_us:
        return False
    return not (letter.max_ts_us is not None and scope.from_us is not None and letter.max_ts_us < scope.from_us)
