"""Doubles at the ends of what there is, of several tenants: no answer fails, and all are what IEEE 754 says."""

import math
from typing import Any

import numpy as np
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from storage.aggregate.buckets import Bucket, BucketUnit
from storage.aggregate.database import aggregate
from storage.aggregate.model import AggregateAnswer, AggregateQuestion, AggregateSource, Function, Selection
from storage.database import Pool, PoolSettings, Role, make_pool
from storage.model import Attribute, ValueType
from storage.reads.session import read_session
from storage.reads.tenants import TenantDirectory
from storage.rollup.declare import create_rollup
from storage.rollup.worker import Worker
from tests.rollup.conftest import Write, settle, write_readings
from tests.search.fleet import HOUR_US, MINUTE_US, TENANT, Fleet, found
from tests.storage.conftest import QUERY_LOGIN, Database

FUNCTIONS = [Function.COUNT, Function.MIN, Function.MAX, Function.SUM, Function.MEAN, Function.STDDEV]
DEVICE = "device-0001"
EXTREMES = (
    0.0, -0.0, 5e-324, -5e-324, 1e-323, 1e-310, -3e-310, 2.3e-308, 1e-200, 1e-170, 3e-170, 1.5e-162, -1e-160, 1e-150,
    1.0, -7.25, 1e139, -9.9e139, 1e140, -1e200, 1.7976931348623157e308, math.inf, -math.inf, math.nan,
)  # fmt: skip
TINY = [
    (1e-310, 3e-310), (1e-170, 3e-170), (5e-324, 0.0), (5e-324, 5e-324, 0.0), (-5e-324, 1e-323), (2e-162, 0.0),
]  # fmt: skip


def expected(function: Function, values: list[float]) -> float:
    numbers = np.array(values)
    with np.errstate(all="ignore"):
        match function:
            case Function.COUNT:
                return len(values)
            case Function.MIN:
                return math.nan if np.isnan(numbers).all() else float(np.nanmin(numbers))
            case Function.MAX:
                return float(np.max(numbers))
        if np.any((np.abs(numbers) >= 1e140) & np.isfinite(numbers)):
            return math.nan
        if function is Function.SUM:
            return float(np.sum(numbers))
        if function is Function.MEAN:
            return float(np.sum(numbers) / len(numbers))
        return math.nan if len(values) < 2 else float(np.std(numbers, ddof=1))


def agree(function: Function, got: Any, want: float, values: list[float]) -> bool:
    if not math.isfinite(want) or not math.isfinite(got):
        return got == want or (math.isnan(got) and math.isnan(want))
    # What is lost when large values cancel each other; and squares end at the square root of the smallest double.
    lost = 1e-12 * max(map(abs, values))
    return math.isclose(got, want, rel_tol=1e-9, abs_tol=max(lost, 1e-155 if function is Function.STDDEV else 0.0))


def check(answer: AggregateAnswer, readings: dict[int, float]) -> None:
    want: dict[int, list[float]] = {}
    for time_us, value in sorted(readings.items()):
        want.setdefault(time_us - time_us % HOUR_US, []).append(value)
    (series,) = answer.series
    assert list(series.bucket_times_us) == sorted(want)
    for column in series.columns:
        for hour, got in zip(series.bucket_times_us, column.values, strict=True):
            values = want[hour]
            assert agree(column.function, got, expected(column.function, values), values), (column, hour, got, values)


async def ask(database: Database, tenant: str, device: str, start_us: int, *, rolled: bool) -> AggregateAnswer:
    question = AggregateQuestion(
        Selection([device]), ["temperature"], start_us, start_us + 3 * HOUR_US, FUNCTIONS, Bucket(BucketUnit.HOUR)
    )
    async with (
        make_pool(PoolSettings(database(user=QUERY_LOGIN), Role.QUERY, max_size=1)) as pool,
        read_session(pool, TenantDirectory(), tenant, 30.0) as session,
    ):
        answer = await aggregate(session, question, needed_as_of_us=0 if rolled else None)
    assert answer.source is (AggregateSource.ROLLUP if rolled else AggregateSource.READINGS)
    return answer


