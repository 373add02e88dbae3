"""The life of one lane under one lease: read a page, publish it, move the cursor, tell how far the lane is."""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from google.protobuf.message import DecodeError

from runtime.metrics import Metrics
from storage.errors import StorageError
from storage.kafka import BrokerError, Topic
from storage.leases import Lease
from storage.relay.cursor import Page, Recovery, after
from storage.relay.drain import LaneDrain, LaneLost
from storage.relay.publish import Publisher
from storage.relay.records import change_records, watermark_records
from storage.relay.split import ChangeTooLarge

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pace:
    """How often what happens, in seconds."""

    # Between two looks at an outbox that had nothing more.
    poll_s: float = 0.1
    # Between two watermarks while data flows, and while it does not.
    watermark_s: float = 1.0
    idle_watermark_s: float = 5.0
    # Between two moves of a cursor that passes over nothing. They let go of old snapshots and let retirement advance.
    idle_store_s: float = 10.0
    # Longest pause after repeated failures.
    backoff_s: float = 10.0


@dataclass(slots=True)
class LaneRelay:
    """One lane. `holds` says whether the lease is still good; `run` ends when it is not."""

    drain: LaneDrain
    lanes: int
    lease: Lease
    holds: Callable[[Lease], bool]
    publisher: Publisher
    metrics: Metrics
    pace: Pace
    stopping: asyncio.Event
    clock: Callable[[], float] = time.monotonic
    _marked_at: float = float("-inf")
    _stored_at: float = float("-inf")
    _data_since_mark: bool = False
    _failures: int = field(default=0)

    async def run(self) -> None:
        """Relay until the lease is lost or the end is asked for; a page under way is finished first.

        Faults of the database and of Kafka are waited out, with growing pauses, for as long as the lease lasts.
        Nothing is lost by ending anywhere: the cursor moves only past what is in the log.
        """
        adopted = False
        while self.holds(self.lease) and not self.stopping.is_set():
            try:
                if not adopted:
                    await self.drain.adopt()
                    adopted = True
                more = await self._turn()
                self._failures = 0
                pause = 0.0 if more else self.pace.poll_s
            except LaneLost as lost:
                log.warning("lane lost", extra={"lane": self.drain.lane, "reason": str(lost)})
                self.metrics.count("atlasco_relay_failures", source="lease")
                if not adopted:
                    return
                # Perhaps the server was replaced under the page, and the lease still stands: adopting tells.
                adopted = False
                pause = self.pace.poll_s
            except (StorageError, BrokerError, DecodeError, ChangeTooLarge) as error:
                pause = self._failed(error)
            await self._pause(pause)

    async def _turn(self) -> bool:
        """One page; whether there may be more at once.

        1. Read the page, the target snapshot and the clock before it.
        2. Send every record of it and wait until all are confirmed.
        3. Move the cursor, fenced by the lease. A death between 2 and 3 publishes the page again.
        4. When the target is done: the watermark, to every partition, behind the data it covers.
        """
        topic = await self.publisher.topic()
        page = await self.drain.read(topic.topic_id)
        if isinstance(page, Recovery):
            log.warning("publishing the outbox again", extra={"lane": self.drain.lane, "recovery": page.value})
            self.metrics.count("atlasco_relay_rewinds", reason=page.value)
            return True
        if not self.holds(self.lease):
            return False
        if page.batches:
            await self._publish(page, topic)
        if page.batches or self.clock() - self._stored_at >= self.pace.idle_store_s or page.cursor.server is None:
            await self.drain.store(after(page, topic.topic_id), page.place)
            self._stored_at = self.clock()
        if page.last and self.holds(self.lease):
            await self._mark(page.target_at, topic)
        return not page.last

    async def _publish(self, page: Page, topic: Topic) -> None:
        records = change_records(
            page.batches,
            lane=self.drain.lane,
            complete_through=page.cursor.published_through,
            partitions=topic.partitions,
            max_message_bytes=topic.max_message_bytes,
        )
        count = await self.publisher.deliver(records, topic)
        self._data_since_mark = True
        self.metrics.count("atlasco_relay_batches_published", len(page.batches))
        self.metrics.count("atlasco_relay_changes_published", sum(batch.changes for batch in page.batches))
        self.metrics.count("atlasco_relay_records_published", count)
        self.metrics.count("atlasco_relay_bytes_published", page.payload_bytes)

    async def _mark(self, complete_through: datetime, topic: Topic) -> None:
        interval = self.pace.watermark_s if self._data_since_mark else self.pace.idle_watermark_s
        if self.clock() - self._marked_at < interval:
            return
        records = watermark_records(
            lane=self.drain.lane,
            lanes=self.lanes,
            partitions=topic.partitions,
            complete_through=complete_through,
            epoch=self.lease.epoch,
        )
        await self.publisher.deliver(records, topic)
        self._marked_at = self.clock()
        self._data_since_mark = False

    def _failed(self, error: Exception) -> float:
        source = (
            "database" if isinstance(error, StorageError) else "kafka" if isinstance(error, BrokerError) else "data"
        )
        self.metrics.count("atlasco_relay_failures", source=source)
        retriable = getattr(error, "retriable", False)
        log.log(
            logging.WARNING if retriable else logging.ERROR,
            "lane cannot go on yet",
            extra={"lane": self.drain.lane, "source": source, "error": f"{type(error).__name__}: {error}"},
        )
        self._failures += 1
        ceiling = min(self.pace.backoff_s, 0.1 * 2.0 ** min(self._failures, 20))
        # Jitter: the lanes of one relay fail together and need not try again together.
        return random.uniform(ceiling / 2, ceiling)

    async def _pause(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        try:
            async with asyncio.timeout(seconds):
                await self.stopping.wait()
        except TimeoutError:
            pass
