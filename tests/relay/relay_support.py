"""What the tests of the relay work with: outbox rows, a consumer that reads everything, relays in processes."""

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
from atlasco.telemetry.v1 import change_pb2, common_pb2
from confluent_kafka import Consumer, KafkaException, TopicPartition

from embedded.kafka import EmbeddedKafka
from embedded.postgres import EmbeddedPostgres
from runtime.metrics import MemoryMetrics
from runtime.process import Shutdown
from storage.database import Pool
from storage.kafka import KafkaConfig
from storage.relay.config import RelayConfig
from storage.relay.retire import Retirer
from storage.relay.service import Relay
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
RELAY_LOGIN = "test_relay"
LANES = 4
PARTITIONS = 3
LEASE_S = 30.0
"""Costs nothing where relays are stopped, for they give their lanes up. Where one is killed, or cannot end its work,
others wait for it: such a test has a lease of its own."""

Change = tuple[str, int, int, str, int, int, Any, int]
"""Batch, tenant, bucket, device, attribute, time, value, revision."""


def change_batch(
    batch_id: UUID,
    *,
    tenant: int = 1,
    bucket: int = 0,
    values: Sequence[Any] = (1.0,),
    time_us: int = 1_000_000,
    revision: int = 0,
    op: change_pb2.ChangeOp.ValueType = change_pb2.CHANGE_OP_UPSERT,
) -> change_pb2.ChangeBatch:
    """One device's changes, a second apart; the type of the first value decides the column."""
    batch = change_pb2.ChangeBatch(
        batch_id=batch_id.bytes, tenant_id=tenant, tenant=f"t{tenant}", bucket=bucket, op=op, base_time_us=time_us
    )
    batch.entities.add(entity_id=bucket, external_id=f"device-{bucket}")
    first = values[0]
    column: Any
    if isinstance(first, str):
        column, kind = batch.strings, common_pb2.ATTRIBUTE_TYPE_STRING
    elif isinstance(first, bool):
        column, kind = batch.bools, common_pb2.ATTRIBUTE_TYPE_BOOL
    elif isinstance(first, int):
        column, kind = batch.int64s, common_pb2.ATTRIBUTE_TYPE_INT64
    else:
        column, kind = batch.doubles, common_pb2.ATTRIBUTE_TYPE_DOUBLE
    batch.attributes.add(attribute_id=7, name="reading", type=kind)
    count = len(values)
    column.entities.extend([0] * count)
    column.attributes.extend([0] * count)
    column.time_deltas_us.extend(i * 1_000_000 for i in range(count))
    if op == change_pb2.CHANGE_OP_UPSERT:
        column.values.extend(values)
    if revision:
        column.revisions.extend([revision] * count)
    return batch


def payload_of(batches: Iterable[change_pb2.ChangeBatch]) -> bytes:
    payload = change_pb2.OutboxPayload()
    for batch in batches:
        count = sum(len(c.entities) for c in (batch.doubles, batch.int64s, batch.bools, batch.strings))
        payload.frames.add(
            tenant_id=batch.tenant_id, bucket=batch.bucket, changes=count, change_batch=batch.SerializeToString()
        )
    return payload.SerializeToString()


def insert(
    connection: psycopg.Connection[Any], lane: int, batch_id: UUID, batches: Sequence[change_pb2.ChangeBatch]
) -> UUID:
    """An outbox row, as a lane's transaction writes it."""
    connection.execute(
        "INSERT INTO outbox (lane, batch_id, changes, tenant_ids, min_ts, max_ts, payload) "
        "VALUES (%s, %s, %s, %s, array_fill(now(), ARRAY[%s]), array_fill(now(), ARRAY[%s]), %s)",
        [lane, batch_id, 1, [b.tenant_id for b in batches], len(batches), len(batches), payload_of(batches)],
    )
    return batch_id


def changes_of(batch: change_pb2.ChangeBatch) -> list[Change]:
    """What a batch says, change by change."""
    found: list[Change] = []
    batch_id = str(UUID(bytes=batch.batch_id))
    columns: list[Any] = [batch.doubles, batch.int64s, batch.bools, batch.strings]
    for column in columns:
        for i, entity in enumerate(column.entities):
            found.append(
                (
                    batch_id,
                    batch.tenant_id,
                    batch.bucket,
                    batch.entities[entity].external_id,
                    batch.attributes[column.attributes[i]].attribute_id,
                    batch.base_time_us + column.time_deltas_us[i],
                    column.values[i] if column.values else None,
                    column.revisions[i] if column.revisions else 0,
                )
            )
    return found


