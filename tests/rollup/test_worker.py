"""Rollups and projections stay equal to what they are made of: late, corrected, interleaved, interrupted."""

import math
from typing import Any

import numpy as np
import psycopg
import pytest

from storage.database import Pool
from storage.errors import StorageUnavailable
from storage.rollup.declare import (
    DeclarationExists,
    DeclarationInvalid,
    DeclarationNotFound,
    DeclarationQuota,
    NotNumeric,
    create_projection,
    create_rollup,
    drop_projection,
    drop_rollup,
    list_projections,
    list_rollups,
)
from storage.rollup.follow import LeaseLost
from storage.rollup.worker import LONGEST_READ_S, Worker
from tests.manual_clock import ManualClock
from tests.rollup.conftest import Write, make_worker, settle, write_readings
from tests.search.fleet import HOUR_US, MINUTE_US, Fleet, found

DEVICES = ("device-0001", "device-0002", "device-0003")
NUMBERS = ("temperature", "count")


def stored(connection: psycopg.Connection[Any], unit: str, kind: str) -> dict[tuple[int, int, int], tuple[Any, ...]]:
    rows = connection.execute(
        f"SELECT entity_id, attribute_id, (extract(epoch FROM bucket) * 1000000)::bigint, readings, minimum, maximum, "
        f"total::float8, deviation, (extract(epoch FROM first_ts) * 1000000)::bigint, first_value, "
        f"(extract(epoch FROM last_ts) * 1000000)::bigint, last_value FROM rollup_{unit}_{kind}"
    ).fetchall()
    connection.commit()
    return {row[:3]: row[3:] for row in rows}


def check(connection: psycopg.Connection[Any], fleet: Fleet, names: tuple[str, ...] = NUMBERS) -> None:
    """Both rollups of both types hold exactly what the readings say."""
    for kind in ("double", "bigint"):
        for unit, width in (("minute", MINUTE_US), ("hour", HOUR_US)):
            want: dict[tuple[int, int, int], list[tuple[int, Any]]] = {}
            for (device, name), readings in fleet.readings.items():
                attribute = fleet.attributes[name]
                if attribute.type == kind and name in names and device in fleet.entity_ids:
                    for t, v in sorted(readings.items()):
                        key = (fleet.entity_ids[device], attribute.attribute_id, t - t % width)
                        want.setdefault(key, []).append((t, v))
            got = stored(connection, unit, kind)
            assert got.keys() == want.keys()
            for key, points in want.items():
                values = np.array([v for _, v in points], np.float64)
                deviation = float(np.sum((values - values.mean()) ** 2))
                n, low, high, total, spread, first_us, first, last_us, last = got[key]
                assert (n, low, high) == (len(points), min(v for _, v in points), max(v for _, v in points))
                assert math.isclose(total, float(values.sum()), rel_tol=1e-12, abs_tol=1e-9)
                assert math.isclose(spread, deviation, rel_tol=1e-9, abs_tol=1e-6)
                assert (first_us, first) == points[0]
                assert (last_us, last) == points[-1]


def projected(connection: psycopg.Connection[Any]) -> list[tuple[Any, ...]]:
    rows = connection.execute("SELECT * FROM projections.p1 ORDER BY entity_id").fetchall()
    connection.commit()
    return rows


def check_projection(connection: psycopg.Connection[Any], fleet: Fleet, names: tuple[str, ...]) -> None:
    """The projection's columns are the latest values."""
    latest = {
        (row[0], row[1]): row[2:]
        for row in connection.execute(
            "SELECT entity_id, attribute_id, ts, coalesce(to_jsonb(double_value), to_jsonb(bigint_value), "
            "to_jsonb(boolean_value), to_jsonb(text_value)) FROM latest_values"
        )
    }
    ids = sorted(fleet.attributes[n].attribute_id for n in names)
    columns = ", ".join(f"t{i}, to_jsonb(v{i})" for i in ids)
    rows = connection.execute(f"SELECT entity_id, {columns} FROM projections.p1").fetchall()
    connection.commit()
    assert {row[0] for row in rows} == set(fleet.entity_ids.values())
    for entity_id, *cells in rows:
        for place, attribute_id in enumerate(ids):
            assert tuple(cells[2 * place : 2 * place + 2]) == latest.get((entity_id, attribute_id), (None, None))


def some(random: np.random.Generator, fleet: Fleet, *, days: int = 3) -> dict[int, Any]:
    times = fleet.now_us - random.integers(0, days * 24 * HOUR_US, 40)
    return {int(t): int(random.integers(-50, 50)) for t in times}


def of_type(name: str, readings: dict[int, Any]) -> dict[int, Any]:
    return {t: float(v) if name == "temperature" else v for t, v in readings.items()}


