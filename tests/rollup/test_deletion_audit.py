"""What `atlasco verify` says of deletions: nothing when all is gone; device, store and rows when something is left."""

import argparse
import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, LiteralString, TypeAlias
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

from cli import verify as verify_command
from storage.database import Pool
from storage.deletion import order_deletion
from storage.loader.decode import DecodedChanges, decode, headers_of
from storage.relay.cursor import Batch
from storage.relay.records import change_records
from storage.rollup.declare import create_projection
from storage.rollup.worker import Worker
from storage.verify.deletions import deleted_devices, hidden_devices, leftovers_in_primary, leftovers_in_store
from storage.verify.readings import Primary, WarehouseStore, verify
from storage.warehouse.batch import ChangeSet
from storage.warehouse.local import LocalWarehouse
from storage.warehouse.port import LaneWatermark, Unit
from tests.rollup.conftest import Write, settle
from tests.search.fleet import HOUR_US, TENANT, Fleet
from tests.storage.conftest import Database
from tests.warehouse_fixtures import change_set

DEVICE = "device-0001"
LOADER_LOGIN = "test_loader"
Carry: TypeAlias = Callable[..., None]


@pytest.fixture
def warehouse(database: Database, tmp_path: Path) -> Iterator[LocalWarehouse]:
    made = LocalWarehouse(tmp_path / "warehouse", database())
    made.init()
    made.open_partitions("topic", {0: 0})
    yield made
    made.close()


@pytest.fixture
def carry(owner: psycopg.Connection[Any], warehouse: LocalWarehouse, fleet: Fleet) -> Carry:
    """Carries the outbox to the warehouse, as the relay and the loader do, and says that it is complete. Changes given
    are loaded besides."""
    # One by one: each session takes a number of ids ahead, so a later row may have a smaller one.
    carried: list[int] = []
    offset = 0

    def carry(*more: ChangeSet) -> None:
        nonlocal offset
        rows = owner.execute(
            "SELECT id, batch_id, changes, payload FROM outbox WHERE NOT id = ANY (%s) ORDER BY xid, id", [carried]
        )
        batches = [Batch(1, number, batch.bytes, changes, payload) for number, batch, changes, payload in rows]
        owner.commit()
        carried.extend(batch.id for batch in batches)
        changes = []
        for record in change_records(batches, lane=0, complete_through=None, partitions=1, max_message_bytes=10**6):
            found = decode(headers_of(record.headers), record.key, record.value)
            assert isinstance(found, DecodedChanges)
            changes.append(found.changes)
        mark = LaneWatermark(0, 0, 1, 1, fleet.now_us + HOUR_US, 1)
        unit = Unit(0, "topic", 1, offset, offset + 1, [*changes, *more], [mark])
        offset += 1
        assert warehouse.load([unit])[0].loaded

    return carry


@pytest.fixture
async def gone(fleet: Fleet, write: Write, worker: Worker, admin_pool: Pool, carry: Carry) -> int:
    """A device whose deletion has ended, here and in the warehouse; its former id."""
    await create_projection(admin_pool, fleet.tenant_id, "wide", ["temperature", "count"])
    write(DEVICE, "temperature", {fleet.now_us - i * 1_000: 1.5 for i in range(20)})
    write(DEVICE, "status", {fleet.now_us: "x"})
    write("device-0002", "count", {fleet.now_us: 7})
    await settle(worker)
    carry()
    await order_deletion(admin_pool, fleet.tenant_id, DEVICE, uuid4())
    await settle(worker)
    carry()
    return fleet.entity_ids[DEVICE]


def audited(database: Database, warehouse: LocalWarehouse, login: str = "") -> tuple[list[str], list[str]]:
    primary = Primary(database(user=login) if login else database())
    store = WarehouseStore(warehouse)
    deleted = deleted_devices(primary, TENANT)
    assert not {d.device for d in leftovers_in_primary(primary)} - {DEVICE}
    return (
        [f"{left.store}: {left.found}" for left in leftovers_in_primary(primary)],
        [f"{left.device} in {left.store}: {left.found}" for left in leftovers_in_store(primary, store, deleted)],
    )


def test_of_a_device_that_is_gone_nothing_is_found(
    database: Database, warehouse: LocalWarehouse, gone: int, fleet: Fleet
) -> None:
    # With the rights of a loader, which is where operators run it.
    database.postgres.ensure_login(LOADER_LOGIN)
    with psycopg.connect(database(), autocommit=True) as connection:
        connection.execute(sql.SQL("GRANT atlasco_loader TO {}").format(sql.Identifier(LOADER_LOGIN)))
    assert audited(database, warehouse, LOADER_LOGIN) == ([], [])
    result = verify(Primary(database(user=LOADER_LOGIN)), WarehouseStore(warehouse))
    assert (result.readings, result.differences) == (1, ())
    assert [row[0] for row in warehouse.query("SELECT external_id FROM entities").rows] == ["device-0002"]


