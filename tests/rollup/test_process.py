"""The real process: killed without a word while it works, replaced by another, stopped by SIGTERM."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psycopg

from embedded.ports import free_port
from storage.database import Pool
from storage.rollup.declare import create_projection, create_rollup, list_projections, list_rollups
from tests.rollup.conftest import ROLLUP_LOGIN, Write
from tests.rollup.test_worker import DEVICES, NUMBERS, check, check_projection, of_type, some
from tests.search.fleet import Fleet
from tests.storage.conftest import Database

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
    async with asyncio.timeout(60):
        while True:
            entries = [*await list_rollups(pool, tenant), *await list_projections(pool, tenant)]
            if all(e.status.state == "serving" and e.status.as_of and e.status.as_of > row[0] for e in entries):
                return


async def test_a_killed_worker_is_replaced(
    owner: psycopg.Connection[Any], fleet: Fleet, write: Write, database: Database, pool: Pool, admin_pool: Pool
) -> None:
    random = np.random.default_rng(4)
    for device in DEVICES:
        for name in NUMBERS:
            write(device, name, of_type(name, some(random, fleet)))
    await create_rollup(admin_pool, fleet.tenant_id, "numbers", NUMBERS)
    await create_projection(admin_pool, fleet.tenant_id, "wide", ["temperature", "count"])
    first = start(database)
    async with asyncio.timeout(60):
        # In the middle of the back-fill.
        while (await list_rollups(admin_pool, fleet.tenant_id))[0].status.complete_from is None:
            assert first.poll() is None
    first.kill()
    assert first.wait() == -signal.SIGKILL
    for device in DEVICES:
        write(device, "count", some(random, fleet))
    second = start(database)
    try:
        await until_kept(admin_pool, fleet.tenant_id, owner)
        check(owner, fleet)
        check_projection(owner, fleet, ("temperature", "count"))
    finally:
        second.send_signal(signal.SIGTERM)
    _, log = await asyncio.to_thread(second.communicate, timeout=30)
    assert second.returncode == 0, log.decode()
    first.communicate()
