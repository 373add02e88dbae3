"""What the data of one tenant breaks stays with that tenant, and what cannot go on holds up nothing else."""

from typing import Any, LiteralString
from uuid import uuid4

import psycopg
import pytest

from runtime.metrics import MemoryMetrics
from storage.database import Pool
from storage.deletion import find_operation, order_deletion
from storage.errors import StorageDefect, StorageError, StorageUnavailable, TransactionConflict
from storage.rollup.declare import (
    create_projection,
    create_rollup,
    drop_projection,
    list_projections,
    list_rollups,
)
from storage.rollup.follow import LeaseLost
from storage.rollup.rests import Rests
from storage.rollup.worker import LONGEST_READ_S, Worker
from tests.manual_clock import ManualClock
from tests.rollup.conftest import make_worker, settle, write_readings
from tests.rollup.test_extreme_values import DEVICE, rival
from tests.search.fleet import HOUR_US, MINUTE_US, Fleet, found

__all__ = ["rival"]

POISON = 666.0


@pytest.fixture
def metrics() -> MemoryMetrics:
    return MemoryMetrics()


@pytest.fixture
async def worker(pool: Pool, fleet: Fleet, clock: ManualClock, metrics: MemoryMetrics) -> Worker:
    made = make_worker(pool, 1, clock=clock, metrics=metrics)
    await made.adopt()
    return made


def write(owner: psycopg.Connection[Any], tenant: Fleet, readings: dict[int, float]) -> None:
    with owner.transaction():
        write_readings(owner, tenant, DEVICE, "temperature", readings)


def refuse(owner: psycopg.Connection[Any], fleet: Fleet, table: str, column: str) -> None:
    """From now on the database refuses what one reading of the tenant comes to."""
    owner.execute(
        f"ALTER TABLE {table} ADD CONSTRAINT poison "
        f"CHECK (tenant_id <> {fleet.tenant_id} OR {column} IS DISTINCT FROM {POISON})".encode()
    )
    owner.commit()


def hours(owner: psycopg.Connection[Any], tenant: Fleet) -> int:
    count = found(owner, "SELECT count(*) FROM rollup_hour_double WHERE tenant_id = %s", tenant.tenant_id)
    owner.commit()
    return int(count)


def passed(owner: psycopg.Connection[Any]) -> Any:
    through = found(owner, "SELECT min(published_through) FROM outbox_consumers WHERE consumer = 'rollup'")
    owner.commit()
    return through


async def problems(pool: Pool, tenant: Fleet) -> list[str]:
    return [r.status.problem for r in await list_rollups(pool, tenant.tenant_id)]


async def states(pool: Pool, *tenants: Fleet) -> list[str]:
    return [r.status.state for t in tenants for r in await list_rollups(pool, t.tenant_id)]


def test_what_fails_again_rests_longer_and_what_succeeds_starts_over(clock: ManualClock) -> None:
    rests = Rests(clock, 1.0, 5.0)
    for pause_s in (1.0, 2.0, 4.0, 5.0, 5.0):
        assert rests.is_due("a")
        assert rests.resting == []
        rests.failed("a")
        clock.now_s += pause_s - 0.1
        assert not rests.is_due("a")
        assert rests.is_due("b")
        assert rests.resting == ["a"]
        clock.now_s += 0.1
    rests.succeeded("a")
    rests.failed("a")
    clock.now_s += 1.0
    assert rests.is_due("a")