KEY: LiteralString = "INSERT INTO {} (tenant_id, entity_id, "


@pytest.mark.parametrize(
    ("table", "insert"),
    [
        ("entity_attributes_bigint", "attribute_id, ts, value) VALUES (%s, %s, 1, now(), 1)"),
        ("latest_values", "attribute_id, ts, bigint_value) VALUES (%s, %s, 1, now(), 1)"),
        ("device_sessions", "session_id, committed_sequence) VALUES (%s, %s, gen_random_uuid(), 1)"),
        ("device_streams", "session_id, epoch, committed_sequence) VALUES (%s, %s, gen_random_uuid(), 1, 1)"),
        ("projections.p1", "external_id, entity_type, labels, created_at) VALUES (%s, %s, 'x', '', '{}', now())"),
        (
            "rollup_hour_bigint",
            "attribute_id, bucket, readings, minimum, maximum, total, deviation, first_ts, first_value, last_ts, "
            "last_value) VALUES (%s, %s, 1, now(), 1, 1, 1, 1, 0, now(), 1, now(), 1)",
        ),
    ],
)
def test_what_is_left_in_postgres_is_found(
    owner: psycopg.Connection[Any], database: Database, warehouse: LocalWarehouse, fleet: Fleet, gone: int,
    table: LiteralString, insert: LiteralString,
) -> None:  # fmt: skip
    owner.execute("SELECT ensure_rollups(now(), now())")
    owner.execute((KEY + insert).replace("{}", table, 1), [fleet.tenant_id, gone])
    owner.commit()
    found, elsewhere = audited(database, warehouse)
    assert (found, elsewhere) == ([f"PostgreSQL: 1 rows in {table}"], [])


def test_what_is_left_in_the_warehouse_is_found(
    owner: psycopg.Connection[Any], database: Database, warehouse: LocalWarehouse, fleet: Fleet, gone: int,
    carry: Carry,
) -> None:  # fmt: skip
    tenant = {"tenant": fleet.tenant_id}
    # Readings whose deletion was lost, far from any that PostgreSQL has.
    late = fleet.now_us - 20 * 24 * HOUR_US
    carry(change_set([(gone, 1, late + i, 1.0) for i in range(3)], **tenant))
    found, elsewhere = audited(database, warehouse)
    assert (found, elsewhere) == ([], [f"{DEVICE} in the warehouse: 3 readings (double)"])
    owner.execute("DELETE FROM entity_attributes_bigint")
    owner.commit()
    result = verify(Primary(database()), WarehouseStore(warehouse), tenant=TENANT)
    assert [(d.hour_us, d.key[1], d.one) for d in result.differences] == [
        (late - late % HOUR_US, gone, None),
        (fleet.now_us - fleet.now_us % HOUR_US, fleet.entity_ids["device-0002"], None),
    ]


def test_a_name_that_postgres_does_not_know_is_found(
    owner: psycopg.Connection[Any], database: Database, warehouse: LocalWarehouse, fleet: Fleet, gone: int,
    carry: Carry,
) -> None:  # fmt: skip
    # Deleted long ago, by a program that did not tell: nothing but the name itself shows it.
    carry(change_set([(999_999, 1, fleet.now_us, 1.0)], tenant=fleet.tenant_id))
    assert audited(database, warehouse) == ([], ["device-999999 in the warehouse: its name"])
    owner.execute("UPDATE entities SET external_id = 'renamed' WHERE external_id = 'device-0002'")
    owner.commit()
    assert audited(database, warehouse)[1] == [
        "device-0002 in the warehouse: this name, and PostgreSQL calls it 'renamed'",
        "device-999999 in the warehouse: its name",
    ]


async def test_a_deletion_under_way_explains_a_name(
    database: Database, warehouse: LocalWarehouse, fleet: Fleet, gone: int, admin_pool: Pool, worker: Worker,
    carry: Carry,
) -> None:  # fmt: skip
    await order_deletion(admin_pool, fleet.tenant_id, "device-0002", uuid4())
    assert "device-0002" in [row[0] for row in warehouse.query("SELECT external_id FROM entities").rows]
    assert audited(database, warehouse) == ([], [])
    await settle(worker)
    assert audited(database, warehouse)[1] == [
        "device-0002 in the warehouse: 1 readings (bigint)",
        "device-0002 in the warehouse: its name",
    ]
    carry()
    assert audited(database, warehouse) == ([], [])


