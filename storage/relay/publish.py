"""The producer: takes records and says when all of them are in the log.

A thread serves the client's callbacks; everything else happens on the event loop. The producer is replaced when it
can no longer go on, and when the topic's limit, its number of partitions or the topic itself has changed.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from storage.kafka import (
    BrokerError,
    BrokerUnavailable,
    KafkaConfig,
    ProducerBroken,
    Topic,
    TopicMissing,
    describe_topic,
    make_admin,
    producer_config,
    translate,
)
from storage.relay.records import Record

log = logging.getLogger(__name__)
_client_log = logging.getLogger("storage.relay.librdkafka")

CLIENT_ID = "atlasco-relay"

_POLL_S = 0.1
# After so many records the loop gets a turn: a page may hold thousands.
_TURN = 200
_FULL_QUEUE_PAUSE_S = 0.01


@dataclass(frozen=True, slots=True)
class TopicPlan:
    """How the topic is made when it is missing. `replication` 0: as the brokers have it by default."""

    name: str
    partitions: int = 12
    replication: int = 0
    retention_s: float = 7 * 86_400.0

    def settings(self) -> dict[str, str]:
        """The topic's configuration."""
        settings = {"cleanup.policy": "delete", "retention.ms": str(int(self.retention_s * 1000))}
        if self.replication > 1:
            # An acknowledged record is then on two brokers at least, and one may be down.
            settings["min.insync.replicas"] = str(min(2, self.replication))
        return settings


class _Delivery:
    """The reports still owed for the records of one `deliver`."""

    __slots__ = ("_done", "_lock", "_loop", "_owed", "error")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._done = asyncio.Event()
        self._lock = threading.Lock()
        # One more than records, until the last one was handed over.
        self._owed = 1
        self.error: BrokerError | None = None

    def add(self) -> None:
        with self._lock:
            self._owed += 1

    def report(self, error: KafkaError | None, _: Message | None = None) -> None:
        """One record's report; called by the client, on the producer's thread."""
        if error is not None and self.error is None:
            self.error = translate(error)
        self.settle()

    def settle(self) -> None:
        with self._lock:
            self._owed -= 1
            if self._owed:
                return
        # A loop that was closed has nobody waiting.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._done.set)

    async def wait(self) -> None:
        await self._done.wait()