@pytest.mark.parametrize("in_round", [True, False], ids=["round", "back-fill"])
async def test_rollups_of_one_tenant_go_out_of_service_alone(
    owner: psycopg.Connection[Any], fleet: Fleet, rival: Fleet, worker: Worker, admin_pool: Pool, clock: ManualClock,
    metrics: MemoryMetrics, in_round: bool,
) -> None:  # fmt: skip
    hour = fleet.now_us - fleet.now_us % HOUR_US - 5 * HOUR_US
    for tenant in (fleet, rival):
        write(owner, tenant, {hour: 1.0})
        if in_round:
            await create_rollup(admin_pool, tenant.tenant_id, "numbers", ["temperature"])
    await settle(worker)
    refuse(owner, fleet, "rollup_minute_double", "minimum")
    before = passed(owner)
    for tenant in (fleet, rival):
        write(owner, tenant, {hour + HOUR_US: POISON})
        if not in_round:
            await create_rollup(admin_pool, tenant.tenant_id, "numbers", ["temperature"])
    await settle(worker)
    assert await states(admin_pool, fleet, rival) == ["failed", "serving"]
    (problem,) = await problems(admin_pool, fleet)
    assert 'violates check constraint "poison"' in problem
    assert await problems(admin_pool, rival) == [""]
    assert hours(owner, rival) == 2
    assert passed(owner) > before
    assert metrics.value("atlasco_rollup_failures", source="data") == 1
    # While it rests it is passed over.
    write(owner, fleet, {hour + HOUR_US + MINUTE_US: POISON})
    await settle(worker)
    assert metrics.value("atlasco_rollup_failures", source="data") == 1
    # Mended, it is filled anew; with what was passed over.
    owner.execute("ALTER TABLE rollup_minute_double DROP CONSTRAINT poison")
    owner.commit()
    write(owner, fleet, {hour + 2 * HOUR_US: 3.0})
    await settle(worker)
    assert await states(admin_pool, fleet) == ["failed"]
    clock.now_s += 3600
    await settle(worker)
    assert await states(admin_pool, fleet) == ["serving"]
    assert await problems(admin_pool, fleet) == [""]
    assert hours(owner, fleet) == 3
    counted = found(owner, "SELECT sum(readings) FROM rollup_hour_double WHERE tenant_id = %s", fleet.tenant_id)
    owner.commit()
    assert counted == 4


async def test_a_projection_goes_out_of_service_alone(
    owner: psycopg.Connection[Any], fleet: Fleet, rival: Fleet, worker: Worker, admin_pool: Pool, clock: ManualClock
) -> None:
    for tenant in (fleet, rival):
        await create_projection(admin_pool, tenant.tenant_id, "wide", ["temperature"])
        await create_rollup(admin_pool, tenant.tenant_id, "numbers", ["temperature"])
    await settle(worker)
    number = fleet.attributes["temperature"].attribute_id
    refuse(owner, fleet, "projections.p1", f"v{number}")
    for tenant in (fleet, rival):
        write(owner, tenant, {fleet.now_us: POISON})
    await settle(worker)

    async def projections() -> list[str]:
        return [p.status.state for t in (fleet, rival) for p in await list_projections(admin_pool, t.tenant_id)]

    assert await projections() == ["failed", "serving"]
    (projection,) = await list_projections(admin_pool, fleet.tenant_id)
    assert 'violates check constraint "poison"' in projection.status.problem
    assert await states(admin_pool, fleet, rival) == ["serving", "serving"]
    clock.now_s += 3600
    await settle(worker)
    assert await projections() == ["failed", "serving"]
    write(owner, fleet, {fleet.now_us + 1: 1.0})
    clock.now_s += 3600
    await settle(worker)
    assert await projections() == ["serving", "serving"]


@pytest.mark.parametrize("state", ["backfilling", "serving", "dropping"])
async def test_a_problem_that_an_older_worker_left_is_over(
    owner: psycopg.Connection[Any], fleet: Fleet, worker: Worker, admin_pool: Pool, state: str
) -> None:
    await create_rollup(admin_pool, fleet.tenant_id, "numbers", ["temperature"])
    await create_projection(admin_pool, fleet.tenant_id, "wide", ["temperature"])
    await settle(worker)
    for table in ("rollups", "projections"):
        owner.execute(f"UPDATE {table} SET state = %s, problem = 'it was full'".encode(), [state])
    owner.commit()
    (rollup,) = await list_rollups(admin_pool, fleet.tenant_id)
    (projection,) = await list_projections(admin_pool, fleet.tenant_id)
    for status in (rollup.status, projection.status):
        assert (status.state, status.problem) == (state, "")