async def test_a_deletion_that_is_only_ordered_is_no_difference(
    database: Database, warehouse: LocalWarehouse, fleet: Fleet, gone: int, admin_pool: Pool, carry: Carry
) -> None:
    await order_deletion(admin_pool, fleet.tenant_id, "device-0002", uuid4())
    carry()
    # It is gone for whoever asks, and both stores still have its reading.
    for question in ("SELECT external_id FROM entities", "SELECT entity_id FROM entity_attributes"):
        assert warehouse.query(question).rows == []
    result = verify(Primary(database()), WarehouseStore(warehouse))
    assert (result.readings, result.differences) == (1, ())
    assert audited(database, warehouse) == ([], [])


Run: TypeAlias = Callable[..., int]


@pytest.fixture
def run(database: Database, tmp_path: Path) -> Run:
    """`atlasco verify` of the tenant."""

    def ran(as_json: bool) -> int:
        parser = argparse.ArgumentParser(prog="atlasco")
        verify_command.add_parser(parser.add_subparsers(required=True))
        words = ["verify", "--dsn", database(), "--warehouse-dir", str(tmp_path / "warehouse"), "--tenant", TENANT]
        arguments = parser.parse_args([*words, *(["--json"] if as_json else [])])
        return int(arguments.run(arguments))

    return ran


@pytest.mark.parametrize("as_json", [False, True])
async def test_a_device_that_is_there_and_the_warehouse_hides_is_named(
    owner: psycopg.Connection[Any], database: Database, warehouse: LocalWarehouse, fleet: Fleet, gone: int,
    write: Write, admin_pool: Pool, carry: Carry, capsys: pytest.CaptureFixture[str], run: Run, as_json: bool,
) -> None:  # fmt: skip
    await order_deletion(admin_pool, fleet.tenant_id, "device-0002", uuid4())
    carry()
    primary, store = Primary(database()), WarehouseStore(warehouse)
    tenants = [(fleet.tenant_id, TENANT)]
    assert hidden_devices(primary, store, tenants) == [], "its deletion is under way"
    # As a restore to the moment before, or a failover that lost the order.
    back = fleet.entity_ids["device-0002"]
    owner.execute("DELETE FROM entity_deletions WHERE entity_id = %s", [back])
    owner.execute(
        "INSERT INTO entities (tenant_id, entity_id, external_id, entity_type, labels) OVERRIDING SYSTEM VALUE "
        "VALUES (%s, %s, 'device-0002', '', '{}')", [fleet.tenant_id, back],
    )  # fmt: skip
    owner.commit()
    write("device-0002", "count", {fleet.now_us + 1: 8})
    carry()
    assert warehouse.query("SELECT entity_id FROM entity_attributes_bigint").rows == []
    assert await asyncio.to_thread(run, as_json) == 1
    lines = capsys.readouterr().out.splitlines()
    if as_json:
        parsed = [json.loads(line) for line in lines]
        text = next(row for row in parsed if "hidden device" in row)
        assert (text["tenant"], text["entity_id"], text["device"]) == (TENANT, back, "device-0002")
        assert "atlasco rebuild" in text["hidden device"]
        assert (parsed[-1]["different"], parsed[-1]["hidden"], parsed[-1]["leftovers"]) == (0, 1, 0)
    else:
        assert [line for line in lines if "'device-0002'" in line and "atlasco rebuild" in line]
        assert lines[-2:] == [
            "1 devices that are there and that the warehouse hides",
            "0 leftovers of deleted devices in the warehouse",
        ]


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_names_what_is_left_and_fails(
    owner: psycopg.Connection[Any], fleet: Fleet, gone: int, carry: Carry, capsys: pytest.CaptureFixture[str], run: Run,
    as_json: bool,
) -> None:  # fmt: skip
    assert run(as_json) == 0
    capsys.readouterr()
    owner.execute((KEY + "attribute_id, ts, bigint_value) VALUES (%s, %s, 1, now(), 1)").replace(
        "{}", "latest_values"), [fleet.tenant_id, gone],
    )  # fmt: skip
    owner.commit()
    carry(change_set([(gone, 1, fleet.now_us + 1, 1.0)], tenant=fleet.tenant_id))
    assert run(as_json) == 1
    lines = capsys.readouterr().out.splitlines()
    texts = [
        f"tenant {TENANT}, deleted device '{DEVICE}' (id {gone}): PostgreSQL has 1 rows in latest_values",
        f"tenant {TENANT}, deleted device '{DEVICE}' (id {gone}): the warehouse has 1 readings (double)",
    ]
    if as_json:
        parsed = [json.loads(line) for line in lines]
        assert [row["leftover"] for row in parsed if "leftover" in row] == texts
        assert (parsed[-1]["different"], parsed[-1]["leftovers"]) == (1, 1)
    else:
        assert [line for line in lines if line in texts] == texts
        assert lines[-1] == "1 leftovers of deleted devices in the warehouse"
