"""The local warehouse: Parquet files in a directory, their list in PostgreSQL, queries by DuckDB.

A load, step by step:

1. Without a transaction: write the units' files and flush them to disk. Until they are catalogued nobody sees them.
2. In one transaction: lock the partitions' load states; drop units whose partition stands elsewhere; look which change
   records were loaded before. If there are any, go back to 1 without them.
3. Still in it: catalog the files, remember the change records, store watermarks, dead letters and the new offsets.

A query reads the list of files and the completeness in one snapshot and then has DuckDB read just those files; files
replaced meanwhile stay for the grace period.
"""

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any, LiteralString

import duckdb

from storage.errors import DuplicateKey, QueryCanceled, StorageBusy, StorageUnavailable, TransactionConflict
from storage.warehouse import catalog, local_upkeep
from storage.warehouse.batch import BatchKey, ChangeSet
from storage.warehouse.cancellation import Cancellation
from storage.warehouse.catalog import SQL, Catalog, CataloguedFile, NewFile
from storage.warehouse.columns import SCHEMAS
from storage.warehouse.folder import WarehouseFolder
from storage.warehouse.local_limits import LocalLimits
from storage.warehouse.local_rebuild import LocalRebuild
from storage.warehouse.port import (
    EVERYTHING,
    Answer,
    Completeness,
    DeadLetter,
    Dialect,
    LoadState,
    Outcome,
    QueryRefused,
    Rebuild,
    Scope,
    TableSize,
    Unit,
    Upkeep,
    WarehouseStatus,
)
from storage.warehouse.relations import open_duckdb, relations, to_qmark
from storage.warehouse.steps import AtStep, no_step
from storage.warehouse.tables import distinct, file_name, tables_of

_ATTEMPTS = 5