@pytest.mark.parametrize("in_round", [True, False], ids=["round", "back-fill"])
async def test_a_projection_without_its_table_goes_out_of_service_alone(
    owner: psycopg.Connection[Any], fleet: Fleet, rival: Fleet, worker: Worker, admin_pool: Pool,
    metrics: MemoryMetrics, in_round: bool,
) -> None:  # fmt: skip
    await settle(worker)
    await create_projection(admin_pool, fleet.tenant_id, "wide", ["temperature"])
    await create_rollup(admin_pool, rival.tenant_id, "numbers", ["temperature"])
    if in_round:
        await settle(worker)
    owner.execute("DROP TABLE projections.p1 CASCADE")
    owner.commit()
    before = passed(owner)
    for tenant in (fleet, rival):
        write(owner, tenant, {tenant.now_us - 1: 1.0})
    await settle(worker)
    assert passed(owner) > before
    assert await states(admin_pool, rival) == ["serving"]
    assert hours(owner, rival) == 1
    assert [p.status.state for p in await list_projections(admin_pool, fleet.tenant_id)] == ["failed"]
    assert metrics.value("atlasco_rollup_failures", source="data") == 1


@pytest.mark.parametrize(
    "action",
    # A timeout is the server's cancellation of a statement, too; nobody has to wait for this one.
    ["PERFORM pg_cancel_backend(pg_backend_pid()); PERFORM pg_sleep(60)", "RAISE unique_violation"],
    ids=["timeout", "duplicate"],
)
async def test_what_ends_the_statements_of_one_tenant_puts_it_out_of_service_alone(
    owner: psycopg.Connection[Any], fleet: Fleet, rival: Fleet, worker: Worker,
    admin_pool: Pool, metrics: MemoryMetrics, action: LiteralString,
) -> None:  # fmt: skip
    hour = fleet.now_us - fleet.now_us % HOUR_US - 5 * HOUR_US
    for tenant in (fleet, rival):
        await create_rollup(admin_pool, tenant.tenant_id, "numbers", ["temperature"])
    await settle(worker)
    owner.execute(
        "CREATE FUNCTION ends() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$BEGIN IF NEW.tenant_id = {fleet.tenant_id} THEN {action}; END IF; RETURN NEW; END$$".encode()
    )
    owner.execute("CREATE TRIGGER ends BEFORE INSERT ON rollup_minute_double FOR EACH ROW EXECUTE FUNCTION ends()")
    owner.commit()
    before = passed(owner)
    for tenant in (fleet, rival):
        write(owner, tenant, {hour: 1.0})
    await settle(worker)
    assert passed(owner) > before
    assert await states(admin_pool, fleet, rival) == ["failed", "serving"]
    assert (hours(owner, fleet), hours(owner, rival)) == (0, 1)
    assert metrics.value("atlasco_rollup_failures", source="data") == 1


@pytest.mark.parametrize("error", [StorageUnavailable, TransactionConflict, LeaseLost])
async def test_what_is_no_parts_fault_puts_none_out_of_service(
    owner: psycopg.Connection[Any], fleet: Fleet, worker: Worker, admin_pool: Pool,
    monkeypatch: pytest.MonkeyPatch, error: type[StorageError],
) -> None:  # fmt: skip
    await create_rollup(admin_pool, fleet.tenant_id, "numbers", ["temperature"])
    await settle(worker)
    before = passed(owner)
    write(owner, fleet, {fleet.now_us - 1: 1.0})

    async def fails(*_: object) -> int:
        raise error("the moment")

    monkeypatch.setattr("storage.rollup.worker.compute", fails)
    with pytest.raises(error):
        await worker.round()
    assert await states(admin_pool, fleet) == ["serving"]
    assert passed(owner) == before