async def test_backfill_then_late_readings_and_corrections(
    owner: psycopg.Connection[Any], fleet: Fleet, write: Write, worker: Worker, admin_pool: Pool
) -> None:
    random = np.random.default_rng(1)
    for device in DEVICES:
        for name in NUMBERS:
            write(device, name, of_type(name, some(random, fleet)))
    await create_rollup(admin_pool, fleet.tenant_id, "numbers", NUMBERS)
    await create_projection(admin_pool, fleet.tenant_id, "wide", ["temperature", "count", "status", "on"])
    await settle(worker)
    assert [r.status.state for r in await list_rollups(admin_pool, fleet.tenant_id)] == ["serving"]
    status = (await list_projections(admin_pool, fleet.tenant_id))[0].status
    assert (status.state, status.backfilled) == ("serving", 1.0)
    assert status.as_of is not None
    check(owner, fleet)
    check_projection(owner, fleet, ("temperature", "count", "status", "on"))
    for _ in range(6):
        for device in DEVICES:
            name = str(random.choice(NUMBERS))
            late = some(random, fleet)
            # Corrections of some that are there.
            late |= dict.fromkeys(list(fleet.readings[device, name])[:3], 777)
            write(device, name, of_type(name, late))
        write(DEVICES[0], "status", {fleet.now_us + 1: "changed"})
        await settle(worker)
        check(owner, fleet)
        check_projection(owner, fleet, ("temperature", "count", "status", "on"))


async def test_what_commits_late_is_found(
    owner: psycopg.Connection[Any], fleet: Fleet, write: Write, worker: Worker, admin_pool: Pool, pool: Pool
) -> None:
    await create_rollup(admin_pool, fleet.tenant_id, "numbers", NUMBERS)
    write(DEVICES[0], "temperature", {fleet.now_us: 1.0})
    await settle(worker)
    # Begun first, committed last: its ids are smaller than those the worker has passed.
    write_readings(owner, fleet, DEVICES[1], "temperature", {fleet.now_us - 5: 2.0})
    async with pool.connection() as other:
        await other.execute("UPDATE outbox_consumers SET updated_at = now() WHERE false")
    await settle(worker)
    owner.commit()
    await settle(worker)
    check(owner, fleet)