class _Client:
    """A librdkafka producer and the thread that serves it."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.broken = False
        self._ending = threading.Event()
        self.producer = Producer({**config, "error_cb": self._on_error}, logger=_client_log)
        self._thread = threading.Thread(target=self._serve, name="relay-producer", daemon=True)
        self._thread.start()

    def _on_error(self, error: KafkaError) -> None:
        if error.fatal():
            self.broken = True

    def _serve(self) -> None:
        while not self._ending.is_set():
            self.producer.poll(_POLL_S)

    def close(self) -> None:
        """Give up what was not delivered; every delivery still waiting gets its report."""
        self.producer.purge()
        self._ending.set()
        self._thread.join()
        self.producer.flush(1.0)


class Publisher:
    """Delivers records to the topic. Open with `async with`; it connects at the first `topic()`.

    `timeout_s`: seconds after which a record that the brokers did not confirm is given up.
    """

    def __init__(
        self, config: KafkaConfig, plan: TopicPlan, *, timeout_s: float = 30.0, refresh_s: float = 30.0
    ) -> None:
        self._config = config
        self._plan = plan
        self._timeout_s = timeout_s
        self._refresh_s = refresh_s
        self._admin: AdminClient | None = None
        self._client: _Client | None = None
        # The topic as last seen; None after a failure, until it is looked at again.
        self._topic: Topic | None = None
        # The topic as it was when the client was made: it is replaced only for a change, for that gives up what
        # other lanes have on its way.
        self._made_for: Topic | None = None
        self._seen_at = float("-inf")
        self._refreshing = asyncio.Lock()

    async def __aenter__(self) -> "Publisher":
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._client is not None:
            await asyncio.to_thread(self._client.close)
            self._client = None

    @property
    def connected(self) -> bool:
        """Whether the topic was seen and nothing failed since."""
        return self._topic is not None

    async def topic(self) -> Topic:
        """The topic as it was within the last `refresh_s` seconds, made if it was missing.

        Raises:
            BrokerError: the brokers cannot be reached or refuse.
            ConfigError: the client cannot be configured.
        """
        async with self._refreshing:
            fresh = time.monotonic() - self._seen_at < self._refresh_s
            if self._topic is None or self._client is None or self._client.broken or not fresh:
                try:
                    await self._refresh()
                except BrokerError:
                    self._topic = None
                    raise
            assert self._topic is not None
            return self._topic

    async def deliver(self, records: Iterable[Record], topic: Topic) -> int:
        """Send records made for `topic` and wait until the brokers have confirmed every one; returns how many.

        Raises:
            BrokerError: at least one was not confirmed; some, or all, may be in the log nevertheless. None is still
                on its way.
        """
        client = self._client
        if client is None or client.broken or topic != self._made_for:
            raise ProducerBroken("the topic or the producer has changed")
        delivery = _Delivery()
        count = 0
        try:
            for record in records:
                await self._hand_over(client, topic.name, record, delivery)
                count += 1
                if count % _TURN == 0:
                    await asyncio.sleep(0)
                if delivery.error is not None:
                    break
        finally:
            delivery.settle()
        await delivery.wait()
        if delivery.error is not None:
            # Look again before the next attempt: the topic may be gone, or its limit lowered.
            self._topic = None
            raise delivery.error
        return count

    async def _hand_over(self, client: _Client, topic: str, record: Record, delivery: _Delivery) -> None:
        deadline = time.monotonic() + self._timeout_s
        while True:
            delivery.add()
            try:
                client.producer.produce(
                    topic,
                    value=record.value,
                    key=record.key,
                    partition=record.partition,
                    headers=record.headers,
                    on_delivery=delivery.report,
                )
                return
            except BufferError:
                # The client's memory for unsent records is full: wait until some were confirmed or given up.
                delivery.settle()
                if time.monotonic() > deadline:
                    delivery.error = BrokerUnavailable("the producer's queue stays full")
                    return
                await asyncio.sleep(_FULL_QUEUE_PAUSE_S)
            except KafkaException as error:
                delivery.report(error.args[0])
                return

    async def _refresh(self) -> None:
        if self._admin is None:
            self._admin = make_admin(self._config, CLIENT_ID)
        found = await describe_topic(self._admin, self._plan.name)
        if found is None:
            await self._create(self._admin)
            found = await describe_topic(self._admin, self._plan.name)
            if found is None:
                raise TopicMissing(f"topic {self._plan.name} was made and is not there yet")
        if self._client is None or self._client.broken or self._made_for != found:
            await self._replace_client(found)
            log.info(
                "topic ready",
                extra={
                    "topic": found.name,
                    "topic_id": found.topic_id,
                    "partitions": found.partitions,
                    "max_message_bytes": found.max_message_bytes,
                },
            )
        self._topic = found
        self._seen_at = time.monotonic()

    async def _replace_client(self, topic: Topic) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await asyncio.to_thread(client.close)
        config = producer_config(
            self._config, CLIENT_ID, max_message_bytes=topic.max_message_bytes, timeout_s=self._timeout_s
        )
        self._client = _Client(config)
        self._made_for = topic

    async def _create(self, admin: AdminClient) -> None:
        plan = self._plan
        wanted = NewTopic(
            plan.name,
            num_partitions=plan.partitions,
            replication_factor=plan.replication or -1,
            config=plan.settings(),
        )
        log.info("making the topic", extra={"topic": plan.name, "partitions": plan.partitions})
        try:
            await asyncio.wrap_future(admin.create_topics([wanted], request_timeout=10.0)[plan.name])
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise translate(error.args[0]) from error
