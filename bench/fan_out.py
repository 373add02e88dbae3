"""What runs behind the outbox: one real Kafka, and for each database a topic, relays, loaders and a local warehouse."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from psycopg import sql

from bench.errors import BenchmarkVoid
from bench.stack import LOADER_LOGIN, RELAY_LOGIN, Stack
from embedded.errors import JarsUnresolved, JavaMissing, KafkaStartFailed, MavenMissing
from embedded.kafka import EmbeddedKafka
from embedded.program import Program
from storage.kafka import BrokerError, KafkaConfig, TopicMissing
from storage.model import ValueType
from storage.relay.publish import Publisher, TopicPlan
from storage.warehouse.columns import base_kind, delta_kind
from storage.warehouse.local import LocalWarehouse

LOAD_AGE = "1s"
"""ATLASCO_LOAD_AGE of the loaders here: the freshness that somebody who looks at it wants."""

_TOPIC_S = 30.0


class KafkaMissing(Exception):
    """This machine cannot run Kafka; the text says what is missing."""


@contextmanager
def running_kafka(directory: Path) -> Iterator[EmbeddedKafka]:
    """A broker of its own. Raises KafkaMissing, or BenchmarkVoid when it does not start although it could."""
    kafka = EmbeddedKafka(directory / "kafka")
    try:
        kafka.start()
    except (JavaMissing, MavenMissing, JarsUnresolved) as error:
        raise KafkaMissing(str(error)) from error
    except KafkaStartFailed as error:
        raise BenchmarkVoid(str(error)) from error
    try:
        yield kafka
    finally:
        kafka.stop()


def pid_of(kafka: EmbeddedKafka) -> int:
    """The broker's process id. Raises BenchmarkVoid when it has ended."""
    if kafka.pid is None:
        raise BenchmarkVoid(f"Kafka has ended; see {kafka.log_file}")
    return kafka.pid


@dataclass(frozen=True, slots=True)
class FanOut:
    """The fan-out of one database."""

    stack: Stack
    kafka: EmbeddedKafka
    database: str
    topic: str
    warehouse: LocalWarehouse

    def relay(self) -> Program:
        """A relay with the default settings, not yet started."""
        return self._program("relay", {"ATLASCO_DSN": self.stack.dsn(self.database, RELAY_LOGIN)})

    def loader(self) -> Program:
        """A loader, not yet started."""
        return self._program(
            "load",
            {
                "ATLASCO_DSN": self.stack.dsn(self.database, LOADER_LOGIN),
                "ATLASCO_WAREHOUSE_DIR": str(self._folder),
                "ATLASCO_LOAD_AGE": LOAD_AGE,
                "ATLASCO_LOAD_GROUP": self.topic,
            },
        )

    def published(self) -> int:
        """Changes that the relay has noted as being in Kafka."""
        with self.stack.admin(self.database) as connection:
            row = connection.execute(
                "SELECT coalesce(sum(o.changes), 0) FROM outbox o JOIN relay_lanes r USING (lane)"
                " WHERE pg_visible_in_snapshot(o.xid, r.published)"
            ).fetchone()
        assert row is not None
        return int(row[0])

    def verify(self, readings: int) -> None:
        """Compare the warehouse with PostgreSQL, device by device and attribute by attribute.

        Raises BenchmarkVoid unless both hold the same number of readings with the same sum of timestamps, `readings`
        in all, each once. (No key was written twice, so there is nothing for the warehouse to resolve.)
        """
        for value_type in ValueType:
            stored, loaded = self._stored(value_type), self._loaded(value_type)
            if stored != loaded:
                count = sum(stored.get(key) != loaded.get(key) for key in stored.keys() | loaded.keys())
                raise BenchmarkVoid(f"{count} series of type {value_type} differ between PostgreSQL and the warehouse")
            readings -= sum(rows for rows, _ in loaded.values())
        if readings:
            raise BenchmarkVoid(f"the warehouse holds {-readings:+,} readings more than were acked")
        sizes = {size.kind: size.rows for size in self.warehouse.status().sizes}
        if twice := sum(sizes[delta_kind(value_type)] for value_type in ValueType):
            raise BenchmarkVoid(f"the warehouse holds {twice} corrections, and none was made")
        for value_type in ValueType:
            [(keys,)] = self.warehouse.query(
                "SELECT count(*) FROM (SELECT DISTINCT tenant_id, entity_id, attribute_id, ts"
                f" FROM entity_attributes_{value_type}) AS keys"
            ).rows
            if keys != sizes[base_kind(value_type)]:
                raise BenchmarkVoid(f"type {value_type}: {sizes[base_kind(value_type)]} rows of {keys} readings")

    def _stored(self, value_type: ValueType) -> dict[tuple[int, int], tuple[int, int]]:
        with self.stack.admin(self.database) as connection:
            rows = connection.execute(
                sql.SQL(
                    "SELECT entity_id, attribute_id, count(*), sum((extract(epoch FROM ts) * 1000000)::bigint)"
                    " FROM {} GROUP BY 1, 2"
                ).format(sql.Identifier(f"entity_attributes_{value_type}"))
            ).fetchall()
        return {(entity, attribute): (int(count), int(total)) for entity, attribute, count, total in rows}

    def _loaded(self, value_type: ValueType) -> dict[tuple[int, int], tuple[int, int]]:
        rows = self.warehouse.query(
            f"SELECT entity_id, attribute_id, count(*), sum(epoch_us(ts)) FROM entity_attributes_{value_type}"
            " GROUP BY 1, 2"
        ).rows
        return {(entity, attribute): (int(count), int(total)) for entity, attribute, count, total in rows}

    @property
    def _folder(self) -> Path:
        return _folder(self.stack, self.topic)

    def _program(self, command: str, settings: dict[str, str]) -> Program:
        brokers = {"KAFKA_BOOTSTRAP_SERVERS": self.kafka.bootstrap_servers, "ATLASCO_CHANGES_TOPIC": self.topic}
        return self.stack.program(command, ["cli.main", command], brokers | settings)


@contextmanager
def fan_out(stack: Stack, kafka: EmbeddedKafka, database: str, topic: str) -> Iterator[FanOut]:
    """A topic, made as a relay makes it, and an empty warehouse whose catalog is in the database."""
    try:
        asyncio.run(_make_topic(KafkaConfig(bootstrap_servers=kafka.bootstrap_servers, topic=topic)))
    except (BrokerError, TimeoutError) as error:
        raise BenchmarkVoid(f"the topic could not be made: {error!r}") from error
    warehouse = LocalWarehouse(_folder(stack, topic), stack.dsn(database, "postgres"))
    try:
        warehouse.init()
        yield FanOut(stack, kafka, database, topic, warehouse)
    finally:
        warehouse.close()


def _folder(stack: Stack, topic: str) -> Path:
    return stack.directory / "warehouses" / topic


async def _make_topic(config: KafkaConfig) -> None:
    async with Publisher(config, TopicPlan(config.topic)) as publisher, asyncio.timeout(_TOPIC_S):
        while True:
            try:
                await publisher.topic()
                return
            except TopicMissing:
                # The brokers have made it and do not show it yet.
                await asyncio.sleep(0.1)