async def test_an_older_worker_is_refused_and_a_death_loses_nothing(
    owner: psycopg.Connection[Any], fleet: Fleet, write: Write, worker: Worker, admin_pool: Pool, pool: Pool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    await create_rollup(admin_pool, fleet.tenant_id, "numbers", NUMBERS)
    random = np.random.default_rng(2)
    for device in DEVICES:
        write(device, "count", some(random, fleet))
    # Dies after computing, before the commit; and in the middle of the back-fill.
    for name in ("storage.rollup.follow.store", "storage.rollup.worker.fill_projection"):
        with monkeypatch.context() as patch:

            async def dies(*_: object) -> None:
                raise StorageUnavailable("killed")

            patch.setattr(name, dies)
            with pytest.raises(StorageUnavailable, match="killed"):
                for _ in range(50):
                    await worker.turn()
    newer = make_worker(pool, 2)
    await newer.adopt()
    with pytest.raises(LeaseLost):
        await worker.turn()
    with pytest.raises(LeaseLost):
        await worker.adopt()
    await settle(newer)
    check(owner, fleet)


async def test_pages_are_bounded_and_the_cursor_goes_on(
    owner: psycopg.Connection[Any], fleet: Fleet, write: Write, pool: Pool, admin_pool: Pool
) -> None:
    worker = make_worker(pool, 1, page_rows=2, backfill_devices=1)
    await worker.adopt()
    await create_rollup(admin_pool, fleet.tenant_id, "numbers", NUMBERS)
    for number in range(15):
        write(DEVICES[number % 3], "temperature", {fleet.now_us - number * MINUTE_US: float(number)})
    await settle(worker)
    check(owner, fleet)


async def test_a_retired_range_is_never_computed_again(
    owner: psycopg.Connection[Any], fleet: Fleet, write: Write, worker: Worker, admin_pool: Pool
) -> None:
    await create_rollup(admin_pool, fleet.tenant_id, "numbers", NUMBERS)
    old = fleet.now_us - 20 * 24 * HOUR_US
    write(DEVICES[0], "temperature", {old: 1.0, old + 1: 2.0})
    await settle(worker)
    before = stored(owner, "minute", "double")
    assert len(before) == 1
    # The range is retired while a batch that touches it still waits in the outbox.
    write(DEVICES[0], "temperature", {old + 2: 3.0})
    owner.execute("UPDATE history_partitions SET retired_at = now() WHERE ts_to < now() - interval '19 days'")
    owner.execute("DELETE FROM entity_attributes_double WHERE ts < now() - interval '19 days'")
    owner.commit()
    await settle(worker)
    assert stored(owner, "minute", "double") == before


async def test_the_outbox_waits_for_the_worker(
    owner: psycopg.Connection[Any], fleet: Fleet, write: Write, worker: Worker, admin_pool: Pool
) -> None:
    def retire() -> Any:
        row = owner.execute("SELECT outcome, reason FROM retire_outbox('published', '0')").fetchone()
        owner.commit()
        return row

    # An old partition with a batch that the relay has published and the worker has not seen.
    owner.execute("ALTER TABLE outbox DISABLE TRIGGER USER")
    owner.execute("SELECT ensure_outbox(now() - interval '1 hour', now())")
    write(DEVICES[0], "temperature", {fleet.now_us: 1.0})
    owner.execute("UPDATE outbox SET created_at = created_at - interval '1 hour'")
    owner.execute("INSERT INTO relay_lanes (lane) SELECT generate_series(0, 3)")
    owner.execute(
        "UPDATE relay_lanes SET published = pg_current_snapshot(), published_through = now() + interval '2 hours', "
        "server = (SELECT system_identifier::text FROM pg_control_system())"
    )
    owner.commit()
    owner.execute("UPDATE relay_lanes SET published = pg_current_snapshot()")
    owner.commit()
    # Before the worker's first round nothing is known of it.
    assert retire() == ("none", None)
    await settle(worker)
    owner.execute("UPDATE outbox_consumers SET published_through = now() + interval '2 hours'")
    owner.commit()
    outcome, reason = retire()
    # Whatever partition ends in the past goes, now that everybody has passed it.
    assert outcome == "dropped", reason


async def test_declarations(
    fleet: Fleet, pool: Pool, admin_pool: Pool, owner: psycopg.Connection[Any], write: Write, clock: ManualClock
) -> None:
    worker = make_worker(pool, 1, clock=clock)
    await worker.adopt()
    tenant = fleet.tenant_id
    made = await create_rollup(admin_pool, tenant, "numbers", ["count", "temperature"])
    assert made == await create_rollup(admin_pool, tenant, "numbers", ["temperature", "count"])
    assert (made.attributes, made.status.state, made.status.backfilled) == (["count", "temperature"], "pending", 0.0)
    with pytest.raises(DeclarationExists):
        await create_rollup(admin_pool, tenant, "numbers", ["count"])
    with pytest.raises(NotNumeric):
        await create_rollup(admin_pool, tenant, "texts", ["status"])
    for name in ("", "X", "a b", "x" * 64, "1a", "a; drop"):
        with pytest.raises(DeclarationInvalid):
            await create_projection(admin_pool, tenant, name, ["count"])
    with pytest.raises(DeclarationInvalid):
        await create_projection(admin_pool, tenant, "twice", ["count", "count"])
    for number in range(16):
        await create_projection(admin_pool, tenant, f"p{number}", ["count"], "pump")
    with pytest.raises(DeclarationQuota):
        await create_projection(admin_pool, tenant, "one_more", ["count"])
    write(DEVICES[0], "count", {fleet.now_us: 3})
    await settle(worker)
    rows = owner.execute("SELECT count(*), count(*) FILTER (WHERE entity_type = 'pump') FROM projections.p1").fetchone()
    assert rows is not None
    assert rows[0] == rows[1] > 0
    owner.commit()
    for number in range(16):
        await drop_projection(admin_pool, tenant, f"p{number}")
    with pytest.raises(DeclarationNotFound):
        await drop_projection(admin_pool, tenant, "p0")
    await drop_rollup(admin_pool, tenant, "numbers")
    await settle(worker)
    await worker.housekeeping()
    clock.now_s += 2 * LONGEST_READ_S
    await worker.housekeeping()
    assert await list_projections(admin_pool, tenant) == []
    assert await list_rollups(admin_pool, tenant) == []
    left = owner.execute("SELECT count(*) FROM pg_class WHERE relnamespace = 'projections'::regnamespace").fetchone()
    assert left == (0,)
    assert stored(owner, "minute", "bigint") == stored(owner, "hour", "bigint") == {}


def test_months_of_rollups_are_retired_however_the_server_looks_for_them(
    owner: psycopg.Connection[Any], fleet: Fleet
) -> None:
    with owner.transaction():
        owner.execute("SELECT ensure_rollups(now() - interval '200 days', now())")
        owner.execute("UPDATE tenants SET window_past = '10 days', retention = '10 days'")
        # As where there are hundreds of months: the names of all tables are read before it is known whose they are.
        for join in ("nestloop", "mergejoin"):
            owner.execute(f"SET LOCAL enable_{join} = off".encode())
        assert found(owner, "SELECT retire_rollups()") >= 4 * 5
        assert found(owner, "SELECT retire_rollups()") == 0
    left = found(owner, "SELECT count(*) FROM pg_inherits WHERE inhparent = 'rollup_hour_double'::regclass")
    owner.commit()
    assert 1 <= left <= 3
