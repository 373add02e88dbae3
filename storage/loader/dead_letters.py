"""The dead-letter topic: records that could not be decoded, as they came, with the reason and the position.

It lives beside the topic it belongs to and keeps its records for ever: they are what `redrive` works from.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final, TypeAlias

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from storage.kafka import BrokerUnavailable, translate
from storage.loader.decode import DecodedChanges, Headers, Undecodable, decode, headers_of
from storage.warehouse.port import Warehouse

log = logging.getLogger(__name__)

REASON: Final = "dead-letter-reason"
TOPIC_ID: Final = "dead-letter-topic-id"
PARTITION: Final = "dead-letter-partition"
OFFSET: Final = "dead-letter-offset"

_ROOM_S: Final = 0.1

_Delivered: TypeAlias = Callable[[KafkaError | None, Message], None]


def dead_letter_topic(topic: str) -> str:
    """The name of a topic's dead-letter topic."""
    return f"{topic}.dead-letter"


@dataclass(frozen=True, slots=True)
class UndecodableRecord:
    """A record as it came, with the reason it cannot be read."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]
    reason: str

    @classmethod
    def of(cls, message: Message, reason: str) -> "UndecodableRecord":
        """From a consumed message."""
        pairs: Any = message.headers() or ()
        headers = tuple((name, _bytes(value)) for name, value in pairs)
        partition, offset = message.partition(), message.offset()
        assert partition is not None
        assert offset is not None
        return cls(partition, offset, _bytes(message.key()), _bytes(message.value()), headers, reason)


def _bytes(value: Any) -> bytes | None:
    return value.encode() if isinstance(value, str) else value


class DeadLetterWriter:
    """Writes records to the dead-letter topic, which it makes at the first one."""

    def __init__(self, producer: Producer, admin: AdminClient, topic: str) -> None:
        self._producer = producer
        self._admin = admin
        self._topic = dead_letter_topic(topic)
        self._made = False

    def write(self, topic_id: str, records: Sequence[UndecodableRecord], timeout_s: float = 30.0) -> None:
        """Returns when the brokers have them all. Tried again, it may write some twice: the position tells.

        Raises:
            BrokerError: the brokers did not take one.
        """
        if not records:
            return
        if not self._made:
            self._make_topic(timeout_s)
        failures: list[KafkaError] = []

        def delivered(error: KafkaError | None, _: Message) -> None:
            if error is not None:
                failures.append(error)

        for record in records:
            headers: list[tuple[str, Any]] = [
                *record.headers,
                (REASON, record.reason.encode()),
                (TOPIC_ID, topic_id.encode()),
                (PARTITION, b"%d" % record.partition),
                (OFFSET, b"%d" % record.offset),
            ]
            self._produce(record, headers, delivered, timeout_s)
        if self._producer.flush(timeout_s):
            raise BrokerUnavailable("dead letters were not confirmed in time")
        if failures:
            raise translate(failures[0])

    def _produce(
        self, record: UndecodableRecord, headers: list[tuple[str, Any]], delivered: _Delivered, timeout_s: float
    ) -> None:
        gives_up = monotonic() + timeout_s
        while True:
            try:
                self._producer.produce(self._topic, record.value, record.key, headers=headers, on_delivery=delivered)
            except KafkaException as error:
                raise translate(error.args[0]) from error
            except BufferError:
                # The producer's queue is full, and nothing but asking for what was delivered makes room in it.
                if monotonic() >= gives_up:
                    raise BrokerUnavailable("dead letters were not confirmed in time") from None
                self._producer.poll(_ROOM_S)
            else:
                return

    def _make_topic(self, timeout_s: float) -> None:
        topic = NewTopic(self._topic, num_partitions=1, replication_factor=-1, config={"retention.ms": "-1"})
        made: Future[None] = self._admin.create_topics([topic], operation_timeout=timeout_s)[self._topic]
        try:
            made.result()
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise translate(error.args[0]) from error
        self._made = True


@dataclass(frozen=True, slots=True)
class Redriven:
    """What a redrive did."""

    loaded: int
    still_undecodable: int
    missing: int


def redrive(warehouse: Warehouse, consumer_config: Mapping[str, Any], topic: str) -> Redriven:
    """Try every open dead letter again, from the dead-letter topic.

    Of several records with one position the last counts, so a repaired copy can be written there by hand. A watermark
    is struck off without effect: newer ones came since.

    Raises:
        BrokerError: the dead-letter topic cannot be read.
        StorageError: the warehouse failed.
    """
    wanted = {(letter.partition, letter.offset): letter for letter in warehouse.dead_letters()}
    found: dict[tuple[int, int], tuple[Headers, bytes | None, bytes | None]] = {}
    if wanted:
        for message in _all_records(consumer_config, dead_letter_topic(topic)):
            headers = headers_of(message.headers())
            try:
                position = int(headers[PARTITION]), int(headers[OFFSET])
            except (KeyError, ValueError):
                log.warning("a dead letter without position", extra={"offset": message.offset()})
                continue
            found[position] = (headers, _bytes(message.key()), _bytes(message.value()))
    loaded = undecodable = 0
    for position, (named, key, value) in found.items():
        if position not in wanted:
            continue
        try:
            decoded = decode(named, key, value)
        except Undecodable as error:
            undecodable += 1
            log.warning(
                "still undecodable",
                extra={"partition": position[0], "offset": position[1], "reason": error.reason},
            )
            continue
        changes = decoded.changes if isinstance(decoded, DecodedChanges) else None
        loaded += warehouse.redrive(wanted[position], changes)
    return Redriven(loaded, undecodable, len(wanted.keys() - found.keys()))


def _all_records(config: Mapping[str, Any], topic: str) -> Iterator[Message]:
    """Every record that a topic of one partition holds now."""
    consumer = Consumer({**config, "group.id": "atlasco-redrive", "auto.offset.reset": "error"})
    try:
        low, high = consumer.get_watermark_offsets(TopicPartition(topic, 0), timeout=10.0)
        consumer.assign([TopicPartition(topic, 0, low)])
        idle = 0
        while low < high:
            message = consumer.poll(1.0)
            if message is None:
                idle += 1
                if idle > 30:
                    raise BrokerUnavailable("the dead-letter topic does not answer")
                continue
            if (error := message.error()) is not None:
                problem = translate(error)
                if not problem.retriable:
                    raise problem
                continue
            idle = 0
            low = (message.offset() or 0) + 1
            yield message
    except KafkaException as error:
        problem = translate(error.args[0])
        raise problem from error
    finally:
        consumer.close()
