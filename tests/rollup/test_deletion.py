"""Deleting a device: it is gone everywhere, its followers are told, nobody writes meanwhile, a new one is a new one."""

from typing import Any
from uuid import uuid4

import psycopg
import pytest
from atlasco.telemetry.v1 import change_pb2

from storage.database import Pool
from storage.deletion import OperationConflict, OperationNotFound, find_operation, list_operations, order_deletion
from storage.errors import StorageError
from storage.reads.model import EntityNotFound
from storage.rollup.declare import create_projection, create_rollup
from storage.rollup.worker import Worker
from tests.rollup.conftest import Write, make_worker, settle
from tests.search.fleet import Fleet

DEVICE = "device-0001"
TABLES = (
    "entity_attributes", "latest_values", "rollup_minute_double", "rollup_hour_double", "rollup_minute_bigint",
    "rollup_hour_bigint", "projections.p1", "device_streams", "device_sessions", "stream_rejections", "entities",
)  # fmt: skip


def count(connection: psycopg.Connection[Any], table: str, entity_id: int) -> int:
    row = connection.execute(f"SELECT count(*) FROM {table} WHERE entity_id = %s", [entity_id]).fetchone()
    connection.commit()
    assert row is not None
    return int(row[0])


def farewells(connection: psycopg.Connection[Any]) -> list[tuple[int, bool]]:
    """(entity, whether it is said to be gone) of every DELETE in the outbox that deletes no reading."""
    found = []
    for changes, spans, payload in connection.execute(
        "SELECT changes, cardinality(tenant_ids) + cardinality(min_ts) + cardinality(max_ts), payload "
        "FROM outbox ORDER BY id"
    ).fetchall():
        (frame,) = change_pb2.OutboxPayload.FromString(payload).frames
        batch = change_pb2.ChangeBatch.FromString(frame.change_batch)
        if batch.op == change_pb2.CHANGE_OP_DELETE:
            assert all(entity.gone for entity in batch.entities)
            if not changes:
                assert spans == 0, "no answer about readings waits for it"
                found.append((batch.entities[0].entity_id, batch.entities[0].gone))
    connection.commit()
    return found


def deletions(connection: psycopg.Connection[Any]) -> set[tuple[int, int, int]]:
    """(entity, attribute, time) of every DELETE in the outbox."""
    found = set()
    for (payload,) in connection.execute("SELECT payload FROM outbox").fetchall():
        for frame in change_pb2.OutboxPayload.FromString(payload).frames:
            batch = change_pb2.ChangeBatch.FromString(frame.change_batch)
            if batch.op == change_pb2.CHANGE_OP_DELETE:
                columns: list[Any] = [batch.doubles, batch.int64s, batch.bools, batch.strings]
                for column in columns:
                    assert not column.values
                    for entity, attribute, delta in zip(
                        column.entities, column.attributes, column.time_deltas_us, strict=True
                    ):
                        found.add((
                            batch.entities[entity].entity_id,
                            batch.attributes[attribute].attribute_id,
                            batch.base_time_us + delta,
                        ))  # fmt: skip
    connection.commit()
    return found


