"""What rollups and projections claim to be complete, they are: the answer with them is the answer without."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import psycopg
import pytest

from gateway.query import QueryLimits
from storage.aggregate.buckets import Bucket, BucketUnit
from storage.aggregate.database import aggregate
from storage.aggregate.model import AggregateQuestion, AggregateSource, Function, Selection
from storage.database import Pool, PoolSettings, Role, make_pool
from storage.filter.search import FindQuestion, SearchSource, find_entities
from storage.reads.session import ReadSession, read_session
from storage.reads.tenants import TenantDirectory
from storage.reads.watermark import Watermark
from storage.rollup.declare import create_projection, create_rollup, drop_projection, list_rollups
from storage.rollup.worker import LONGEST_READ_S, Worker
from storage.statements import statements
from storage.times import moment
from tests.manual_clock import ManualClock
from tests.rollup.conftest import Write, make_worker, settle
from tests.search.fleet import HOUR_US, MINUTE_US, TENANT, Fleet, found
from tests.storage.conftest import QUERY_LOGIN, Database

DEVICE = "device-0001"
Counts: TypeAlias = dict[int, int]
Counted: TypeAlias = Callable[[int, int, BucketUnit], Awaitable[tuple[Counts, Counts | None]]]


@asynccontextmanager
async def reading(database: Database) -> AsyncIterator[ReadSession]:
    async with (
        make_pool(PoolSettings(database(user=QUERY_LOGIN), Role.QUERY, max_size=1)) as pool,
        read_session(pool, TenantDirectory(), TENANT, 30.0) as session,
    ):
        yield session


@pytest.fixture
def counted(database: Database) -> Counted:
    """Readings per bucket of a range: from the readings, and from rollups; None: these do not answer."""

    async def count(start_us: int, end_us: int, unit: BucketUnit) -> tuple[Counts, Counts | None]:
        question = AggregateQuestion(
            Selection([DEVICE]), ["temperature"], start_us, end_us, [Function.COUNT], Bucket(unit)
        )
        answers = []
        for needed_as_of_us in (None, 0):
            async with reading(database) as session:
                answers.append(await aggregate(session, question, needed_as_of_us=needed_as_of_us))
        one, other = (
            {
                at: n
                for series in a.series
                for at, n in zip(series.bucket_times_us, series.columns[0].values, strict=True)
            }
            for a in answers
        )
        return one, other if answers[1].source is AggregateSource.ROLLUP else None

    return count


async def test_a_new_worker_after_forget_fills_again_what_it_missed(
    database: Database, owner: psycopg.Connection[Any], fleet: Fleet, write: Write, worker: Worker, pool: Pool,
    admin_pool: Pool, counted: Counted,
) -> None:  # fmt: skip
    hour = fleet.now_us - fleet.now_us % HOUR_US - 3 * HOUR_US
    write(DEVICE, "temperature", {hour + 1: 1.0, hour + 2: 1.0})
    await create_rollup(admin_pool, fleet.tenant_id, "numbers", ["temperature"])
    await create_projection(admin_pool, fleet.tenant_id, "wide", ["temperature"])
    await settle(worker)
    owner.execute(statements("rollup.sql")["forget_consumer"])
    owner.commit()
    # Nobody keeps the outbox for this one.
    write(DEVICE, "temperature", {hour + 3: 1.0, fleet.now_us + 5: 4242.0})
    newer = make_worker(pool, 2)
    await newer.adopt()
    await newer.round()
    # Not filled again yet: not used.
    assert (await counted(hour, hour + HOUR_US, BucketUnit.HOUR))[1] is None
    await settle(newer)
    assert await counted(hour, hour + HOUR_US, BucketUnit.HOUR) == ({hour: 3}, {hour: 3})
    async with reading(database) as session:
        page = await find_entities(
            session, FindQuestion("temperature = 4242"), page_size=9, after="", needed_as_of_us=0
        )
    assert page.source is SearchSource.PROJECTION
    assert [device.entity.name for device in page.devices] == [DEVICE]


@pytest.mark.parametrize("late", [False, True], ids=["at once", "after an earlier program"])
async def test_a_back_fill_claims_the_whole_hours_that_it_filled(
    owner: psycopg.Connection[Any], fleet: Fleet, write: Write, worker: Worker, admin_pool: Pool, counted: Counted,
    late: bool,
) -> None:  # fmt: skip
    hour = fleet.now_us - fleet.now_us % HOUR_US - 5 * HOUR_US
    write(DEVICE, "temperature", {hour + minute * MINUTE_US: 1.0 for minute in range(120)})
    await settle(worker)
    since = moment(hour + 20 * MINUTE_US)
    await create_rollup(admin_pool, fleet.tenant_id, "numbers", ["temperature"], since)
    await settle(worker)
    if late:
        owner.execute("UPDATE rollups SET complete_from = backfill_from")
        owner.commit()
    every = {hour + minute * MINUTE_US: 1 for minute in range(120)}
    assert await counted(hour, hour + 2 * HOUR_US, BucketUnit.MINUTE) == (every, every)


async def test_a_back_fill_ends_where_retention_does_within_an_hour(
    owner: psycopg.Connection[Any], fleet: Fleet, write: Write, worker: Worker, admin_pool: Pool, counted: Counted
) -> None:
    owner.execute(
        "UPDATE tenants SET window_past = '1 hour', "
        "retention = interval '4 days' + (now() - date_trunc('hour', now())) + interval '35 minutes'"
    )
    oldest_us = found(owner, "SELECT (extract(epoch FROM now() - retention) * 1000000)::bigint FROM tenants "
                             "WHERE name = %s", TENANT)  # fmt: skip
    owner.commit()
    minute = oldest_us - oldest_us % MINUTE_US
    write(DEVICE, "temperature", {minute + number * MINUTE_US + 1: 1.0 for number in range(2, 120)})
    await settle(worker)
    await create_rollup(admin_pool, fleet.tenant_id, "numbers", ["temperature"])
    await settle(worker)
    one, other = await counted(minute + 2 * MINUTE_US, minute + 120 * MINUTE_US, BucketUnit.MINUTE)
    assert one == other
    assert sum(one.values()) > 110


async def test_a_rollup_of_all_there_ever_was_is_complete_from_the_beginning(
    fleet: Fleet, write: Write, worker: Worker, admin_pool: Pool
) -> None:
    write(DEVICE, "temperature", {fleet.now_us: 1.0})
    await create_rollup(admin_pool, fleet.tenant_id, "all", ["temperature"])
    await create_rollup(admin_pool, fleet.tenant_id, "some", ["temperature"], moment(fleet.now_us - 90 * MINUTE_US))
    await settle(worker)
    entries = {entry.name: entry.status for entry in await list_rollups(admin_pool, fleet.tenant_id)}
    assert entries["all"].complete_from is None
    since = entries["some"].complete_from
    assert since is not None
    assert moment(fleet.now_us - 90 * MINUTE_US) <= since < moment(fleet.now_us - 30 * MINUTE_US)


async def test_readings_ahead_of_a_window_that_was_lowered_are_filled(
    owner: psycopg.Connection[Any], fleet: Fleet, write: Write, worker: Worker, admin_pool: Pool, counted: Counted
) -> None:
    owner.execute("UPDATE tenants SET window_future = '7 days'")
    owner.execute("SELECT ensure_history(%s, now(), now() + interval '6 days')", [fleet.tenant_id])
    owner.commit()
    ahead = fleet.now_us - fleet.now_us % HOUR_US + 5 * 24 * HOUR_US
    write(DEVICE, "temperature", {ahead + 5: 1.0})
    # Past the outbox: what is there before the declaration is the back-fill's.
    await settle(worker)
    owner.execute("UPDATE tenants SET window_future = '10 minutes'")
    owner.commit()
    await create_rollup(admin_pool, fleet.tenant_id, "numbers", ["temperature"])
    await settle(worker)
    assert await counted(ahead, ahead + 2 * HOUR_US, BucketUnit.HOUR) == ({ahead: 1}, {ahead: 1})


@pytest.mark.parametrize(
    ("mark", "on_replica", "proves"),
    [(99, False, False), (100, False, True), (1_000, False, True), (1_001, False, False), (1_001, True, True),
     (1_001_000, True, True), (1_001_001, True, False), (99, True, False)],
)  # fmt: skip
def test_what_a_watermark_proves_of_a_snapshot(mark: int, on_replica: bool, proves: bool) -> None:
    watermark = Watermark(mark, on_replica)
    assert watermark.proves(needed_as_of_us=100, snapshot_as_of_us=1_000) is proves


async def test_a_watermark_from_the_future_proves_nothing(
    database: Database, owner: psycopg.Connection[Any], fleet: Fleet, write: Write, worker: Worker, admin_pool: Pool,
    counted: Counted,
) -> None:  # fmt: skip
    hour = fleet.now_us - fleet.now_us % HOUR_US - 3 * HOUR_US
    write(DEVICE, "temperature", {hour + 1: 1.0})
    await create_rollup(admin_pool, fleet.tenant_id, "numbers", ["temperature"])
    await create_projection(admin_pool, fleet.tenant_id, "wide", ["temperature"])
    await settle(worker)
    # What it says after the primary's clock was set back.
    owner.execute("UPDATE outbox_consumers SET published_through = now() + interval '1 minute'")
    owner.commit()
    write(DEVICE, "temperature", {fleet.now_us + 5: 4242.0})
    assert (await counted(hour, hour + HOUR_US, BucketUnit.HOUR))[1] is None
    question = FindQuestion("temperature = 4242")
    for source in (SearchSource.LATEST, SearchSource.PROJECTION):
        async with reading(database) as session:
            page = await find_entities(session, question, page_size=9, after="", needed_as_of_us=0)
        assert page.source is source
        assert [device.entity.name for device in page.devices] == [DEVICE]
        # The next round writes one of the present.
        await settle(worker)
    assert (await counted(hour, hour + HOUR_US, BucketUnit.HOUR))[1] == {hour: 1}


@pytest.mark.parametrize("gone", [False, True], ids=["in time", "too soon"])
async def test_a_projection_that_is_dropped_under_a_reader_is_still_there_or_not_used(
    database: Database, owner: psycopg.Connection[Any], fleet: Fleet, write: Write, worker: Worker, admin_pool: Pool,
    gone: bool,
) -> None:  # fmt: skip
    write(DEVICE, "temperature", {fleet.now_us - 5: 4242.0})
    await create_projection(admin_pool, fleet.tenant_id, "wide", ["temperature"])
    await settle(worker)
    await settle(worker)
    async with reading(database) as session:
        await drop_projection(admin_pool, fleet.tenant_id, "wide")
        await worker.housekeeping()
        if gone:
            # As on a replica, which may replay in a moment what was minutes apart.
            owner.execute("SELECT remove_projection(1)")
            owner.commit()
        page = await find_entities(
            session, FindQuestion("temperature = 4242"), page_size=9, after="", needed_as_of_us=0
        )
    assert page.source is (SearchSource.LATEST if gone else SearchSource.PROJECTION)
    assert [device.entity.name for device in page.devices] == [DEVICE]


async def test_a_dropped_projection_goes_when_no_read_can_know_it_any_more(
    owner: psycopg.Connection[Any], fleet: Fleet, pool: Pool, admin_pool: Pool, clock: ManualClock
) -> None:
    worker = make_worker(pool, 1, clock=clock)
    await worker.adopt()
    await create_projection(admin_pool, fleet.tenant_id, "wide", ["temperature"])
    await settle(worker)
    clock.now_s += 1e6
    await drop_projection(admin_pool, fleet.tenant_id, "wide")

    async def tables() -> int:
        await worker.housekeeping()
        tables = found(owner, "SELECT count(*) FROM pg_class WHERE relnamespace = 'projections'::regnamespace "
                              "AND relkind = 'r'")  # fmt: skip
        owner.commit()
        return int(tables)

    assert await tables() == 1
    clock.now_s += QueryLimits().longest_s + 10
    assert await tables() == 1
    clock.now_s += LONGEST_READ_S
    assert await tables() == 0
    assert QueryLimits().longest_s < LONGEST_READ_S
