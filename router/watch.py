"""Looking after the sources between questions: beats, probes, measurements.

What is found here only helps to plan; what an answer claims is proven by its own snapshot. A probe also decides when
a breaker closes again, so that no caller has to try.
"""

import asyncio
import logging
import random
from collections.abc import Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from router.clock import PrimaryClock
from router.database import DatabaseSource
from router.warehouse import WarehouseSource
from storage.database import Connection, Pool, bounded_connection
from storage.errors import StorageError, StorageUnavailable
from storage.heartbeat import beat, last_beat

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WatchSettings:
    """How often, in seconds."""

    beat_s: float = 0.03
    probe_s: float = 0.1
    warehouse_s: float = 1.0
    # A beat or a probe that waits for a connection, or for an answer, for longer has failed.
    patience_s: float = 1.0
    # After a failure.
    pause_s: float = 0.25


class Watch:
    """Beats on the primary and measures it, every replica and the warehouse.

    `beats` is a pool of the ingest role on the primary; `probes` has one of the query role per replica, apart from
    those of the questions, so that a crowded pool does not look like a dead server.
    """

    def __init__(
        self,
        clock: PrimaryClock,
        primary: DatabaseSource,
        beats: Pool,
        *,
        replicas: Sequence[tuple[DatabaseSource, Pool]] = (),
        warehouse: WarehouseSource | None = None,
        settings: WatchSettings | None = None,
    ) -> None:
        self._clock = clock
        self._primary = primary
        self._beats = beats
        self._replicas = replicas
        self._warehouse = warehouse
        self._settings = settings or WatchSettings()

    async def run(self) -> None:
        """Go on until cancelled. A source that fails is tried again, without end."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_beating(), name="heartbeat")
            for source, probes in self._replicas:
                group.create_task(self._keep_probing(source, probes), name=f"{source.name} probe")
            if self._warehouse is not None:
                group.create_task(self._keep_measuring(self._warehouse), name="warehouse measurement")

    async def _keep_beating(self) -> None:
        settings = self._settings
        while True:
            problem = await self._once(self._beat_once(), self._primary)
            # Apart from other gateways' beats, or they would all find the row young at the same time.
            await asyncio.sleep(settings.pause_s if problem else settings.beat_s * random.uniform(0.9, 1.1))

    async def _beat_once(self) -> None:
        async with self._connection(self._beats) as connection:
            await connection.set_autocommit(True)
            asked = self._clock.own_us()
            # A little younger than a period still counts as old: a beat must not be skipped for having come early.
            found = await beat(connection, self._settings.beat_s * 0.75)
            self._clock.observe(asked, found.clock_us, self._clock.own_us())
        for source, _ in self._replicas:
            source.database_id = found.database_id

    async def _keep_probing(self, source: DatabaseSource, probes: Pool) -> None:
        settings = self._settings
        while True:
            problem = await self._once(self._probe_once(source, probes), source)
            await asyncio.sleep(settings.pause_s if problem else settings.probe_s)

    async def _probe_once(self, source: DatabaseSource, probes: Pool) -> None:
        if source.database_id is None:
            return
        async with self._connection(probes) as connection:
            await connection.set_autocommit(True)
            as_of_us = await last_beat(connection, source.database_id)
        if as_of_us is None:
            raise StorageUnavailable("it does not hold the heartbeat of the primary: it is a copy of something else")
        source.saw(as_of_us)

    async def _keep_measuring(self, warehouse: WarehouseSource) -> None:
        while True:
            await warehouse.measure()
            await asyncio.sleep(self._settings.warehouse_s)

    def _connection(self, pool: Pool) -> AbstractAsyncContextManager[Connection]:
        patience_s = self._settings.patience_s
        return bounded_connection(pool, wait_s=patience_s, use_s=patience_s)

    async def _once(self, work: Coroutine[object, object, None], source: DatabaseSource) -> str:
        """Do it in time; returns what went wrong, which is for the source's breaker too."""
        was_well = not source.breaker.is_open
        try:
            await work
        except StorageError as error:
            problem = str(error)
            source.breaker.failed(problem, probe=True)
            if was_well and source.breaker.is_open:
                log.warning("source failed", extra={"source": source.name, "problem": problem})
            return problem
        source.breaker.answered(probe=True)
        if not was_well and not source.breaker.is_open:
            log.info("source is back", extra={"source": source.name})
        return ""