async def test_a_device_goes_from_everywhere(
    owner: psycopg.Connection[Any], fleet: Fleet, write: Write, worker: Worker, admin_pool: Pool
) -> None:
    entity = fleet.entity_ids[DEVICE]
    values: dict[str, Any] = {"temperature": 1.5, "count": 7, "on": True, "status": "x"}
    for name, value in values.items():
        write(DEVICE, name, {fleet.now_us - i * 1_000: value for i in range(3_000)})
        write("device-0002", name, {fleet.now_us: value})
    # A corrected reading: its deletion must carry the revision.
    write(DEVICE, "count", {fleet.now_us: 8})
    await create_rollup(admin_pool, fleet.tenant_id, "numbers", ["temperature", "count"])
    await create_projection(admin_pool, fleet.tenant_id, "wide", list(values))
    owner.execute("SELECT open_stream(%s, %s, gen_random_uuid())", [fleet.tenant_id, entity])
    owner.commit()
    await settle(worker)
    assert all(count(owner, table, entity) for table in (*TABLES[:7], "device_streams"))

    operation_id = uuid4()
    ordered = await order_deletion(admin_pool, fleet.tenant_id, DEVICE, operation_id)
    assert (ordered.step, ordered.ended_at, ordered.readings_deleted) == ("database", None, 0)
    assert ordered == await order_deletion(admin_pool, fleet.tenant_id, DEVICE, operation_id)
    with pytest.raises(OperationConflict):
        await order_deletion(admin_pool, fleet.tenant_id, "device-0002", operation_id)
    with pytest.raises(EntityNotFound):
        await order_deletion(admin_pool, fleet.tenant_id, DEVICE, uuid4())
    # Nobody writes meanwhile: no name to register, no stream to open, no epoch that counts.
    assert owner.execute("SELECT register_entity(%s, %s, '', '{}')", [fleet.tenant_id, DEVICE]).fetchone() == (None,)
    owner.rollback()
    with pytest.raises(psycopg.errors.SerializationFailure):
        owner.execute("SELECT open_stream(%s, %s, gen_random_uuid())", [fleet.tenant_id, entity])
    owner.rollback()
    assert count(owner, "device_streams", entity) == 0

    await settle(worker)
    done = await find_operation(admin_pool, fleet.tenant_id, operation_id)
    assert (done.step, done.readings_deleted, done.problem) == ("done", 12_000, "")
    assert done.ended_at is not None
    assert [count(owner, table, entity) for table in TABLES] == [0] * len(TABLES)
    other = fleet.entity_ids["device-0002"]
    assert all(count(owner, table, other) for table in TABLES[:7])
    want = {
        (entity, fleet.attributes[name].attribute_id, fleet.now_us - i * 1_000) for name in values for i in range(3_000)
    }
    assert deletions(owner) == want
    assert set(farewells(owner)) == {(entity, True)}
    # The same name is another device.
    row = owner.execute("SELECT register_entity(%s, %s, '', '{}')", [fleet.tenant_id, DEVICE]).fetchone()
    owner.commit()
    assert row is not None
    assert row[0] not in (None, entity)


async def test_it_goes_on_after_a_death_and_finds_what_came_late(
    owner: psycopg.Connection[Any], fleet: Fleet, write: Write, admin_pool: Pool, pool: Pool
) -> None:
    worker = make_worker(pool, 1)
    await worker.adopt()
    entity = fleet.entity_ids[DEVICE]
    write(DEVICE, "temperature", {fleet.now_us - i * 1_000: 1.0 for i in range(11_000)})
    operation = (await order_deletion(admin_pool, fleet.tenant_id, DEVICE, uuid4())).operation_id
    await worker.delete()
    assert count(owner, "entity_attributes", entity) == 6_000
    worker = make_worker(pool, 2)
    await worker.adopt()
    while (await find_operation(admin_pool, fleet.tenant_id, operation)).step != "settle":
        await worker.delete()
    # A unary write that had looked the device up before the order.
    write(DEVICE, "temperature", {fleet.now_us + 5: 9.0})
    await settle(worker)
    done = await find_operation(admin_pool, fleet.tenant_id, operation)
    assert (done.step, done.readings_deleted) == ("done", 11_001)
    assert count(owner, "entity_attributes", entity) == count(owner, "latest_values", entity) == 0


async def test_of_a_device_without_readings_followers_are_told_too(
    owner: psycopg.Connection[Any], fleet: Fleet, worker: Worker, admin_pool: Pool
) -> None:
    await order_deletion(admin_pool, fleet.tenant_id, DEVICE, uuid4())
    assert farewells(owner) == [(fleet.entity_ids[DEVICE], True)]
    await worker.delete()
    await settle(worker)
    assert set(farewells(owner)) == {(fleet.entity_ids[DEVICE], True)}


