"""A retention that is raised brings nothing back: what was given up before is not taken for kept, by anything here."""

from typing import Any

import psycopg
import pytest

from storage.aggregate.buckets import Bucket, BucketUnit
from storage.aggregate.database import aggregate
from storage.aggregate.model import AggregateAnswer, AggregateQuestion, Function, Selection
from storage.database import Pool, PoolSettings, Role, make_pool
from storage.maintenance import maintain
from storage.reads.devices import read_latest
from storage.reads.model import SeriesQuestion
from storage.reads.series import read_page
from storage.reads.session import read_session
from storage.reads.tenants import TenantDirectory
from storage.rollup.declare import create_rollup
from storage.rollup.worker import Worker
from storage.statements import statements
from storage.verify.readings import Primary
from storage.warehouse.statements import statements as warehouse_statements
from tests.rollup.conftest import Write, settle
from tests.search.fleet import HOUR_US, TENANT, Fleet, found
from tests.storage.conftest import QUERY_LOGIN, Database

DAY_US = 24 * HOUR_US
DEVICE = "device-0001"


def set_retention(owner: psycopg.Connection[Any], tenant: str, days: int) -> None:
    """By SQL, as an operator may; the window stays within."""
    owner.execute(
        "UPDATE tenants SET window_past = '1 day', retention = make_interval(days => %s) WHERE name = %s",
        [days, tenant],
    )
    owner.commit()


async def counted(pool: Pool, start_us: int, end_us: int, needed_us: int | None) -> tuple[int, AggregateAnswer]:
    question = AggregateQuestion(
        Selection([DEVICE]), ["temperature"], start_us, end_us, [Function.COUNT], Bucket(BucketUnit.DAY, 1)
    )
    async with read_session(pool, TenantDirectory(), TENANT, 30.0) as session:
        answer = await aggregate(session, question, needed_as_of_us=needed_us)
    return sum(value or 0 for one in answer.series for value in one.columns[0].values), answer


@pytest.mark.parametrize("shared", [False, True], ids=["the range is retired", "the rows are deleted"])
async def test_nothing_given_up_is_taken_for_kept(
    database: Database,
    owner: psycopg.Connection[Any],
    fleet: Fleet,
    write: Write,
    worker: Worker,
    admin_pool: Pool,
    shared: bool,
) -> None:
    await create_rollup(admin_pool, fleet.tenant_id, "numbers", ["temperature"])
    old_us = fleet.now_us - 20 * DAY_US
    write(DEVICE, "temperature", {old_us: 1.0, fleet.now_us - 10: 2.0})
    write("device-0002", "pressure", {old_us: 1.0})
    owner.execute("UPDATE latest_values SET ts = now() - interval '20 days' WHERE entity_id = %s",
                  [fleet.entity_ids["device-0002"]])  # fmt: skip
    owner.commit()
    await settle(worker)
    if shared:
        # A neighbour in the same customer partition keeps its readings for longer.
        owner.execute("INSERT INTO tenants (tenant_id, name) VALUES (%s, 'neighbour')", [fleet.tenant_id + 1])
    set_retention(owner, "rival", 7)
    set_retention(owner, TENANT, 7)
    report = await maintain(database())
    assert bool(report.ranges_retired) is not shared
    assert bool(report.deleted.get("entity_attributes")) is shared
    set_retention(owner, TENANT, 90)
    edge_us = found(owner, "SELECT (extract(epoch FROM now()) * 1000000)::bigint") - 7 * DAY_US
    owner.commit()

    def near(time_us: int | None) -> bool:
        return time_us is not None and edge_us - HOUR_US < time_us <= edge_us

    async with make_pool(PoolSettings(database(user=QUERY_LOGIN), Role.QUERY, max_size=1)) as pool:
        for needed_us in (None, 0):
            count, answer = await counted(pool, old_us - HOUR_US, fleet.now_us + 1, needed_us)
            assert (count, near(answer.complete_from_us)) == (1, True)
        async with read_session(pool, TenantDirectory(), TENANT, 30.0) as session:
            assert near(session.snapshot.complete_from_us)
            (part,) = (
                await read_page(session, SeriesQuestion([DEVICE], ["temperature"], 0, fleet.now_us), 10, None)
            ).parts
            assert list(part.times_us) == [fleet.now_us - 10]
            # As with a retention that was never another: a latest value of before is not shown.
            latest = await read_latest(session, ["device-0002"], ["pressure"])
            assert latest.entities == {"device-0002": []}
    # What a rebuild replaces, what an audit compares and what the worker computes again begin there too.
    rebuilt = dict(owner.execute(warehouse_statements("rebuild.sql")["floors"]).fetchall())
    assert near(rebuilt[fleet.tenant_id])
    ((_, floor),) = owner.execute(statements("rollup.sql")["floors"], {"tenants": [fleet.tenant_id]}).fetchall()
    owner.commit()
    assert near(round(floor.timestamp() * 1_000_000))
    assert near(Primary(database()).floor_us(fleet.tenant_id))
