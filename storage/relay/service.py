"""The relay process: leases decide which lanes run here, each in a task of its own."""

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from runtime.metrics import Metrics
from runtime.process import DependencyUnreachable, Shutdown
from storage.database import Pool, Role, connection_info
from storage.errors import StorageDefect, StorageError, StorageUnavailable, translated
from storage.kafka import KafkaConfig
from storage.leases import Lease, Leases
from storage.relay.config import RelayConfig
from storage.relay.drain import LaneDrain, PageLimits
from storage.relay.lane import LaneRelay, Pace
from storage.relay.publish import Publisher, TopicPlan
from storage.relay.retire import Retirer
from storage.statements import statements

log = logging.getLogger(__name__)

_SQL = statements("relay.sql")

SCOPE = "relay"

_STATEMENT_TIMEOUT_S = 60.0
# A page must come off the index in order, and stop when it is full. Left to its estimates the planner may collect and
# sort the whole backlog for each page instead: a drain that takes hours gets slower the longer the backlog is. The
# statements are the same for ever, so they are planned once.
_PLANS = " ".join(
    f"-c {setting}"
    for setting in (
        "enable_seqscan=off",
        "enable_bitmapscan=off",
        "enable_sort=off",
        "enable_incremental_sort=off",
        "plan_cache_mode=force_generic_plan",
    )
)
_START_TIMEOUT_S = 30.0
# Of a measurement: what waits is counted up to this, for each lane.
_MOST_COUNTED = 20_000


@dataclass(slots=True)
class LaneMeasure:
    """What waits in a lane: seconds since the oldest unpublished batch was begun, batches (up to a bound), and seconds
    since the moment through which the lane is complete; None before its first watermark.
    """

    oldest_s: float = 0.0
    batches: int = 0
    incomplete_s: float | None = None


def relay_pool(dsn: str) -> Pool:
    """A relay's connections, not yet open. They commit each statement by itself unless told otherwise: the drain
    depends on that.
    """
    info = connection_info(dsn, Role.MAINTAIN, statement_timeout_s=_STATEMENT_TIMEOUT_S)
    options = conninfo_to_dict(info)["options"]
    return Pool(
        make_conninfo(info, application_name="atlasco-relay", options=f"{options} {_PLANS}"),
        name="relay",
        # Lanes read and write in short turns; more connections would not make them faster.
        max_size=8,
        timeout_s=10.0,
        autocommit=True,
    )


