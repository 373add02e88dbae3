"""Ranges of history: which exist, made when a batch needs them, never made again."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import numpy as np
import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from storage.database import Pool, PoolSettings, Role, make_pool
from storage.errors import NoPartition, StorageDefect, StorageError, TransactionConflict, translated
from storage.partitions import (
    HistoryCoverage,
    HistoryLimitReached,
    OutsideClockWindow,
    _ranges,
    contiguous_runs,
    days_of,
    tenant_slot,
)
from storage.times import DAY_US
from tests.storage.conftest import INGEST_LOGIN, Database

TODAY = int(datetime.now(UTC).timestamp()) // 86400


def array(*days: int) -> NDArray[np.int64]:
    return np.array(days, np.int64)


def execute(database: Database, query: str, *parameters: object) -> list[tuple[object, ...]]:
    with psycopg.connect(database(), autocommit=True) as connection:
        cursor = connection.execute(query.encode(), parameters)
        return cursor.fetchall() if cursor.description else []


def make_tenant(database: Database, name: str, window: str = "400 days") -> int:
    [(tenant,)] = execute(database, "SELECT register_tenant(%s)", name)
    execute(database, "UPDATE tenants SET retention = %s, window_past = %s WHERE name = %s", window, window, name)
    assert isinstance(tenant, int)
    return tenant


@pytest.fixture
async def pool(database: Database) -> AsyncIterator[Pool]:
    pool = make_pool(PoolSettings(database(user=INGEST_LOGIN), Role.INGEST))
    await pool.open()
    yield pool
    await pool.close()


@pytest.fixture
def acme(database: Database) -> int:
    return make_tenant(database, "acme")


# -- pure


@pytest.mark.parametrize("tenant", [0, 1, (1 << 20) - 1, 1 << 20, 63 << 20, (1 << 30) - 1, 1 << 30, (1 << 30) + 7])
def test_the_slot_is_the_databases(module_database: Database, tenant: int) -> None:
    assert execute(module_database, "SELECT * FROM tenant_slot(%s)", tenant) == [tenant_slot(tenant)]


@given(st.sets(st.integers(-1000, 1000), max_size=80), st.integers(1, 40))
def test_runs_are_the_days_and_never_the_gaps(days: set[int], longest: int) -> None:
    runs = contiguous_runs(np.array(sorted(days), np.int64), longest)
    assert [day for first, end in runs for day in range(first, end)] == sorted(days)
    assert all(0 < end - first <= longest for first, end in runs)


@pytest.mark.parametrize(
    ("time_us", "day"),
    [(0, 0), (-1, -1), (DAY_US - 1, 0), (DAY_US, 1), (-DAY_US, -1), (-DAY_US - 1, -2)],
)
def test_the_day_of_a_timestamp(time_us: int, day: int) -> None:
    assert days_of(np.array([time_us, time_us], np.int64)).tolist() == [day]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 31), st.booleans()), max_size=12))
def test_lookups_agree_with_a_walk_over_the_ranges(parts: list[tuple[int, int, bool]]) -> None:
    rows, at = [], 0
    for gap, length, retired in parts:
        rows.append((at + gap, at + gap + length, retired))
        at += gap + length
    ranges = _ranges(rows)
    days = np.arange(-2, at + 3)
    found = {day: retired for start, end, retired in rows for day in range(start, end)}
    assert ranges.covers(days).tolist() == [day in found for day in days.tolist()]
    assert ranges.is_retired(days).tolist() == [found.get(day, False) for day in days.tolist()]
    assert all(found.get(day) is False for day in range(ranges.live_from, ranges.live_to))
    assert (ranges.live_to > 0) == (not all(retired for _, _, retired in rows))


# -- with a database


async def test_what_a_batch_touches_is_made_and_not_what_lies_between(
    database: Database, pool: Pool, acme: int
) -> None:
    coverage = HistoryCoverage(pool)
    days = array(TODAY, TODAY - 300, TODAY - 5, TODAY)
    assert not coverage.covered(acme, days).any()
    await coverage.ensure(acme, days)
    assert coverage.covered(acme, days).all()
    assert not coverage.covered(acme, array(TODAY - 1, TODAY - 200)).any()
    sizes = execute(database, "SELECT extract(day FROM ts_to - ts_from)::int FROM history_partitions ORDER BY ts_from")
    month, *rest = [size for (size,) in sizes]
    assert isinstance(month, int)
    assert 28 <= month <= 31, "old history comes in months"
    assert rest == [1, 1]
    execute(
        database,
        "INSERT INTO entity_attributes_text SELECT %s, 1, 1, to_timestamp(d * 86400::bigint), 'x'"
        "  FROM unnest(%s::bigint[]) d",
        acme,
        [TODAY, TODAY - 300, TODAY - 5],
    )


async def test_days_that_are_known_cost_no_connection(pool: Pool, acme: int) -> None:
    coverage = HistoryCoverage(pool)
    days = array(*range(TODAY - 3, TODAY + 1))
    await coverage.ensure(acme, days)
    await coverage.ensure(acme, array(TODAY - 20))
    await pool.close()
    await coverage.ensure(acme, days)
    await coverage.ensure(acme, array(TODAY - 20, TODAY))
    await coverage.ensure(acme, array())
    with pytest.raises(StorageError):
        await coverage.ensure(acme, array(TODAY - 21))


async def test_many_writers_of_many_processes_make_each_range_once(database: Database, pool: Pool, acme: int) -> None:
    other = make_tenant(database, "globex")
    processes = [HistoryCoverage(pool) for _ in range(4)]
    days = array(*range(TODAY - 6, TODAY + 2))
    await asyncio.gather(*(each.ensure(tenant, days) for each in processes for tenant in (acme, other)))
    assert all(each.covered(tenant, days).all() for each in processes for tenant in (acme, other))
    assert execute(database, "SELECT count(*) FROM history_partitions") == [(16,)]


async def test_a_retired_range_is_known_and_never_made_again(database: Database, pool: Pool, acme: int) -> None:
    coverage = HistoryCoverage(pool)
    days = array(TODAY - 2, TODAY - 1, TODAY)
    await coverage.ensure(acme, days)
    times = days * DAY_US + 5
    assert coverage.retired(acme, times).tolist() == [False, False, False]
    [(suffix,)] = execute(
        database,
        "UPDATE history_partitions SET retired_at = now() WHERE ts_from = to_timestamp(%s) RETURNING suffix",
        (TODAY - 1) * 86400,
    )
    for value_type in ("double", "bigint", "boolean", "text"):
        execute(database, f"DROP TABLE entity_attributes_{value_type}_{suffix}")
    # A cache that does not know yet: the write finds no partition, a look puts it right.
    with pytest.raises(NoPartition), translated():
        execute(
            database,
            "INSERT INTO entity_attributes_double VALUES (%s, 1, 1, to_timestamp(%s), 1)",
            acme,
            (TODAY - 1) * 86400,
        )
    await coverage.refresh(acme)
    assert coverage.retired(acme, times).tolist() == [False, True, False]
    for each in (coverage, HistoryCoverage(pool)):
        await each.ensure(acme, array(TODAY - 3, *days))
        assert each.covered(acme, days).all()
        assert each.retired(acme, times).tolist() == [False, True, False]
    assert execute(database, "SELECT ensure_history(%s, now() - interval '3 days', now())", acme) == [(0,)]
    assert execute(database, "SELECT to_regclass(%s)", f"entity_attributes_double_{suffix}") == [(None,)]


async def test_days_outside_the_window_are_refused_and_the_others_made(database: Database, pool: Pool) -> None:
    tenant = make_tenant(database, "strict", "7 days")
    coverage = HistoryCoverage(pool)
    days = array(-(10**9), TODAY - 30, TODAY - 2, TODAY, TODAY + 60, 10**9)
    with pytest.raises(OutsideClockWindow):
        await coverage.ensure(tenant, days)
    assert coverage.covered(tenant, days).tolist() == [False, False, True, True, False, False]


async def test_the_first_day_of_the_window_is_within_it(database: Database, pool: Pool) -> None:
    tenant = make_tenant(database, "strict", "7 days")
    await HistoryCoverage(pool).ensure(tenant, array(TODAY - 7))


async def test_a_full_customer_partition_is_a_typed_error_and_no_other_customers(
    database: Database, pool: Pool, acme: int
) -> None:
    coverage = HistoryCoverage(pool)
    await coverage.ensure(acme, array(TODAY))
    execute(
        database,
        "INSERT INTO history_partitions SELECT tenant_from, tenant_to, at, at + interval '1 hour', 'fake' || n"
        "  FROM tenant_slot(%s), generate_series(1, 1999) n,"
        "       LATERAL (SELECT '1990-01-01Z'::timestamptz + n * interval '1 day' AS at) a",
        acme,
    )
    with pytest.raises(HistoryLimitReached):
        await coverage.ensure(acme, array(TODAY, TODAY - 1))
    assert coverage.covered(acme, array(TODAY, TODAY - 1)).tolist() == [True, False]
    other = make_tenant(database, "globex")
    await coverage.ensure(other, array(TODAY))


async def test_a_lock_is_not_waited_for_for_ever(database: Database, pool: Pool, acme: int) -> None:
    coverage = HistoryCoverage(pool, lock_timeout_s=0.05)
    await coverage.ensure(acme, array(TODAY))
    with psycopg.connect(database()) as connection:
        parent = f"entity_attributes_bigint_s{acme >> 20:03d}"
        connection.execute(f"LOCK TABLE {parent} IN SHARE UPDATE EXCLUSIVE MODE".encode())
        with pytest.raises(TransactionConflict):
            await coverage.ensure(acme, array(TODAY - 1))
    await coverage.ensure(acme, array(TODAY - 1))


async def test_an_unknown_tenant_is_an_error(pool: Pool) -> None:
    with pytest.raises(StorageDefect):
        await HistoryCoverage(pool).ensure(12345, array(TODAY))
