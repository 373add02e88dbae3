"""Dropping outbox partitions: only what is loaded, and never under a stalled transaction."""

import asyncio
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg

from storage.database import Pool
from storage.relay.retire import Retirement
from tests.relay.relay_support import LANES, Bench, change_batch, insert, running
from tests.waiting import eventually, until

OLD = "(date_trunc('hour', clock_timestamp()) - interval '30 minutes')"


def insert_old(connection: psycopg.Connection[Any], lane: int, batch_id: UUID) -> None:
    """A row in the partition of the hour before this one, as a transaction that began then writes it."""
    insert(connection, lane, batch_id, [change_batch(batch_id)])
    connection.execute(f"UPDATE outbox SET created_at = {OLD} WHERE batch_id = %s", [batch_id])


def old_partition(bench: Bench) -> str:
    name: str = bench.one(f"SELECT 'outbox_' || to_char({OLD} AT TIME ZONE 'UTC', 'YYYYMMDDHH24')")
    return name


def exists(bench: Bench, partition: str) -> bool:
    return bool(bench.one("SELECT to_regclass(%s) IS NOT NULL", partition))


def load(bench: Bench) -> None:
    """What a loader does: everything up to the watermarks is in the warehouse."""
    through = bench.read().complete_through()
    assert through is not None
    with bench.connect() as connection:
        connection.execute(
            "INSERT INTO loaded_lanes (lane, loaded_through) SELECT lane, %s FROM generate_series(0, %s) lane "
            "ON CONFLICT (lane) DO UPDATE SET loaded_through = excluded.loaded_through, updated_at = now()",
            [datetime.fromtimestamp(through / 1e6, UTC), LANES - 1],
        )


def arrived(bench: Bench) -> bool:
    return bench.read().contents() >= bench.outbox()


async def retire(bench: Bench, pool: Pool, after: str = "loaded") -> list[Retirement]:
    return await bench.retirer(pool, after).run_once()


async def test_only_what_is_loaded_is_dropped(bench: Bench, pool: Pool) -> None:
    partition = old_partition(bench)
    batch_id = uuid4()
    with bench.connect() as connection:
        insert_old(connection, 3, batch_id)
    assert await retire(bench, pool) == []
    async with running(bench.relay()):
        await eventually(lambda: arrived(bench), "the batch")
        await eventually(lambda: bench.read().complete_through() is not None, "watermarks")
        # Published everywhere, loaded nowhere.
        assert await retire(bench, pool) == []
        assert exists(bench, partition)

        async def dropped() -> bool:
            load(bench)
            return any(r.dropped for r in await retire(bench, pool))

        await until(dropped, "the partition dropped")
    assert not exists(bench, partition)
    assert bench.one("SELECT count(*) FROM outbox") == 0
    # The partition of this hour stays.
    assert bench.one("SELECT count(*) FROM pg_inherits WHERE inhparent = 'outbox'::regclass") >= 2


async def test_a_stalled_transaction_postpones_the_drop(bench: Bench, pool: Pool) -> None:
    partition = old_partition(bench)
    early, late = uuid4(), uuid4()
    with bench.connect() as connection:
        insert_old(connection, 0, early)
    async with running(bench.relay()):
        await eventually(lambda: arrived(bench), "the batch")
        with bench.connect() as stalled:
            insert_old(stalled, 0, late)

            async def postponed() -> bool:
                load(bench)
                return [r.dropped for r in await retire(bench, pool)] == [False]

            await until(postponed, "a postponed drop while the transaction is open")
            # Ingest goes on while it is open, and while drops are attempted.
            bench.write(4)
            stalled.commit()
        # Committed after everything that is loaded: still needed.
        found = await retire(bench, pool)
        assert [r.dropped for r in found] == [False]
        assert exists(bench, partition)
        await eventually(lambda: arrived(bench), "what the stalled transaction wrote")

        async def dropped() -> bool:
            load(bench)
            return any(r.dropped for r in await retire(bench, pool))

        await until(dropped, "the partition dropped in the end")
    seen = {batch.batch_id for batch in bench.read().batches()}
    assert {early.bytes, late.bytes} <= seen


async def test_a_write_between_the_first_check_and_the_lock_is_found_under_the_lock(bench: Bench, pool: Pool) -> None:
    partition = old_partition(bench)
    waiting = "SELECT count(*) FROM pg_locks WHERE relation = 'outbox'::regclass AND NOT granted"
    with bench.connect() as owner:
        owner.execute("ALTER FUNCTION retire_outbox SET lock_timeout = '60s'")
    async with running(bench.relay()):
        await eventually(lambda: bench.read().complete_through() is not None, "watermarks")
        with bench.connect() as stalled:
            insert_old(stalled, 0, uuid4())
            load(bench)
            # Nothing that is committed stands against the drop; it goes on to wait for the writer.
            dropping = asyncio.create_task(retire(bench, pool))
            await eventually(lambda: bench.one(waiting) > 0, "the drop waiting for the lock")
            stalled.commit()
            found = await dropping
    assert [(r.dropped, r.reason) for r in found] == [(False, "a stalled transaction wrote to it")]
    assert exists(bench, partition)
    assert bench.one("SELECT count(*) FROM outbox") == 1


async def test_without_a_warehouse_published_is_enough(bench: Bench, pool: Pool) -> None:
    partition = old_partition(bench)
    with bench.connect() as connection:
        insert_old(connection, 1, uuid4())
    async with running(bench.relay(retire_after="published", retire_interval_s=0.1)):
        await eventually(lambda: not exists(bench, partition), "the partition dropped")
    assert len(bench.read().batches()) == 1


async def test_a_lane_without_a_loader_keeps_everything(bench: Bench, pool: Pool) -> None:
    partition = old_partition(bench)
    async with running(bench.relay()):
        await eventually(lambda: bench.read().complete_through() is not None, "watermarks")
        load(bench)
        with bench.connect() as connection:
            connection.execute("DELETE FROM loaded_lanes WHERE lane = 2")
        await retire(bench, pool)
        load(bench)
        with bench.connect() as connection:
            connection.execute("DELETE FROM loaded_lanes WHERE lane = 2")
        assert await retire(bench, pool) == []
    assert exists(bench, partition)