class Relay:
    """Everything that runs in a relay process. `run` is its life."""

    def __init__(self, config: RelayConfig, kafka: KafkaConfig, metrics: Metrics) -> None:
        self._config = config
        self._kafka = kafka
        self._metrics = metrics
        self._label = f"{socket.gethostname()}:{os.getpid()}"
        self._lanes = 0
        self._running: dict[int, tuple[Lease, asyncio.Task[None], asyncio.Event]] = {}
        self._measures: dict[int, LaneMeasure] = {}
        self._outbox_bytes = 0
        self._renewed = False
        self._publisher: Publisher | None = None

    async def database_ready(self) -> str | None:
        """For /readyz: why the leases could not be renewed; None when they could."""
        return None if self._renewed else "the database does not renew the leases"

    async def kafka_ready(self) -> str | None:
        """For /readyz: why Kafka is not ready; None when it is, or when this relay holds no lane."""
        if self._publisher is None or (self._running and not self._publisher.connected):
            return "Kafka does not answer"
        return None

    async def run(self, stopping: Shutdown) -> None:
        """Relay until `stopping` is asked for; then finish the pages under way, and give the lanes up.

        Raises:
            DependencyUnreachable: the database cannot be reached at the start. Later it is waited for, and so is
                Kafka at any time.
            StorageError: the database has not the schema, or not the privileges.
            ConfigError: the Kafka client cannot be configured.
        """
        config = self._config
        async with self._open_pool() as pool:
            self._lanes = await self._prepare(pool)
            plan = TopicPlan(
                self._kafka.topic, config.topic_partitions, config.topic_replication, config.topic_retention_s
            )
            async with Publisher(self._kafka, plan, timeout_s=config.delivery_timeout_s) as publisher:
                self._publisher = publisher
                leases = Leases(pool, SCOPE, self._lanes, config.lease_s, self._label)
                await leases.open()
                self._add_gauges()
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._keep_lanes(tasks, pool, publisher, leases, stopping))
                    tasks.create_task(self._every(config.measure_interval_s, stopping, lambda: self._measure(pool)))
                    if config.retire_after != "never":
                        retirer = Retirer(pool, config.retire_after, config.retire_margin_s, self._metrics)
                        tasks.create_task(self._every(config.retire_interval_s, stopping, retirer.run_once))

    # -- lanes

    async def _keep_lanes(
        self, tasks: asyncio.TaskGroup, pool: Pool, publisher: Publisher, leases: Leases, stopping: Shutdown
    ) -> None:
        interval = self._config.lease_s / 3
        while not stopping.requested:
            pause = interval
            try:
                async with asyncio.timeout(interval):
                    standing = await leases.renew()
                self._renewed = True
                # The lanes to give up end first: two relays at one lane would do no harm, and no good.
                await self._end(standing.surplus)
                await leases.release(standing.surplus)
                wanted = {lane: lease for lane, lease in standing.held.items() if lane not in standing.surplus}
                await self._end([lane for lane, (lease, _, _) in self._running.items() if wanted.get(lane) != lease])
                for lease in wanted.values():
                    self._start(tasks, pool, publisher, leases, lease)
                if len(wanted) < self._lanes // max(1, standing.members):
                    # Others have more than their share, or a dead one's leases run out: look again soon.
                    pause = interval / 3
            except (StorageError, TimeoutError) as error:
                self._renewed = False
                self._metrics.count("atlasco_relay_failures", source="database")
                log.warning("leases not renewed", extra={"error": f"{type(error).__name__}: {error}"})
                pause = interval / 3
            await stopping.wait_at_most(pause)
        await self._end(list(self._running))
        try:
            async with asyncio.timeout(interval):
                await leases.leave()
        except (StorageError, TimeoutError) as error:
            log.warning("leases run out by themselves", extra={"error": f"{type(error).__name__}: {error}"})

    def _start(self, tasks: asyncio.TaskGroup, pool: Pool, publisher: Publisher, leases: Leases, lease: Lease) -> None:
        running = self._running.get(lease.item)
        if running is not None and not running[1].done():
            return
        config = self._config
        ending = asyncio.Event()
        lane = LaneRelay(
            drain=LaneDrain(pool, lease.item, lease.epoch, PageLimits(config.page_rows, config.page_bytes)),
            lanes=self._lanes,
            lease=lease,
            holds=leases.holds,
            publisher=publisher,
            metrics=self._metrics,
            pace=Pace(config.poll_s, config.watermark_s, config.idle_watermark_s),
            stopping=ending,
        )
        self._running[lease.item] = (lease, tasks.create_task(lane.run(), name=f"lane-{lease.item}"), ending)

    async def _end(self, lanes: list[int] | tuple[int, ...]) -> None:
        """Let the lanes finish their page; cut short what takes longer than the lease lasts."""
        ending = [self._running.pop(lane) for lane in lanes if lane in self._running]
        for _, _, event in ending:
            event.set()
        if not ending:
            return
        _, late = await asyncio.wait([task for _, task, _ in ending], timeout=self._config.lease_s / 3)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    # -- measures

    async def _measure(self, pool: Pool) -> None:
        with translated():
            async with pool.connection() as connection:
                rows = await (await connection.execute(_SQL["measure_lanes"], {"most": _MOST_COUNTED})).fetchall()
                size = await (await connection.execute(_SQL["measure_outbox"])).fetchone()
        for lane, oldest_s, batches, incomplete_s in rows:
            if lane in self._measures:
                self._measures[lane] = LaneMeasure(max(oldest_s, 0.0), batches, incomplete_s)
        self._outbox_bytes = 0 if size is None else size[0]

    def _add_gauges(self) -> None:
        for lane in range(self._lanes):
            self._measures[lane] = LaneMeasure()
            label = str(lane)
            self._metrics.gauge("atlasco_outbox_oldest_seconds", self._reader(lane, "oldest_s"), lane=label)
            self._metrics.gauge("atlasco_outbox_batches", self._reader(lane, "batches"), lane=label)
            self._metrics.gauge("atlasco_relay_incomplete_seconds", self._reader(lane, "incomplete_s"), lane=label)
        self._metrics.gauge("atlasco_outbox_bytes", lambda: self._outbox_bytes)
        self._metrics.gauge("atlasco_relay_lanes_held", lambda: len(self._running))

    def _reader(self, lane: int, name: str) -> Callable[[], float]:
        return lambda: float(getattr(self._measures[lane], name) or 0.0)

    async def _every(self, interval_s: float, stopping: Shutdown, work: Callable[[], Awaitable[object]]) -> None:
        while not stopping.requested:
            try:
                await work()
            except StorageError as error:
                self._metrics.count("atlasco_relay_failures", source="database")
                log.warning("housekeeping failed", extra={"error": f"{type(error).__name__}: {error}"})
            await stopping.wait_at_most(interval_s)

    # -- the start

    @asynccontextmanager
    async def _open_pool(self) -> AsyncIterator[Pool]:
        pool = relay_pool(self._config.dsn)
        await pool.open()
        try:
            yield pool
        finally:
            await pool.close()

    async def _prepare(self, pool: Pool) -> int:
        try:
            with translated():
                await pool.wait(_START_TIMEOUT_S)
                async with pool.connection() as connection:
                    found = await (await connection.execute(_SQL["number_of_lanes"])).fetchone()
                    if found is None:
                        raise StorageDefect("the database has no settings: run `atlasco migrate`")
                    await connection.execute(_SQL["add_lanes"], {"lanes": found[0]})
        except StorageUnavailable as error:
            raise DependencyUnreachable(f"the database cannot be reached: {error}") from error
        return int(found[0])