@dataclass
class Log:
    """Everything that a consumer read, in order, by partition."""

    partitions: dict[int, list[Any]] = field(default_factory=dict)

    def records(self, kind: bytes) -> list[Any]:
        return [m for messages in self.partitions.values() for m in messages if dict(m.headers())["kind"] == kind]

    def batches(self) -> list[change_pb2.ChangeBatch]:
        return [change_pb2.ChangeBatch.FromString(m.value()) for m in self.records(b"changes")]

    def seen(self) -> Counter[tuple[str, int, int, int, int]]:
        """How often each record's identity came."""
        return Counter((str(UUID(bytes=b.batch_id)), b.tenant_id, b.bucket, int(b.op), b.part) for b in self.batches())

    def contents(self) -> Counter[Change]:
        """The changes, repeated records taken once."""
        once = {(b.batch_id, b.tenant_id, b.bucket, b.op, b.part): b for b in self.batches()}
        return Counter(change for batch in once.values() for change in changes_of(batch))

    def watermarks(self) -> list[change_pb2.Watermark]:
        return [change_pb2.Watermark.FromString(m.value()) for m in self.records(b"watermark")]

    def complete_through(self) -> int | None:
        """The smallest watermark of all lanes in all partitions, in microseconds; None while one is missing."""
        newest: dict[tuple[int, int], change_pb2.Watermark] = {}
        for mark in self.watermarks():
            old = newest.get((mark.lane, mark.partition))
            if old is None or mark.lease_epoch >= old.lease_epoch:
                newest[mark.lane, mark.partition] = mark
        if not newest or any(m.lanes * m.partitions != len(newest) for m in newest.values()):
            return None
        return min(m.complete_through_us for m in newest.values())


