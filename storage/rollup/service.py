"""The process: of all the workers that run, the one with the lease works, the others stand by."""

import asyncio
import logging
import os
import socket
import time
from dataclasses import dataclass
from typing import Final

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from runtime.metrics import Metrics
from runtime.process import DependencyUnreachable, Shutdown
from storage.database import Pool, Role, connection_info
from storage.errors import StorageError, StorageUnavailable, translated
from storage.leases import Lease, Leases
from storage.rollup.config import RollupConfig
from storage.rollup.follow import LeaseLost
from storage.rollup.rests import Rests
from storage.rollup.worker import LONGEST_PAUSE_S, SHORTEST_PAUSE_S, Worker, report
from storage.statements import statements

log = logging.getLogger(__name__)

_SQL = statements("rollup.sql")

SCOPE: Final = "rollup"

_STATEMENT_TIMEOUT_S: Final = 300.0
_START_TIMEOUT_S: Final = 30.0


def rollup_pool(dsn: str) -> Pool:
    """A worker's connections, not yet open; they commit each statement by itself unless told otherwise."""
    info = connection_info(dsn, Role.MAINTAIN, statement_timeout_s=_STATEMENT_TIMEOUT_S)
    options = conninfo_to_dict(info)["options"]
    # What is computed commits together with how far it is: a crash that loses the last moments loses both, and the
    # worker does them again. So no commit need wait for the disk.
    return Pool(
        make_conninfo(
            info, application_name="atlasco-rollup", options=f"{options} -c synchronous_commit=off -c jit=off"
        ),
        name="rollup",
        max_size=3,
        timeout_s=10.0,
        autocommit=True,
    )


@dataclass(frozen=True, slots=True)
class _Measured:
    """The state of the work, for the gauges. Seconds and counts."""

    lag_s: float = 0.0
    backfills: int = 0
    failed: int = 0
    deletions: int = 0
    deletions_failing: int = 0
    oldest_deletion_s: float = 0.0


class RollupProcess:
    """Everything that runs in a process of `atlasco rollup`. `run` is its life."""

    def __init__(self, config: RollupConfig, metrics: Metrics) -> None:
        self._config = config
        self._metrics = metrics
        self._label = f"{socket.gethostname()}:{os.getpid()}"
        self._lease: Lease | None = None
        self._renewed = False
        self._measured = _Measured()

    async def database_ready(self) -> str | None:
        """For /readyz: why the lease could not be renewed; None when it could. Standing by is ready."""
        return None if self._renewed else "the database does not renew the lease"

    async def run(self, stopping: Shutdown) -> None:
        """Work, or stand by, until `stopping` is asked for; the transaction under way is finished first.

        Raises:
            DependencyUnreachable: the database cannot be reached at the start. Later it is waited for.
            StorageError: the database has not the schema, or not the privileges.
        """
        pool = rollup_pool(self._config.dsn)
        await pool.open()
        try:
            await self._prepare(pool)
            leases = Leases(pool, SCOPE, 1, self._config.lease_s, self._label)
            await leases.open()
            self._add_gauges()
            async with asyncio.TaskGroup() as tasks:
                keeping = tasks.create_task(self._keep_lease(leases, stopping))
                tasks.create_task(self._measure(pool, stopping))
                await self._work(pool, leases, stopping)
                await keeping
        finally:
            await pool.close()

    async def _prepare(self, pool: Pool) -> None:
        try:
            with translated():
                await pool.wait(_START_TIMEOUT_S)
        except StorageUnavailable as error:
            raise DependencyUnreachable(f"the database cannot be reached: {error}") from error

    async def _keep_lease(self, leases: Leases, stopping: Shutdown) -> None:
        interval = self._config.lease_s / 3
        while not stopping.requested:
            try:
                async with asyncio.timeout(interval):
                    standing = await leases.renew()
                self._renewed = True
                self._lease = standing.held.get(0)
            except (StorageError, TimeoutError) as error:
                self._renewed = False
                self._metrics.count("atlasco_rollup_failures", source="database")
                log.warning("lease not renewed", extra={"error": f"{type(error).__name__}: {error}"})
            await stopping.wait_at_most(interval)
        self._lease = None
        try:
            async with asyncio.timeout(interval):
                await leases.leave()
        except (StorageError, TimeoutError) as error:
            log.warning("the lease runs out by itself", extra={"error": f"{type(error).__name__}: {error}"})

    async def _work(self, pool: Pool, leases: Leases, stopping: Shutdown) -> None:
        worker: Worker | None = None
        adopted: Lease | None = None
        failing = Rests(time.monotonic, SHORTEST_PAUSE_S, LONGEST_PAUSE_S)
        while not stopping.requested:
            lease = self._lease
            if lease is None or not leases.holds(lease):
                adopted = None
                await stopping.wait_at_most(min(self._config.poll_s, self._config.lease_s / 6))
                continue
            try:
                if worker is None or adopted != lease:
                    worker = Worker(pool, lease.epoch, self._config, self._metrics)
                    await worker.adopt()
                    adopted = lease
                more = await worker.turn()
                failing.succeeded("turn")
                pause = 0.0 if more else self._config.poll_s
            except StorageError as error:
                failing.failed("turn")
                pause = failing.left_s("turn")
                report(self._metrics, error)
                adopted = None if isinstance(error, LeaseLost) else adopted
            await stopping.wait_at_most(pause)

    def _add_gauges(self) -> None:
        self._metrics.gauge("atlasco_rollup_active", lambda: float(self._lease is not None))
        self._metrics.gauge("atlasco_rollup_lag_seconds", lambda: self._measured.lag_s)
        self._metrics.gauge("atlasco_rollup_backfills_pending", lambda: float(self._measured.backfills))
        self._metrics.gauge("atlasco_rollup_failed", lambda: float(self._measured.failed))
        self._metrics.gauge("atlasco_deletions_open", lambda: float(self._measured.deletions))
        self._metrics.gauge("atlasco_deletions_failing", lambda: float(self._measured.deletions_failing))
        self._metrics.gauge("atlasco_deletion_oldest_seconds", lambda: self._measured.oldest_deletion_s)

    async def _measure(self, pool: Pool, stopping: Shutdown) -> None:
        while not stopping.requested:
            try:
                with translated():
                    async with pool.connection() as connection:
                        row = await (await connection.execute(_SQL["measure"])).fetchone()
                if row is not None:
                    self._measured = _Measured(max(row[0] or 0.0, 0.0), *row[1:])
            except StorageError as error:
                log.warning("not measured", extra={"error": f"{type(error).__name__}: {error}"})
            await stopping.wait_at_most(self._config.measure_interval_s)
