"""The loader as a process: its parts put together, its admin port, its end."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition

from runtime.admin import AdminServer
from runtime.metrics import Metrics
from runtime.process import Shutdown
from storage.errors import StorageError
from storage.kafka import (
    BrokerUnavailable,
    KafkaConfig,
    consumer_config,
    describe_topic,
    make_admin,
    producer_config,
    translate,
)
from storage.loader.config import LoaderConfig
from storage.loader.dead_letters import DeadLetterWriter, Redriven, redrive
from storage.loader.follow import Follower
from storage.loader.lag import LogEnds
from storage.loader.load import Load
from storage.loader.rebuild import LogEnd
from storage.loader.retirement import PostgresLoadedLanes
from storage.warehouse.port import Warehouse
from storage.warehouse.steps import AtStep, no_step

log = logging.getLogger(__name__)

CLIENT_ID = "atlasco-loader"


def make_follower(
    config: LoaderConfig, kafka: KafkaConfig, dsn: str, warehouse: Warehouse, metrics: Metrics, *, at: AtStep = no_step
) -> Follower:
    """A follower with its Kafka clients; nothing connects before its `run`.

    Raises:
        ConfigError: Kafka's settings cannot be used.
    """
    admin = make_admin(kafka, CLIENT_ID)
    producer = Producer(
        producer_config(kafka, CLIENT_ID, max_message_bytes=64 * 1024 * 1024, timeout_s=30.0), logger=log
    )

    def topic_id() -> str | None:
        topic = asyncio.run(describe_topic(admin, kafka.topic))
        return topic.topic_id if topic else None

    load = Load(warehouse, DeadLetterWriter(producer, admin, kafka.topic), PostgresLoadedLanes(dsn), topic_id, metrics)
    consumer = consumer_config(kafka, CLIENT_ID, config.group)
    ends = LogEnds(admin, kafka.topic)
    return Follower(config, kafka.topic, consumer, warehouse, load, topic_id, ends, metrics, at=at)


async def run_loader(
    config: LoaderConfig,
    follower: Follower,
    warehouse: Warehouse,
    admin: AdminServer,
    shutdown: Shutdown,
) -> int:
    """Load until told to stop; a load under way is finished. Returns the exit code."""
    loop = asyncio.get_running_loop()

    async def ready() -> str | None:
        return follower.not_ready

    admin.add_check("loader", ready)
    with ThreadPoolExecutor(2, thread_name_prefix="loader") as threads:
        async with admin:
            following = loop.run_in_executor(threads, follower.run)
            upkeep = asyncio.create_task(_compact_regularly(config.compact_s, warehouse, threads))
            stopping = asyncio.create_task(shutdown.wait())
            try:
                await asyncio.wait({following, stopping}, return_when=asyncio.FIRST_COMPLETED)
                follower.stop()
                # Raises what ended the follower, if it was not asked to end.
                await following
            finally:
                follower.stop()
                upkeep.cancel()
                stopping.cancel()
                await asyncio.gather(upkeep, stopping, return_exceptions=True)
    warehouse.close()
    return 0


async def _compact_regularly(every_s: float, warehouse: Warehouse, threads: ThreadPoolExecutor) -> None:
    while every_s > 0:
        await asyncio.sleep(every_s)
        try:
            done = await asyncio.get_running_loop().run_in_executor(threads, warehouse.compact)
            log.info("compacted", extra={"merged": done.files_merged, "folded": done.corrections_folded})
        except StorageError as error:
            # The next round does what this one could not.
            log.warning("compaction failed", extra={"error": str(error)})


def redrive_dead_letters(kafka: KafkaConfig, warehouse: Warehouse) -> Redriven:
    """See `dead_letters.redrive`."""
    return redrive(warehouse, consumer_config(kafka, "atlasco-redrive", "atlasco-redrive"), kafka.topic)


def log_end_of(kafka: KafkaConfig) -> Callable[[], LogEnd]:
    """Asks for the topic's id and end offsets when called.

    What it returns raises BrokerError when the brokers do not say.
    """
    admin = make_admin(kafka, "atlasco-rebuild")
    config = consumer_config(kafka, "atlasco-rebuild", "atlasco-rebuild")

    def ask() -> LogEnd:
        topic = asyncio.run(describe_topic(admin, kafka.topic))
        if topic is None:
            raise BrokerUnavailable(f"there is no topic {kafka.topic}")
        consumer = Consumer(config)
        try:
            offsets = {}
            for partition in range(topic.partitions):
                found = consumer.get_watermark_offsets(TopicPartition(kafka.topic, partition), timeout=10.0)
                if found is None:
                    raise BrokerUnavailable("the brokers did not say where the log ends")
                offsets[partition] = found[1]
        except KafkaException as error:
            raise translate(error.args[0]) from error
        finally:
            consumer.close()
        return LogEnd(topic.topic_id, offsets)

    return ask
