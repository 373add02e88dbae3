"""The name of a deleted device leaves the disk of a local warehouse, old ones too; a rebuild knows who is gone."""

from pathlib import Path

import psycopg
import pytest

from embedded.postgres import EmbeddedPostgres
from storage.loader.rebuild import LogEnd, rebuild_warehouse
from storage.warehouse.local import LocalWarehouse
from storage.warehouse.local_limits import LocalLimits
from storage.warehouse.port import Unit
from tests.warehouse_fixtures import change_set, doubles, fresh_database

TOPIC = "topic-id-1"


def load(warehouse: LocalWarehouse, offset: int, *changes: object) -> None:
    unit = Unit(0, TOPIC, 1, offset, offset + 1, changes)  # type: ignore[arg-type]
    assert [outcome.loaded for outcome in warehouse.load([unit])] == [True]


def names(warehouse: LocalWarehouse) -> list[str]:
    return [row[0] for row in warehouse.query("SELECT external_id FROM entities ORDER BY 1").rows]


def files_with(root: Path, text: bytes) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file() and text in path.read_bytes()]


@pytest.mark.parametrize("loads", [1, 6], ids=["few files", "many files"])
def test_no_file_has_the_name_after_compaction_and_grace(local: LocalWarehouse, tmp_path: Path, loads: int) -> None:
    root = tmp_path / "warehouse"
    local.open_partitions(TOPIC, {0: 0})
    for i in range(loads):
        load(local, i, change_set([*doubles(1, start=i), *doubles(1, entity=2, start=i)]))
    assert len(files_with(root, b"device-1")) == loads
    load(local, loads, change_set([], gone=[1]))
    # The grace period of this warehouse is none: what one compaction replaces, the next one deletes.
    local.compact()
    local.compact()
    assert files_with(root, b"device-1") == []
    assert len(files_with(root, b"device-2")) == 1
    assert names(local) == ["device-2"]
    assert local.compact().files_written == 0, "nothing is left to do"
    load(local, loads + 1, change_set(doubles(1, start=99)))
    assert names(local) == ["device-2"]
    local.compact()
    local.compact()
    assert files_with(root, b"device-1") == []


def test_a_warehouse_of_an_older_program_takes_what_is_gone(local: LocalWarehouse, tmp_path: Path) -> None:
    (tmp_path / "warehouse" / "gone_entities").rmdir()
    local.open_partitions(TOPIC, {0: 0})
    load(local, 0, change_set(doubles(1)))
    assert names(local) == ["device-1"]
    load(local, 1, change_set([], gone=[1]))
    assert names(local) == []


def test_a_rebuild_brings_the_deletions_that_postgres_remembers(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    with fresh_database(postgres) as database:
        with psycopg.connect(database.dsn) as connection:
            connection.execute("INSERT INTO tenants (tenant_id, name) VALUES (1, 'tenant-1')")
            connection.execute("INSERT INTO entities (tenant_id, external_id) VALUES (1, 'device-1'), (1, 'device-2')")
            connection.execute("SELECT delete_entity(1, 'device-1', gen_random_uuid())")
            row = connection.execute("SELECT entity_id FROM entity_deletions").fetchone()
            assert row is not None
            gone: int = row[0]
        warehouse = LocalWarehouse(tmp_path / "warehouse", database.dsn, limits=LocalLimits(grace_s=0.0))
        warehouse.init()
        rebuild_warehouse(database.dsn, warehouse, lambda: LogEnd(TOPIC, {0: 5}), lambda _: None)
        assert names(warehouse) == ["device-2"]
        # What was committed before the deletion and is published, or published again, long after.
        unit = Unit(0, TOPIC, 2, 5, 6, (change_set(doubles(1, entity=gone)),))
        assert warehouse.load([unit])[0].loaded
        assert names(warehouse) == ["device-2"]
        warehouse.close()