class LocalWarehouse:
    """See `port.Warehouse`. `at` is called at each step of a load."""

    def __init__(
        self, directory: Path, catalog_dsn: str, *, limits: LocalLimits | None = None, at: AtStep = no_step
    ) -> None:
        self._folder = WarehouseFolder(directory)
        self._limits = limits or LocalLimits()
        self._catalog = Catalog(catalog_dsn, timeout_s=self._limits.catalog_timeout_s)
        self._at = at
        # Encoding releases the interpreter; two files at a time fill the two cores that one machine has to spare.
        self._writers = ThreadPoolExecutor(2, thread_name_prefix="parquet")

    def init(self) -> None:
        """See `port.Warehouse`."""
        self._folder.make()
        with self._catalog.session() as connection, connection.transaction():
            row = connection.execute(SQL["has_catalog"]).fetchone()
            if row is None or not row[0]:
                # A catalog in a database of its own, without the rest of the schema.
                connection.execute(_catalog_ddl())

    def close(self) -> None:
        """See `port.Warehouse`."""
        self._writers.shutdown()
        self._catalog.close()

    def states(self) -> dict[int, LoadState]:
        """See `port.Warehouse`."""
        with self._catalog.transaction(snapshot=True) as connection:
            return catalog.states(connection)

    def open_partitions(self, topic_id: str, first_offsets: Mapping[int, int]) -> dict[int, LoadState]:
        """See `port.Warehouse`."""
        with self._catalog.transaction() as connection:
            catalog.generation(connection)
            for partition, offset in sorted(first_offsets.items()):
                parameters = {"partition": partition, "topic_id": topic_id, "offset": offset}
                connection.execute(SQL["open_partition"], parameters)
        return self.states()

    def halt(self, partition: int, generation: int, reason: str) -> None:
        """See `port.Warehouse`."""
        with self._catalog.transaction() as connection:
            parameters = {"partition": partition, "generation": generation, "reason": reason}
            connection.execute(SQL["halt"], parameters)

    def load(self, units: Sequence[Unit]) -> list[Outcome]:
        """See `port.Warehouse`."""
        if not units:
            return []
        self._at("decoded")
        known: set[BatchKey] = set()
        for _ in range(_ATTEMPTS):
            files = [self._write(unit, known) for unit in units]
            self._at("parquet-written")
            try:
                outcomes, found = self._commit(units, files, known)
            except DuplicateKey:
                # A change record reached two partitions at once: one of them has it now, and this one will see it.
                continue
            if outcomes:
                self._at("committed")
                return outcomes
            known |= found
        raise TransactionConflict("other loaders load the same change records")

    def _write(self, unit: Unit, known: Collection[BatchKey]) -> list[NewFile]:
        name = file_name(unit, known)
        tables = tables_of(distinct(unit.changes, known))
        writes = [self._writers.submit(self._folder.write, kind, name, table) for kind, table in tables.items()]
        return [write.result() for write in writes]

    def _commit(
        self, units: Sequence[Unit], files: Sequence[list[NewFile]], known: Collection[BatchKey]
    ) -> tuple[list[Outcome], set[BatchKey]]:
        """The outcomes; or none, and change records that were loaded before and have to be left out."""
        with self._catalog.transaction() as connection:
            states = catalog.lock_states(connection, {unit.partition for unit in units})
            eligible = [unit for unit in units if _fits(unit, states.get(unit.partition))]
            keys = [change.key for unit in eligible for change in distinct(unit.changes, known)]
            found = catalog.known_batches(connection, keys)
            if found:
                return [], found
            outcomes = []
            for unit, written in zip(units, files, strict=True):
                state = states.get(unit.partition) or LoadState(unit.partition, "", 0, 0, "not opened")
                if unit not in eligible:
                    outcomes.append(Outcome(state, loaded=False))
                    continue
                catalog.add_files(connection, written)
                catalog.put_watermarks(connection, unit.watermarks)
                catalog.add_dead_letters(connection, unit.topic_id, unit.dead_letters)
                connection.execute(SQL["advance"], {"partition": unit.partition, "end": unit.end})
                loaded = distinct(unit.changes, known)
                after = LoadState(unit.partition, unit.topic_id, unit.end, unit.generation)
                rows = sum(change.rows for change in loaded)
                outcomes.append(Outcome(after, loaded=True, rows=rows, duplicates=len(unit.changes) - len(loaded)))
            catalog.add_batches(connection, sorted(set(keys)))
            connection.execute(SQL["forget_snapshot"], {"partitions": [unit.partition for unit in eligible]})
            self._at("copied")
        return outcomes, set()

    def lanes_loaded(self) -> dict[int, int]:
        """See `port.Warehouse`."""
        with self._catalog.session() as connection:
            return dict(connection.execute(SQL["lanes_loaded"]).fetchall())

    def dead_letters(self) -> list[DeadLetter]:
        """See `port.Warehouse`."""
        with self._catalog.session() as connection:
            return catalog.dead_letters(connection)

    def redrive(self, letter: DeadLetter, change: ChangeSet | None) -> bool:
        """See `port.Warehouse`."""
        changes = [] if change is None else [change]
        name = f"redriven-p{letter.partition:04d}-{letter.offset:012d}"
        files = [self._folder.write(kind, name, table) for kind, table in tables_of(changes).items()]
        with self._catalog.transaction() as connection:
            catalog.generation(connection)
            parameters = {"partition": letter.partition, "offset": letter.offset}
            if connection.execute(SQL["redriven"], parameters).fetchone() is None:
                return False
            keys = [change.key for change in changes]
            if not catalog.known_batches(connection, keys):
                catalog.add_files(connection, files)
                catalog.add_batches(connection, keys)
            return True

    def completeness(self, scope: Scope = EVERYTHING) -> Completeness:
        """See `port.Warehouse`."""
        with self._catalog.transaction(snapshot=True) as connection:
            return catalog.completeness(connection, scope)

    def query(
        self,
        statement: str,
        parameters: Sequence[Any] = (),
        *,
        scope: Scope = EVERYTHING,
        max_rows: int | None = None,
        cancellation: Cancellation | None = None,
    ) -> Answer:
        """See `port.Warehouse`."""
        with self._catalog.transaction(snapshot=True) as connection:
            state = catalog.completeness(connection, scope)
            files = catalog.files(connection, scope)
        try:
            with (
                self._duckdb() as query,
                (cancellation or Cancellation()).stoppable(lambda _, act: act(query.interrupt)),
            ):
                for name, select in relations(self._paths(files), statement).items():
                    query.execute(f"CREATE VIEW {name} AS {select}")
                # extract, not execute alone: a second statement would end the first one's safety.
                if len(query.extract_statements(text := to_qmark(statement))) != 1:
                    raise QueryRefused("one statement at a time")
                query.execute(text, list(parameters))
                columns = tuple(column[0] for column in query.description or ())
                rows = query.fetchall() if max_rows is None else query.fetchmany(max_rows + 1)
        except duckdb.InterruptException as error:
            raise QueryCanceled(str(error)) from error
        except duckdb.IOException as error:
            raise StorageUnavailable(f"a file cannot be read: {error}") from error
        except duckdb.OutOfMemoryException as error:
            # No fault of the statement: another source may have the room for it.
            raise StorageBusy(f"the warehouse has not the memory for it: {error}") from error
        except (duckdb.Error, ValueError) as error:
            raise QueryRefused(str(error)) from error
        if max_rows is not None and len(rows) > max_rows:
            raise QueryRefused(f"more than {max_rows} rows")
        return Answer(columns, rows, state)

    @property
    def dialect(self) -> Dialect:
        """See `port.Warehouse`."""
        return Dialect(microseconds="epoch_us({})", has_arg_min=True)

    def status(self) -> WarehouseStatus:
        """See `port.Warehouse`."""
        with self._catalog.transaction(snapshot=True) as connection:
            states = catalog.states(connection)
            files = catalog.files(connection, EVERYTHING)
            number = connection.execute(SQL["generation"]).fetchone()
            state = catalog.completeness(connection, EVERYTHING)
        sizes = []
        for kind in SCHEMAS:
            of_kind = [file for file in files if file.kind == kind]
            rows, size = sum(file.rows for file in of_kind), sum(file.bytes for file in of_kind)
            sizes.append(TableSize(kind, rows, len(of_kind), size))
        return WarehouseStatus("local", number[0] if number else 0, tuple(states.values()), state, tuple(sizes))

    def compact(self) -> Upkeep:
        """See `port.Warehouse`."""
        return local_upkeep.compact(self._catalog, self._folder, self._duckdb, self._limits)

    def expire(self, before_us: int, tenant_id: int | None = None) -> Upkeep:
        """See `port.Warehouse`."""
        return local_upkeep.expire(self._catalog, self._folder, self._duckdb, before_us, tenant_id)

    def begin_rebuild(self) -> Rebuild:
        """See `port.Warehouse`."""
        with self._catalog.transaction() as connection:
            number, rebuilding = catalog.generation(connection, exclusively=True)
            new = max(number, rebuilding or 0) + 1
            connection.execute(SQL["set_generation"], {"generation": number, "rebuilding": new})
        return LocalRebuild(self._catalog, self._folder, self._duckdb, new)

    def _duckdb(self) -> duckdb.DuckDBPyConnection:
        limits = self._limits
        return open_duckdb(self._folder.root, threads=limits.query_threads, memory_bytes=limits.query_memory_bytes)

    def _paths(self, files: Sequence[CataloguedFile]) -> dict[str, list[str]]:
        paths: dict[str, list[str]] = {}
        for file in files:
            paths.setdefault(file.kind, []).append(self._folder.absolute(file.path))
        return paths


def _fits(unit: Unit, state: LoadState | None) -> bool:
    """Whether a unit begins exactly where its partition stands."""
    return (
        state is not None
        and not state.halted
        and (state.topic_id, state.next_offset, state.generation) == (unit.topic_id, unit.first, unit.generation)
    )


def _catalog_ddl() -> LiteralString:
    file = resources.files("storage").joinpath("sql", "migrations", "0003_warehouse.sql")
    text = file.read_text("utf-8")
    # The grants on the rest of the schema have no object in a database that holds just the catalog.
    return text.partition("GRANT USAGE ON SCHEMA public")[0]