async def test_what_rests_is_out_of_service_wherever_it_is_passed_over(
    owner: psycopg.Connection[Any], fleet: Fleet, rival: Fleet, worker: Worker, admin_pool: Pool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The transaction that took it out of service may not commit, and the next one passes over its changes."""
    hour = fleet.now_us - fleet.now_us % HOUR_US - 5 * HOUR_US
    await create_rollup(admin_pool, fleet.tenant_id, "numbers", ["temperature"])
    await settle(worker)
    refuse(owner, fleet, "rollup_minute_double", "minimum")
    write(owner, fleet, {hour: POISON})
    with monkeypatch.context() as patch:

        async def dies(*_: object) -> None:
            raise StorageDefect("killed")

        patch.setattr("storage.rollup.follow.store", dies)
        with pytest.raises(StorageDefect):
            await worker.round()
    assert await states(admin_pool, fleet) == ["serving"]
    await worker.round()
    assert await states(admin_pool, fleet) == ["failed"]


async def test_a_round_that_cannot_be_finished_holds_up_nothing_else(
    owner: psycopg.Connection[Any], fleet: Fleet, worker: Worker, admin_pool: Pool, clock: ManualClock,
    metrics: MemoryMetrics, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    await settle(worker)
    await create_rollup(admin_pool, fleet.tenant_id, "numbers", ["temperature"])
    operation = uuid4()
    await order_deletion(admin_pool, fleet.tenant_id, "device-0002", operation)
    # No batch: every round ends in an error.
    batch = uuid4()
    owner.execute("INSERT INTO outbox (lane, batch_id, changes, tenant_ids, min_ts, max_ts, payload) "
                  "VALUES (0, %s, 1, %s, ARRAY[now()], ARRAY[now()], '\\xffff')",
                  [batch, [fleet.tenant_id]])  # fmt: skip
    owner.commit()
    before = passed(owner)
    await settle(worker)
    assert passed(owner) == before
    assert await states(admin_pool, fleet) == ["serving"]
    step = (await find_operation(admin_pool, fleet.tenant_id, operation)).step
    assert step not in ("database", "settle")
    assert metrics.value("atlasco_rollup_failures", source="data") == 1
    assert any(str(batch) in getattr(record, "error", "") for record in caplog.records)
    owner.execute("DELETE FROM outbox")
    owner.commit()
    clock.now_s += 60
    await settle(worker)
    assert passed(owner) > before


async def test_a_dropped_projection_that_cannot_be_removed_holds_up_nothing_else(
    owner: psycopg.Connection[Any], fleet: Fleet, worker: Worker, admin_pool: Pool, clock: ManualClock,
    metrics: MemoryMetrics,
) -> None:  # fmt: skip
    for name in ("first", "second"):
        await create_projection(admin_pool, fleet.tenant_id, name, ["temperature"])
    await settle(worker)
    owner.execute("CREATE VIEW public.of_an_operator AS SELECT * FROM projections.p1")
    owner.commit()
    for name in ("first", "second"):
        await drop_projection(admin_pool, fleet.tenant_id, name)

    def tables() -> list[str]:
        statement = "SELECT relname FROM pg_class WHERE relnamespace = 'projections'::regnamespace AND relkind = 'r'"
        left = [row[0] for row in owner.execute(statement).fetchall()]
        owner.commit()
        return left

    # Seen to be dropped at first, and removed once no read can know them.
    clock.now_s += 2 * LONGEST_READ_S
    await settle(worker)
    assert len(tables()) == 2
    clock.now_s += 2 * LONGEST_READ_S
    await create_rollup(admin_pool, fleet.tenant_id, "numbers", ["temperature"])
    # Not a turn too many, and none that raises.
    await settle(worker)
    assert tables() == ["p1"]
    assert await states(admin_pool, fleet) == ["serving"]
    for _ in range(5):
        clock.now_s += 1
        await settle(worker)
    assert metrics.value("atlasco_rollup_failures", source="data") == 1
    owner.execute("DROP VIEW public.of_an_operator")
    owner.commit()
    clock.now_s += 2 * LONGEST_READ_S
    await settle(worker)
    assert tables() == []
    assert metrics.value("atlasco_rollup_failures", source="data") == 1


async def test_housekeeping_that_fails_is_not_tried_in_every_turn(
    worker: Worker, clock: ManualClock, metrics: MemoryMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(_: object) -> None:
        raise StorageDefect("broken")

    monkeypatch.setattr("storage.rollup.worker.dropped_projections", fails)
    for failures in (1, 2, 3):
        for _ in range(5):
            await settle(worker)
            clock.now_s += 10
        assert metrics.value("atlasco_rollup_failures", source="data") == failures
        clock.now_s += 50
