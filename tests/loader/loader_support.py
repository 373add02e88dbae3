"""Means of the loader's tests: a log to write to, and loaders to run and kill."""

import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psycopg
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from psycopg import sql

from embedded.kafka import EmbeddedKafka
from runtime.metrics import MemoryMetrics
from storage.kafka import KafkaConfig
from storage.loader.config import LoaderConfig
from storage.loader.follow import Follower
from storage.loader.process import make_follower
from storage.warehouse.local import LocalWarehouse
from storage.warehouse.local_limits import LocalLimits
from storage.warehouse.port import Warehouse
from storage.warehouse.steps import AtStep, no_step
from tests.waiting import PATIENCE_S, wait_until
from tests.warehouse_fixtures import Record, TestDatabase

LOADER_LOGIN = "test_loader"

SESSION_S: Final = 30.0
"""Longer than a busy machine stands still: who lost its partitions reads again, and counts again what comes again."""
SHORT_SESSION_S: Final = 2.0
"""Where loaders wait for the end of another one's, or for its next heartbeat."""

_topics = itertools.count(1)


@dataclass
class AsLoader(TestDatabase):
    """A database as a login sees it that is a member of atlasco_loader and of nothing else."""

    @property
    def dsn(self) -> str:
        return self.server.dsn(self.name, LOADER_LOGIN)


def as_loader(database: TestDatabase) -> AsLoader:
    database.server.ensure_login(LOADER_LOGIN)
    with psycopg.connect(database.server.dsn(), autocommit=True) as connection:
        connection.execute(sql.SQL("GRANT atlasco_loader TO {}").format(sql.Identifier(LOADER_LOGIN)))
    return AsLoader(database.server, database.name)


@dataclass
class Log:
    """A topic of the test's own."""

    kafka: EmbeddedKafka
    topic: str
    partitions: int
    config: dict[str, str] = field(default_factory=dict)
    # Kept: a client that goes away takes its answers with it.
    admin: AdminClient = field(init=False)

    def __post_init__(self) -> None:
        self.admin = AdminClient({"bootstrap.servers": self.kafka.bootstrap_servers})

    @property
    def settings(self) -> KafkaConfig:
        return KafkaConfig(bootstrap_servers=self.kafka.bootstrap_servers, topic=self.topic)

    def create(self) -> None:
        topic = NewTopic(self.topic, self.partitions, 1, config=self.config)

        def attempt() -> bool:
            try:
                self.admin.create_topics([topic])[self.topic].result()
            except Exception as error:
                # A topic that is just being deleted is in the way for a moment.
                if "ALREADY_EXISTS" not in str(error) and "marked for deletion" not in str(error):
                    raise
                return False
            return True

        wait_until(attempt, "the topic is made")

    def delete(self) -> None:
        self.admin.delete_topics([self.topic])[self.topic].result()
        wait_until(lambda: self.topic not in self.admin.list_topics(timeout=PATIENCE_S).topics, "the topic is gone")

    def write(self, *records: Record) -> None:
        """Returns when the broker has them."""
        producer = Producer({"bootstrap.servers": self.kafka.bootstrap_servers, "acks": "all"})
        failures: list[Any] = []
        for record in records:
            producer.produce(
                self.topic,
                record.value,
                record.key,
                partition=record.partition,
                headers=list(record.headers),
                on_delivery=lambda error, _: failures.append(error) if error else None,
            )
        assert producer.flush(PATIENCE_S) == 0
        assert not failures

    def remove_before(self, partition: int, offset: int) -> None:
        """What retention does: the log then starts at `offset`."""
        where = TopicPartition(self.topic, partition, offset)
        for future in self.admin.delete_records([where]).values():
            future.result()

    def committed(self, partition: int = 0) -> int:
        """The loaders' offset as Kafka knows it."""
        consumer = Consumer(
            {"bootstrap.servers": self.kafka.bootstrap_servers, "group.id": "atlasco-loader-" + self.topic}
        )
        try:
            return int(consumer.committed([TopicPartition(self.topic, partition)], timeout=PATIENCE_S)[0].offset)
        finally:
            consumer.close()


def make_log(kafka: EmbeddedKafka, partitions: int, config: dict[str, str]) -> Log:
    log = Log(kafka, f"changes-{next(_topics)}", partitions, config)
    log.create()
    return log


@dataclass
class LoaderThread:
    """A follower in a thread."""

    follower: Follower
    metrics: MemoryMetrics
    warehouse: Warehouse
    thread: threading.Thread
    failures: list[BaseException]

    def stop(self) -> None:
        self.follower.stop()
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()
        self.warehouse.close()
        if self.failures:
            raise self.failures[0]


class Running:
    """The loaders of a test."""

    def __init__(self) -> None:
        self.threads: list[LoaderThread] = []
        self.processes: list[subprocess.Popen[str]] = []

    def loader(
        self,
        log: Log,
        database: TestDatabase,
        directory: Path,
        *,
        at: AtStep = no_step,
        warehouse: Warehouse | None = None,
        **config: Any,
    ) -> LoaderThread:
        """Start a loader with an adapter of its own."""
        target = warehouse or LocalWarehouse(directory, database.dsn, limits=LocalLimits(catalog_timeout_s=1.0), at=at)
        defaults = {"age_s": 0.2, "retry_s": 0.5, "session_s": SESSION_S, "group": "atlasco-loader-" + log.topic}
        settings = LoaderConfig(**(defaults | config))
        metrics = MemoryMetrics()
        follower = make_follower(settings, log.settings, database.dsn, target, metrics, at=at)
        failures: list[BaseException] = []

        def run() -> None:
            try:
                follower.run()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=run, name="follower")
        loader = LoaderThread(follower, metrics, target, thread, failures)
        self.threads.append(loader)
        thread.start()
        return loader

    def process(self, log: Log, database: TestDatabase, directory: Path, kill_at: str = "") -> subprocess.Popen[str]:
        """Start a loader as a process, which kills itself at a step; the group soon notices its death."""
        arguments = {
            "bootstrap": log.kafka.bootstrap_servers,
            "topic": log.topic,
            "dsn": database.dsn,
            "directory": str(directory),
            "kill_at": kill_at,
            "session_s": SHORT_SESSION_S,
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.loader.loader_process", json.dumps(arguments)],
            cwd=Path(__file__).parents[2],
            text=True,
        )
        self.processes.append(process)
        return process

    def stop(self) -> None:
        """End the threads; what ended one before is raised."""
        threads, self.threads = self.threads, []
        for loader in threads:
            loader.stop()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.stop()


def next_offsets(warehouse: Warehouse) -> dict[int, int]:
    return {partition: state.next_offset for partition, state in warehouse.states().items()}


def loaded(warehouse: Warehouse, offsets: Sequence[int]) -> Callable[[], bool]:
    """A condition: the partitions stand at these offsets."""
    wanted = dict(enumerate(offsets))
    return lambda: next_offsets(warehouse) == wanted
