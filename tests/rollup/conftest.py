"""A database with a small fleet, written to as ingest does, and a worker to follow it."""

import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, TypeAlias
from uuid import uuid4

import numpy as np
import psycopg
import pytest
from psycopg import sql

from runtime.metrics import MemoryMetrics, Metrics
from storage.database import Pool
from storage.model import Changes, Names
from storage.outbox import encode_outbox
from storage.rollup.config import RollupConfig
from storage.rollup.service import rollup_pool
from storage.rollup.worker import Worker
from tests.manual_clock import ManualClock
from tests.search.fleet import TENANT, Fleet, make_fleet, moment, store_readings
from tests.storage.conftest import Database, database, new_database, postgres, template

__all__ = ["database", "new_database", "postgres", "template"]

ROLLUP_LOGIN = "test_rollup"
Write: TypeAlias = Callable[[str, str, Mapping[int, Any]], None]


@pytest.fixture
def owner(database: Database) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database()) as connection:
        connection.execute("SET timezone = 'UTC'")
        connection.commit()
        yield connection


@pytest.fixture
def fleet(owner: psycopg.Connection[Any]) -> Fleet:
    made = make_fleet(owner, devices=12)
    owner.commit()
    return made


def write_readings(
    connection: psycopg.Connection[Any], fleet: Fleet, device: str, attribute: str, readings: Mapping[int, Any]
) -> None:
    """History, the latest value and the outbox in the caller's transaction."""
    known = fleet.attributes[attribute]
    entity = fleet.entity_ids[device]
    store_readings(connection, fleet, device, attribute, readings)
    newest = max(readings)
    column = sql.Identifier(f"{known.type}_value")
    connection.execute(
        sql.SQL(
            "INSERT INTO latest_values AS l (tenant_id, entity_id, attribute_id, ts, {0}) VALUES (%s, %s, %s, %s, %s) "
            "ON CONFLICT (tenant_id, entity_id, attribute_id) DO UPDATE SET ts = excluded.ts, {0} = excluded.{0} "
            "WHERE excluded.ts >= l.ts"
        ).format(column),
        [fleet.tenant_id, entity, known.attribute_id, moment(newest), readings[newest]],
    )
    times = sorted(readings)
    count = len(times)
    values = [readings[t].encode() if isinstance(readings[t], str) else readings[t] for t in times]
    array = np.array(values, object if isinstance(values[0], bytes) else None)
    changes = Changes(
        np.full(count, fleet.tenant_id, np.int32), np.full(count, entity, np.int64),
        np.full(count, known.attribute_id, np.int32), np.array(times, np.int64), array, np.zeros(count, np.int32),
    )  # fmt: skip
    names = Names({fleet.tenant_id: TENANT}, {entity: device}, {known.attribute_id: known})
    row = encode_outbox(uuid4(), {known.type: changes}, names, buckets=16)
    assert row is not None
    connection.execute(
        "INSERT INTO outbox (lane, batch_id, changes, tenant_ids, min_ts, max_ts, payload) "
        "VALUES (%s, %s, %s, %s, ARRAY[%s::timestamptz], ARRAY[%s::timestamptz], %s)",
        [entity % 16 % 4, row.batch_id, row.changes, row.tenants, moment(times[0]), moment(times[-1]), row.payload],
    )


@pytest.fixture
def write(owner: psycopg.Connection[Any], fleet: Fleet) -> Write:
    """Writes readings of a device and commits."""

    def written(device: str, attribute: str, readings: Mapping[int, Any]) -> None:
        with owner.transaction():
            write_readings(owner, fleet, device, attribute, readings)

    return written


@pytest.fixture
async def pool(database: Database) -> AsyncIterator[Pool]:
    """Connections with just the rights that the worker needs."""
    database.postgres.ensure_login(ROLLUP_LOGIN)
    with psycopg.connect(database(), autocommit=True) as connection:
        connection.execute(sql.SQL("GRANT atlasco_rollup TO {}").format(sql.Identifier(ROLLUP_LOGIN)))
    opened = rollup_pool(database(user=ROLLUP_LOGIN))
    await opened.open()
    yield opened
    await opened.close()


@pytest.fixture
async def admin_pool(database: Database) -> AsyncIterator[Pool]:
    """Connections with a gateway's rights."""
    from storage.database import PoolSettings, Role, make_pool
    from tests.storage.conftest import INGEST_LOGIN

    async with make_pool(PoolSettings(database(user=INGEST_LOGIN), Role.INGEST, max_size=2)) as opened:
        yield opened


@pytest.fixture
async def worker(pool: Pool, fleet: Fleet) -> Worker:
    made = make_worker(pool, 1)
    await made.adopt()
    return made


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def make_worker(
    pool: Pool, epoch: int, *, clock: Callable[[], float] = time.monotonic, metrics: Metrics | None = None,
    **settings: Any,
) -> Worker:  # fmt: skip
    return Worker(pool, epoch, RollupConfig(dsn="-", settle_s=0.0, **settings), metrics or MemoryMetrics(), clock)


async def settle(worker: Worker) -> None:
    """Turn until nothing more is to be done."""
    while await worker.turn():
        pass