async def test_followers_are_told_in_the_transaction_of_the_order_and_once(
    owner: psycopg.Connection[Any], fleet: Fleet, write: Write, admin_pool: Pool
) -> None:
    write(DEVICE, "count", {fleet.now_us: 1})
    operation = uuid4()
    for _ in range(2):
        await order_deletion(admin_pool, fleet.tenant_id, DEVICE, operation)
        assert farewells(owner) == [(fleet.entity_ids[DEVICE], True)]
    row = owner.execute(
        "SELECT d.xmin::text = o.xmin::text, o.lane = d.entity_id % s.buckets % s.lanes "
        "FROM entity_deletions d, settings s, outbox o ORDER BY o.id DESC LIMIT 1"
    ).fetchone()
    owner.commit()
    assert row == (True, True)
    with pytest.raises(OperationConflict):
        await order_deletion(admin_pool, fleet.tenant_id, "device-0002", operation)
    with pytest.raises(EntityNotFound):
        await order_deletion(admin_pool, fleet.tenant_id, DEVICE, uuid4())
    assert len(farewells(owner)) == 1


async def test_the_warehouse_is_waited_for_past_the_last_records_commit(
    owner: psycopg.Connection[Any], fleet: Fleet, write: Write, worker: Worker, admin_pool: Pool
) -> None:
    write(DEVICE, "count", {fleet.now_us: 1})
    owner.execute("INSERT INTO loaded_lanes (lane, loaded_through) SELECT g, '2020-01-01' FROM generate_series(0, 3) g")
    owner.commit()
    operation = (await order_deletion(admin_pool, fleet.tenant_id, DEVICE, uuid4())).operation_id
    while (await find_operation(admin_pool, fleet.tenant_id, operation)).step != "settle":
        await worker.delete()
    row = owner.execute("SELECT deleted_at FROM entity_deletions").fetchone()
    owner.commit()
    await settle(worker)
    # A loader that stands between the last deletion, as it was under way, and its commit has not seen it.
    owner.execute("UPDATE loaded_lanes SET loaded_through = %s + interval '1 us'", row)
    owner.commit()
    await settle(worker)
    assert (await find_operation(admin_pool, fleet.tenant_id, operation)).step == "warehouse"


async def test_it_waits_for_the_warehouse_and_is_listed(
    owner: psycopg.Connection[Any], fleet: Fleet, write: Write, worker: Worker, admin_pool: Pool
) -> None:
    write(DEVICE, "count", {fleet.now_us: 1})
    owner.execute("INSERT INTO loaded_lanes (lane, loaded_through) SELECT g, '2020-01-01' FROM generate_series(0, 3) g")
    owner.commit()
    first = await order_deletion(admin_pool, fleet.tenant_id, DEVICE, uuid4())
    second = await order_deletion(admin_pool, fleet.tenant_id, "device-0002", uuid4())
    await settle(worker)
    listed = await list_operations(admin_pool, fleet.tenant_id, limit=10)
    assert [(o.operation_id, o.step) for o in listed] == [
        (second.operation_id, "warehouse"), (first.operation_id, "warehouse"),
    ]  # fmt: skip
    owner.execute("UPDATE loaded_lanes SET loaded_through = now() + interval '1 minute'")
    owner.commit()
    await settle(worker)
    page = await list_operations(admin_pool, fleet.tenant_id, limit=1)
    rest = await list_operations(admin_pool, fleet.tenant_id, limit=9, after=(page[0].created_at, page[0].operation_id))
    assert [o.operation_id for o in (*page, *rest)] == [second.operation_id, first.operation_id]
    assert {o.step for o in (*page, *rest)} == {"done"}
    with pytest.raises(OperationNotFound):
        await find_operation(admin_pool, fleet.tenant_id, uuid4())


async def test_one_devices_trouble_does_not_stop_the_others(
    owner: psycopg.Connection[Any], fleet: Fleet, write: Write, worker: Worker, admin_pool: Pool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    first = await order_deletion(admin_pool, fleet.tenant_id, DEVICE, uuid4())
    second = await order_deletion(admin_pool, fleet.tenant_id, "device-0002", uuid4())
    with monkeypatch.context() as patch:

        async def fails(*_: object) -> int:
            raise StorageError("broken")

        patch.setattr("storage.deletion._delete_readings", fails)
        await worker.turn()
    assert (await find_operation(admin_pool, fleet.tenant_id, first.operation_id)).problem == "broken"
    await worker.delete()
    assert (await find_operation(admin_pool, fleet.tenant_id, second.operation_id)).step == "settle"
    await settle(worker)
    for operation in (first, second):
        done = await find_operation(admin_pool, fleet.tenant_id, operation.operation_id)
        assert (done.step, done.problem) == ("done", "")