class Bench:
    """A database, a topic, and what is needed to write to the one and to read the other."""

    def __init__(self, postgres: EmbeddedPostgres, kafka: EmbeddedKafka, name: str, topic: str) -> None:
        self.postgres = postgres
        self.kafka = kafka
        self.name = name
        self.log = Log()
        self.kafka_config = KafkaConfig(bootstrap_servers=kafka.bootstrap_servers, topic=topic)
        self.config = RelayConfig(
            dsn=postgres.dsn(name, RELAY_LOGIN),
            topic_partitions=PARTITIONS,
            poll_s=0.02,
            watermark_s=0.1,
            idle_watermark_s=0.2,
            # Longer than a busy machine stands still: who lost its lanes, or missed the broker's word, publishes again.
            lease_s=LEASE_S,
            delivery_timeout_s=30.0,
            retire_margin_s=0.0,
            retire_after="never",
            measure_interval_s=0.1,
        )
        self._consumer: Consumer | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        with self.connect() as connection:
            connection.execute("SELECT ensure_outbox(now() - interval '1 hour', now() + interval '2 hours')")

    def close(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
        if self._consumer is not None:
            self._consumer.close()

    # -- the database

    def connect(self, **options: Any) -> psycopg.Connection[Any]:
        return psycopg.connect(self.postgres.dsn(self.name), **options)

    def write(self, count: int = 1, *, lane: int | None = None, values: Sequence[Any] = (1.0,)) -> None:
        """Committed outbox rows, each in its own transaction, over the lanes in turn."""
        with self.connect(autocommit=True) as connection:
            for i in range(count):
                batch_id = uuid4()
                batches = [change_batch(batch_id, bucket=b, values=values, time_us=i * 1000) for b in range(3)]
                insert(connection, i % LANES if lane is None else lane, batch_id, batches)

    def outbox(self) -> Counter[Change]:
        """Every change the outbox holds."""
        found: Counter[Change] = Counter()
        with self.connect() as connection:
            for (payload,) in connection.execute("SELECT payload FROM outbox"):
                for frame in change_pb2.OutboxPayload.FromString(payload).frames:
                    found.update(changes_of(change_pb2.ChangeBatch.FromString(frame.change_batch)))
        return found

    def one(self, query: str, *parameters: Any) -> Any:
        with self.connect(autocommit=True) as connection:
            row = connection.execute(query, parameters).fetchone()  # type: ignore[arg-type]
            return None if row is None else row[0]

    def now_us(self) -> int:
        """The primary's clock."""
        return int(self.one("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"))

    # -- the topic

    def read(self) -> Log:
        """Read on to the end of the topic as it is now; as far as it went while the broker cannot be asked."""
        with contextlib.suppress(KafkaException):
            self._read_on()
        return self.log

    def _read_on(self) -> None:
        if self._consumer is None:
            self._consumer = Consumer(
                {"bootstrap.servers": self.kafka.bootstrap_servers, "group.id": self.name, "enable.auto.commit": False},
                logger=logging.getLogger("test.consumer"),
            )
        consumer, topic = self._consumer, self.kafka_config.topic
        found = consumer.list_topics(topic, timeout=PATIENCE_S).topics[topic]
        if found.error is not None:
            return
        if len(self.log.partitions) != len(found.partitions):
            self.log.partitions = {number: [] for number in found.partitions}
            consumer.assign([TopicPartition(topic, number, 0) for number in found.partitions])
        ends = {
            number: consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=PATIENCE_S)[1]
            for number in found.partitions
        }
        deadline = time.monotonic() + PATIENCE_S
        while any(self._next(number) < end for number, end in ends.items()):
            assert time.monotonic() < deadline, "the topic cannot be read to its end"
            for message in consumer.consume(1000, 0.2):
                if message.error() is None:
                    partition = message.partition()
                    assert partition is not None
                    self.log.partitions[partition].append(message)

    def _next(self, partition: int) -> int:
        messages = self.log.partitions[partition]
        return messages[-1].offset() + 1 if messages else 0

    def forget_topic(self) -> None:
        """Read from the beginning of a topic that was made again."""
        if self._consumer is not None:
            self._consumer.close()
            self._consumer = None
        self.log = Log()

    # -- relays

    def retirer(self, pool: Pool, after: str) -> Retirer:
        return Retirer(pool, after, 0.0, MemoryMetrics())

    def relay(self, metrics: MemoryMetrics | None = None, **changes: Any) -> Relay:
        return Relay(replace(self.config, **changes), self.kafka_config, metrics or MemoryMetrics())

    def relay_process(self, **environment: str) -> subprocess.Popen[bytes]:
        """`atlasco relay` in a process of its own."""
        settings = {
            "ATLASCO_DSN": self.config.dsn,
            "KAFKA_BOOTSTRAP_SERVERS": self.kafka.bootstrap_servers,
            "ATLASCO_CHANGES_TOPIC": self.kafka_config.topic,
            "ATLASCO_TOPIC_PARTITIONS": str(PARTITIONS),
            "ATLASCO_RELAY_LEASE": f"{LEASE_S:g}s",
            "ATLASCO_RELAY_POLL": "20ms",
            "ATLASCO_RELAY_WATERMARK": "100ms",
            "ATLASCO_RELAY_IDLE_WATERMARK": "200ms",
            "ATLASCO_RETIRE_AFTER": "never",
            "ATLASCO_ADMIN_LISTEN": "127.0.0.1:0",
            "ATLASCO_LOG_FORMAT": "json",
        }
        program = (
            "import argparse, sys; from cli import relay; p = argparse.ArgumentParser(); "
            "relay.add_parser(p.add_subparsers()); a = p.parse_args(['relay']); sys.exit(a.run(a))"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, **settings, **environment},
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )
        self._processes.append(process)
        return process


@contextlib.asynccontextmanager
async def running(relay: Relay) -> AsyncIterator[Relay]:
    """A relay within this process; stopped gracefully at the end. What ends it before ends the block."""
    shutdown = Shutdown()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(relay.run(shutdown))
        try:
            yield relay
        finally:
            shutdown.request("test")
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.wait({task})


def stop(process: subprocess.Popen[bytes]) -> int:
    """SIGTERM, and the exit code."""
    process.send_signal(signal.SIGTERM)
    return process.wait(PATIENCE_S)
