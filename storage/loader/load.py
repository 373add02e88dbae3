"""One load, from units in memory to the warehouse: the order that makes it exactly once.

1. Dead letters reach their topic, so that the warehouse never knows of one that is nowhere.
2. The topic still has the id that the units were read under. Looked at after they were read: a topic that was made anew
   begins at offset 0, and its records must not pass for the old one's.
3. The warehouse takes the units, or says where their partitions stand instead.
4. PostgreSQL learns how far each lane is loaded, and says what time it is: the warehouse's lateness follows. Lost, it
   is caught up by the next load.

Kafka's own offsets come last, and elsewhere: `follow` commits them.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtime.metrics import Metrics
from storage.errors import StorageError
from storage.kafka import TopicMissing
from storage.loader.dead_letters import DeadLetterWriter, UndecodableRecord
from storage.loader.lag import Lateness
from storage.loader.retirement import LoadedLanes
from storage.warehouse.port import Outcome, Unit, Warehouse

log = logging.getLogger(__name__)


class TopicReplaced(Exception):
    """The topic has another id than the units were read under; nothing was loaded."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one load carries."""

    units: tuple[Unit, ...]
    undecodable: tuple[UndecodableRecord, ...]
    memory_bytes: int


class Load:
    """Carries out loads; blocking, one at a time."""

    def __init__(
        self,
        warehouse: Warehouse,
        dead_letters: DeadLetterWriter,
        loaded_lanes: LoadedLanes,
        topic_id: Callable[[], str | None],
        metrics: Metrics,
    ) -> None:
        self._warehouse = warehouse
        self._dead_letters = dead_letters
        self._loaded_lanes = loaded_lanes
        self._topic_id = topic_id
        self._metrics = metrics
        self._lateness = Lateness()
        metrics.gauge("atlasco_loader_behind_seconds", self._lateness.seconds)

    def run(self, batch: Batch) -> list[Outcome]:
        """One attempt. After a retriable error the same batch may be tried again, whatever was done.

        Raises:
            TopicReplaced: see there.
            StorageError: the warehouse failed.
            BrokerError: Kafka failed.
        """
        units = batch.units
        # 1.
        self._dead_letters.write(units[0].topic_id, batch.undecodable)
        # 2.
        current = self._topic_id()
        if current is None:
            raise TopicMissing("the topic does not exist (any more)")
        if any(unit.topic_id != current for unit in units):
            raise TopicReplaced
        # 3.
        outcomes = self._warehouse.load(units)
        self._count(units, outcomes)
        # 4.
        self.report()
        return outcomes

    def report(self) -> None:
        """Step 4, which can do no harm at any time."""
        try:
            primary_us = self._loaded_lanes.report(self._warehouse.lanes_loaded())
            self._lateness.measured(self._warehouse.completeness().as_of_us, primary_us)
        except StorageError as error:
            log.warning("the progress could not be reported", extra={"error": str(error)})

    def _count(self, units: Sequence[Unit], outcomes: Sequence[Outcome]) -> None:
        for unit, outcome in zip(units, outcomes, strict=True):
            if outcome.loaded:
                self._metrics.count("atlasco_loader_readings_loaded", outcome.rows)
                self._metrics.count("atlasco_loader_duplicates", outcome.duplicates)
                self._metrics.count("atlasco_loader_dead_letters", len(unit.dead_letters))
