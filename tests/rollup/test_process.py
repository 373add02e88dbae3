"""The real process: killed without a word while it works, replaced by another, stopped by SIGTERM."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import psycopg

from embedded.ports import free_port
from runtime.metric_definitions import MetricName
from runtime.metrics import MemoryMetrics
from runtime.process import Shutdown
from storage.database import Pool
from storage.rollup.config import RollupConfig
from storage.rollup.declare import create_projection, create_rollup, list_projections, list_rollups
from storage.rollup.service import RollupProcess
from tests.rollup.conftest import ROLLUP_LOGIN, Write
from tests.rollup.test_worker import DEVICES, NUMBERS, check, check_projection, of_type, some
from tests.search.fleet import Fleet
from tests.storage.conftest import Database
from tests.waiting import PATIENCE_S, until

ROOT = Path(__file__).resolve().parents[2]


def start(database: Database) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            sys.executable, "-m", "cli.main", "rollup", "--admin-listen", f"127.0.0.1:{free_port()}",
            "--rollup-lease", "1s", "--rollup-poll", "20ms", "--rollup-backfill-devices", "5",
        ],
        cwd=ROOT, env={**os.environ, "ATLASCO_DSN": database(user=ROLLUP_LOGIN)}, stderr=subprocess.PIPE,
    )  # fmt: skip


async def until_kept(pool: Pool, tenant: int, connection: psycopg.Connection[Any]) -> None:
    """Wait until everything is filled, and the worker is past what is committed now."""
    row = connection.execute("SELECT clock_timestamp()").fetchone()
    connection.commit()
    assert row is not None
    committed_by = row[0]

    async def kept() -> bool:
        entries = [*await list_rollups(pool, tenant), *await list_projections(pool, tenant)]
        return all(e.status.state == "serving" and e.status.as_of and e.status.as_of > committed_by for e in entries)

    await until(kept, "everything is filled")


async def test_a_killed_worker_is_replaced(
    owner: psycopg.Connection[Any], fleet: Fleet, write: Write, database: Database, pool: Pool, admin_pool: Pool
) -> None:
    random = np.random.default_rng(4)
    for device in DEVICES:
        for name in NUMBERS:
            write(device, name, of_type(name, some(random, fleet)))
    await create_rollup(admin_pool, fleet.tenant_id, "numbers", NUMBERS)
    await create_projection(admin_pool, fleet.tenant_id, "wide", ["temperature", "count"])
    # It comes no further than the middle of the back-fill: the second step of it waits.
    owner.execute(
        "CREATE FUNCTION waits() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN NEW; END$$"
    )
    owner.execute(
        "CREATE TRIGGER waits BEFORE UPDATE ON rollups FOR EACH ROW WHEN (OLD.complete_from IS NOT NULL) "
        "EXECUTE FUNCTION waits()"
    )
    owner.execute("SELECT pg_advisory_lock(1)")
    owner.commit()
    first = start(database)

    async def begun() -> bool:
        assert first.poll() is None
        return (await list_rollups(admin_pool, fleet.tenant_id))[0].status.complete_from is not None

    await until(begun, "the back-fill has begun")
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert (await list_rollups(admin_pool, fleet.tenant_id))[0].status.state == "backfilling"
    owner.execute("SELECT pg_advisory_unlock(1)")
    owner.commit()
    for device in DEVICES:
        write(device, "count", some(random, fleet))
    second = start(database)
    try:
        await until_kept(admin_pool, fleet.tenant_id, owner)
        check(owner, fleet)
        check_projection(owner, fleet, ("temperature", "count"))
    finally:
        second.send_signal(signal.SIGTERM)
    _, log = await asyncio.to_thread(second.communicate, timeout=PATIENCE_S)
    assert second.returncode == 0, log.decode()
    first.communicate()


async def test_a_deletion_that_fails_shows_in_the_metrics(
    owner: psycopg.Connection[Any], fleet: Fleet, database: Database
) -> None:
    """Its last step is not due yet, so that it stays as it is."""
    owner.execute(
        "INSERT INTO entity_deletions (operation_id, tenant_id, entity_id, external_id, step, problem, created_at,"
        " deleted_at) VALUES (%s, %s, %s, 'device-0001', 'settle', 'broken', now() - interval '2 hours', now())",
        [uuid4(), fleet.tenant_id, fleet.entity_ids["device-0001"]],
    )
    owner.commit()
    metrics = MemoryMetrics()
    config = RollupConfig(dsn=database(user=ROLLUP_LOGIN), settle_s=3600, measure_interval_s=0.05)
    stopping = Shutdown()
    running = asyncio.create_task(RollupProcess(config, metrics).run(stopping))

    def measured() -> bool:
        return known(metrics, "atlasco_deletions_open") > 0

    try:
        await until(measured, "the deletion is counted", beside=running)
    finally:
        stopping.request("test")
        await running
    assert metrics.value("atlasco_deletions_open") == 1
    assert metrics.value("atlasco_deletions_failing") == 1
    assert 2 * 3600 <= metrics.value("atlasco_deletion_oldest_seconds") < 3 * 3600


def known(metrics: MemoryMetrics, name: MetricName) -> float:
    """The gauge's value; 0 before there is one."""
    try:
        return metrics.value(name)
    except KeyError:
        return 0
