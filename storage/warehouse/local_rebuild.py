"""A rebuild of a local warehouse: new files aside, then one transaction that puts them in the old ones' place."""

from collections.abc import Mapping

import duckdb
import pyarrow as pa  # type: ignore[import-untyped]

from storage.warehouse import catalog
from storage.warehouse.catalog import SQL, Catalog, CataloguedFile, NewFile
from storage.warehouse.columns import GONE, NAME_KEYS
from storage.warehouse.folder import WarehouseFolder
from storage.warehouse.port import LaneWatermark, RebuildRequired, RebuildResult, Scope
from storage.warehouse.relations import source
from storage.warehouse.rewrite import OpenDuckDB, duckdb_errors, swap, upkeep_lock, write_select


class LocalRebuild:
    """See `port.Rebuild`."""

    def __init__(
        self, source_catalog: Catalog, folder: WarehouseFolder, open_duckdb: OpenDuckDB, generation: int
    ) -> None:
        self._catalog = source_catalog
        self._folder = folder
        self._open_duckdb = open_duckdb
        self._generation = generation
        self._files: list[NewFile] = []

    @property
    def generation(self) -> int:
        """See `port.Rebuild`."""
        return self._generation

    def add(self, kind: str, rows: pa.Table) -> None:
        """See `port.Rebuild`."""
        if rows.num_rows:
            name = f"rebuilt-g{self._generation}-{len(self._files):06d}"
            self._files.append(self._folder.write(kind, name, rows))

    def finish(self, result: RebuildResult) -> None:
        """See `port.Rebuild`."""
        # Loads are refused since the rebuild began; the lock keeps compaction away, so the list of files stands.
        with upkeep_lock(self._catalog, wait=True):
            with self._catalog.session() as connection:
                old = catalog.files(connection, Scope())
                had_content = bool(catalog.states(connection))
            replaced, kept = self._keep(old, result.floors_us)
            with self._catalog.transaction() as connection:
                _, rebuilding = catalog.generation(connection, exclusively=True)
                if rebuilding != self._generation:
                    raise RebuildRequired("another rebuild began meanwhile")
                swap(connection, replaced, [*kept, *self._files])
                connection.execute(SQL["set_generation"], {"generation": self._generation, "rebuilding": None})
                connection.execute(SQL["reset_partitions"])
                connection.execute(SQL["reset_floors"])
                connection.execute(SQL["reset_watermarks"])
                connection.execute(SQL["all_redriven"])
                self._put_state(connection, result)
                if not had_content:
                    # Nothing was here before: what is older than a floor is not in the warehouse.
                    for tenant_id, floor in result.floors_us.items():
                        connection.execute(SQL["put_complete_from"], {"tenant_id": tenant_id, "from_us": floor})

    @staticmethod
    def _put_state(connection: catalog.Connection, result: RebuildResult) -> None:
        with connection.cursor() as cursor:
            cursor.executemany(
                SQL["rebuilt_partition"],
                [
                    {
                        "partition": partition,
                        "topic_id": result.topic_id,
                        "offset": offset,
                        "snapshot": result.snapshot,
                        "through_us": result.snapshot_through_us,
                    }
                    for partition, offset in sorted(result.offsets.items())
                ],
            )
            floors = [{"tenant_id": tenant, "floor_us": floor} for tenant, floor in result.floors_us.items()]
            if floors:
                cursor.executemany(SQL["add_floor"], floors)
        catalog.put_watermarks(connection, rebuilt_watermarks(result))

    def _keep(
        self, old: list[CataloguedFile], floors_us: Mapping[int, int]
    ) -> tuple[list[CataloguedFile], list[NewFile]]:
        """The files to replace, and files with those of their rows that are older than their tenant's floor."""
        replaced: list[CataloguedFile] = []
        kept: list[NewFile] = []
        newest_floor = max(floors_us.values(), default=None)
        with self._open_duckdb() as query:
            with duckdb_errors():
                query.execute("CREATE TABLE floors (tenant_id INTEGER, floor_us BIGINT)")
                if floors_us:
                    query.executemany("INSERT INTO floors VALUES (?, ?)", [list(item) for item in floors_us.items()])
            for file in old:
                if file.kind == GONE:
                    replaced.append(file)
                    if (made := self._still_gone(query, file)) is not None:
                        kept.append(made)
                    continue
                if file.kind not in NAME_KEYS and _older(file, floors_us):
                    continue
                replaced.append(file)
                if file.kind in NAME_KEYS or newest_floor is None or (file.min_ts_us or 0) >= newest_floor:
                    continue
                made = self._older_rows(query, file)
                if made is not None:
                    kept.append(made)
        return replaced, kept

    def _still_gone(self, query: duckdb.DuckDBPyConnection, file: CataloguedFile) -> NewFile | None:
        """Devices known to be gone: PostgreSQL forgets deletions, and batches from before them may come again. Save
        those that PostgreSQL has: it was restored to a moment before their deletion."""
        there = source("entities", [self._folder.absolute(f.path) for f in self._files if f.kind == "entities"])
        gone = source(GONE, [self._folder.absolute(file.path)])
        select = f"SELECT * FROM ({gone}) ANTI JOIN ({there}) USING (tenant_id, entity_id)"
        return write_select(query, self._folder, GONE, f"kept-g{self._generation}", select)

    def _older_rows(self, query: duckdb.DuckDBPyConnection, file: CataloguedFile) -> NewFile | None:
        rows = source(file.kind, [self._folder.absolute(file.path)])
        select = f"SELECT r.* FROM ({rows}) r JOIN floors USING (tenant_id) WHERE ts < make_timestamp(floor_us)"
        return write_select(query, self._folder, file.kind, f"kept-g{self._generation}", select)


def _older(file: CataloguedFile, floors_us: Mapping[int, int]) -> bool:
    """Whether a file belongs to one tenant and lies wholly before its floor: it stays as it is."""
    floor = floors_us.get(file.min_tenant) if file.min_tenant == file.max_tenant else None
    return floor is not None and file.max_ts_us is not None and file.max_ts_us < floor


def rebuilt_watermarks(result: RebuildResult) -> list[LaneWatermark]:
    """What a rebuild promises: everything committed before its snapshot, in every lane and partition."""
    partitions = len(result.offsets)
    return [
        LaneWatermark(lane, partition, result.lanes, partitions, result.complete_through_us, 0)
        for lane in range(result.lanes)
        for partition in sorted(result.offsets)
    ]
