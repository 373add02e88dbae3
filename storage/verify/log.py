"""The log as a store to compare: every change from its beginning, resolved by revision."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from confluent_kafka import Consumer, KafkaException, TopicPartition

from storage.kafka import KafkaConfig, consumer_config, translate
from storage.loader.decode import DecodedChanges, Undecodable, decode, headers_of
from storage.model import ValueType
from storage.verify.readings import Held, Key, VerifyTimeout

_POLL_S = 1.0


class LogStore:
    """Reads the whole topic into memory, then answers from there: for audits of what a topic can hold.

    A log whose beginning was removed by retention cannot be compared, and says so.
    """

    name = "log"

    def __init__(self, config: KafkaConfig) -> None:
        self._topic = config.topic
        self._consumer = Consumer(
            consumer_config(config, "atlasco-verify", "atlasco-verify")
            | {"auto.offset.reset": "earliest", "partition.assignment.strategy": "range"}
        )
        self._assigned = False
        # Tenant id -> reading -> value and revision; None for a deletion.
        self._held: dict[int, dict[Key, tuple[Any, int, bool]]] = {}
        self._watermarks: dict[tuple[int, int], int] = {}
        self._expected = (1, 1)
        self.undecodable = 0

    def close(self) -> None:
        """Leave the log."""
        self._consumer.close()

    def wait_for(self, through_us: int, deadline: float) -> None:
        """See `Store.wait_for`: reads on until every lane's watermark in every partition is at or past the time."""
        try:
            self._assign()
            while self._complete_us() < through_us:
                for message in self._consumer.consume(1_000, _POLL_S):
                    if (error := message.error()) is not None:
                        raise VerifyTimeout(f"the log cannot be read: {error}")
                    self._take(message)
                if time.monotonic() > deadline:
                    raise VerifyTimeout("the log has no watermark for now in every partition: is the relay running?")
        except KafkaException as error:
            raise VerifyTimeout(f"the log cannot be read: {translate(error.args[0])}") from error

    def readings(self, tenant_id: int, from_us: int, to_us: int) -> Iterator[tuple[Key, Held]]:
        """See `Store.readings`."""
        for key, (value, revision, deleted) in self._held.get(tenant_id, {}).items():
            if from_us <= key[3] < to_us and not deleted:
                yield key, (value, revision)

    def complete_from_us(self, tenant_id: int) -> int | None:
        """See `Store.complete_from_us`: a log without its beginning is not compared at all."""
        return None

    def names(self, tenant_id: int) -> Mapping[int, str]:
        """See `Store.names`: what the log called a device before its deletion stays in it until retention."""
        return {}

    def remains(self, tenant_id: int, entity_ids: Sequence[int]) -> Iterator[tuple[int, str]]:
        """See `Store.remains`."""
        counts: Counter[tuple[int, ValueType]] = Counter()
        wanted = set(entity_ids)
        for (value_type, entity_id, _, _), (_, _, deleted) in self._held.get(tenant_id, {}).items():
            if entity_id in wanted and not deleted:
                counts[entity_id, value_type] += 1
        for (entity_id, value_type), count in sorted(counts.items()):
            yield entity_id, f"{count} readings ({value_type})"

    def _assign(self) -> None:
        if self._assigned:
            return
        partitions = self._consumer.list_topics(self._topic, 10).topics[self._topic].partitions
        if not partitions:
            raise VerifyTimeout(f"there is no topic {self._topic}")
        for number in partitions:
            low, _ = self._consumer.get_watermark_offsets(TopicPartition(self._topic, number), 10)
            if low > 0:
                text = f"partition {number} of the log begins at offset {low}: its beginning was removed by retention"
                raise VerifyTimeout(text)
        self._consumer.assign([TopicPartition(self._topic, number, 0) for number in partitions])
        self._expected = (1, len(partitions))
        self._assigned = True

    def _complete_us(self) -> int:
        lanes, partitions = self._expected
        wanted = [(lane, partition) for lane in range(lanes) for partition in range(partitions)]
        return min(self._watermarks.get(place, 0) for place in wanted)

    def _take(self, message: Any) -> None:
        try:
            record = decode(headers_of(message.headers()), message.key(), message.value())
        except Undecodable:
            self.undecodable += 1
            return
        if not isinstance(record, DecodedChanges):
            self._expected = (max(self._expected[0], record.lanes), max(self._expected[1], record.partitions))
            place = (record.lane, record.partition)
            self._watermarks[place] = max(self._watermarks.get(place, 0), record.complete_through_us)
            return
        changes = record.changes
        held = self._held.setdefault(changes.tenant_id, {})
        for value_type, part in changes.columns.items():
            count = len(part)
            values = [None] * count if part.value is None else part.value.tolist()
            revisions = [0] * count if part.revision is None else part.revision.tolist()
            keys = zip(part.entity.tolist(), part.attribute.tolist(), part.ts_us.tolist(), strict=True)
            for place_of, value, revision in zip(keys, values, revisions, strict=True):
                key = (value_type, *place_of)
                before = held.get(key)
                # Between a value and a deletion of one revision the deletion counts.
                if before is None or (revision, changes.deletes) > (before[1], before[2]):
                    held[key] = (value, revision, changes.deletes)