@pytest.fixture
def rival(owner: psycopg.Connection[Any], fleet: Fleet) -> Fleet:
    """Another tenant, with a device and an attribute of the same names."""
    tenant = found(owner, "SELECT tenant_id FROM tenants WHERE name = 'rival'")
    entity = found(owner, "SELECT register_entity(%s, %s, '', '{}')", tenant, DEVICE)
    number = found(
        owner,
        "INSERT INTO attributes (tenant_id, name, type) VALUES (%s, 'temperature', 'double') RETURNING attribute_id",
        tenant,
    )
    owner.execute("SELECT ensure_history(%s, now() - interval '1 day', now() + interval '1 hour')", [tenant])
    owner.commit()
    return Fleet(
        tenant,
        fleet.now_us,
        {"temperature": Attribute(number, "temperature", ValueType.DOUBLE, True)},
        {DEVICE: entity},
    )


@pytest.mark.parametrize("values", TINY, ids=str)
async def test_tiny_values_are_summed_up(
    database: Database, fleet: Fleet, write: Write, worker: Worker, admin_pool: Pool, values: tuple[float, ...]
) -> None:
    hour = fleet.now_us - fleet.now_us % HOUR_US - 5 * HOUR_US
    # In a minute, across minutes, and across hours; some before the rollup is there, some after.
    early = {hour + 7 + number: value for number, value in enumerate(values)}
    late = {hour + HOUR_US + (3 + number) * MINUTE_US: value for number, value in enumerate(values)}
    write(DEVICE, "temperature", early)
    await create_rollup(admin_pool, fleet.tenant_id, "numbers", ["temperature"])
    await settle(worker)
    write(DEVICE, "temperature", late)
    await settle(worker)
    for rolled in (False, True):
        check(await ask(database, TENANT, DEVICE, hour, rolled=rolled), early | late)


@settings(
    max_examples=10, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(data=st.data())
async def test_random_extremes_of_several_tenants(
    database: Database,
    owner: psycopg.Connection[Any],
    fleet: Fleet,
    rival: Fleet,
    worker: Worker,
    admin_pool: Pool,
    data: st.DataObject,
) -> None:
    start_us = fleet.now_us - fleet.now_us % HOUR_US - 5 * HOUR_US
    values = st.lists(st.sampled_from(EXTREMES) | st.floats(width=64), min_size=1, max_size=8)
    written: dict[int, dict[int, float]] = {}
    with owner.transaction():
        for table in (
            "entity_attributes_double", "rollup_minute_double", "rollup_hour_double", "latest_values", "rollups",
        ):  # fmt: skip
            owner.execute(sql.SQL("DELETE FROM {}").format(sql.Identifier(table)))
    for tenant in (fleet, rival):
        if data.draw(st.booleans()):
            await create_rollup(admin_pool, tenant.tenant_id, "numbers", ["temperature"])
    for _ in range(2):
        for tenant in (fleet, rival):
            drawn = data.draw(values)
            minutes = data.draw(st.lists(st.integers(0, 125), min_size=len(drawn), max_size=len(drawn)))
            readings = {
                start_us + minute * MINUTE_US + place: value
                for place, (minute, value) in enumerate(zip(minutes, drawn, strict=True))
            }
            with owner.transaction():
                write_readings(owner, tenant, DEVICE, "temperature", readings)
            written.setdefault(tenant.tenant_id, {}).update(readings)
        await settle(worker)
    for tenant in (fleet, rival):
        await create_rollup(admin_pool, tenant.tenant_id, "numbers", ["temperature"])
    await settle(worker)
    for name, tenant in ((TENANT, fleet), ("rival", rival)):
        for rolled in (False, True):
            check(await ask(database, name, DEVICE, start_us, rolled=rolled), written[tenant.tenant_id])
