"""Following the log: consume, decode, buffer, and hand over to loads; the loader's main loop.

Two threads. This one polls Kafka all the time, so that the group never takes it for dead; a second one carries out one
load at a time. What is read while a load runs waits for the next one, up to the bound of memory; then the partitions
are paused.

Where to begin in a partition is always asked of the warehouse. A partition that is taken away takes its buffer with it.
A load under way is not stopped for that: whoever has the partition now and this load meet at the lock of the load
state, and one of them is told that the other was first.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from runtime.metrics import Metrics
from storage.errors import StorageError
from storage.kafka import BrokerError, BrokerUnavailable, TopicMissing, translate
from storage.loader.buffer import PartitionBuffer, due
from storage.loader.config import LoaderConfig
from storage.loader.dead_letters import UndecodableRecord
from storage.loader.decode import DecodedChanges, Undecodable, decode, headers_of, visible_xid
from storage.loader.lag import LogEnds
from storage.loader.load import Batch, Load, TopicReplaced
from storage.loader.position import Begin, Halted, decide
from storage.loader.snapshot import visible
from storage.warehouse.port import LoadState, Outcome, Warehouse
from storage.warehouse.steps import AtStep, no_step

log = logging.getLogger(__name__)

_POLL_S = 0.1
_RECORDS_PER_POLL = 500
_PLACE_EVERY_S = 1.0
_BROKER_TIMEOUT_S = 10.0


class Follower:
    """Keeps a warehouse loaded from the log, from `run` to its end. Not reusable."""

    def __init__(
        self,
        config: LoaderConfig,
        topic: str,
        consumer_config: Mapping[str, Any],
        warehouse: Warehouse,
        load: Load,
        topic_id: Callable[[], str | None],
        ends: LogEnds,
        metrics: Metrics,
        *,
        at: AtStep = no_step,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._topic = topic
        self._warehouse = warehouse
        self._load = load
        self._topic_id = topic_id
        self._ends = ends
        self._metrics = metrics
        self._at = at
        self._clock = clock
        self._consumer_config = dict(consumer_config) | {
            # All partitions are taken back and given anew at every change: then one `assign` says where each begins.
            "partition.assignment.strategy": "range",
            "session.timeout.ms": int(config.session_s * 1000),
            "heartbeat.interval.ms": int(config.session_s * 1000 / 5),
            # The client's own queue; what it holds is outside the bound of memory.
            "queued.max.messages.kbytes": 32 * 1024,
        }
        self._buffers: dict[int, PartitionBuffer] = {}
        self._undecodable: list[UndecodableRecord] = []
        # Ours by the group's word, but without a place to begin yet.
        self._unplaced: set[int] = set()
        self._halted: dict[int, str] = {}
        # Of every partition that is ours, what the warehouse wants next; None: it was not asked yet.
        self._wanted: dict[int, int | None] = {}
        self._place_at = 0.0
        self._paused = False
        self._loading: tuple[Batch, Future[list[Outcome] | None]] | None = None
        self._stop = threading.Event()
        self._trouble: str | None = "not started"
        self._assigned = False
        metrics.gauge("atlasco_loader_buffer_bytes", lambda: float(self._memory_bytes()))
        metrics.gauge("atlasco_loader_halted_partitions", lambda: float(len(self._halted)))
        metrics.gauge("atlasco_loader_lag_records", lambda: float(ends.missing(dict(self._wanted))))

    @property
    def not_ready(self) -> str | None:
        """Why the loader does not do its work; None when it does. May be asked from any thread."""
        halted = dict(self._halted)
        if halted:
            partition, reason = min(halted.items())
            return f"partition {partition} needs `atlasco rebuild`: {reason}"
        if self._trouble is not None:
            return self._trouble
        return None if self._assigned else "waiting for partitions"

    def stop(self) -> None:
        """Have `run` return soon; what waits is read again by whoever comes next. From any thread."""
        self._stop.set()

    def run(self) -> None:
        """Follow the log until `stop`.

        Raises:
            BrokerError: one that trying again does not cure, such as a refused login.
        """
        # What the last loader had no time to report, and how late the warehouse is before the first load.
        self._load.report()
        consumer = Consumer(self._consumer_config, logger=log)
        with ThreadPoolExecutor(1, thread_name_prefix="load") as loads:
            try:
                consumer.subscribe(
                    [self._topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_revoke
                )
                self._trouble = None
                while not self._stop.is_set():
                    self._turn(consumer, loads)
                if self._loading is not None:
                    self._finish(consumer, wait=True)
            finally:
                self._trouble = "stopped"
                self._stop.set()
                consumer.close()

    def _turn(self, consumer: Consumer, loads: ThreadPoolExecutor) -> None:
        for message in self._consume(consumer):
            self._take(message)
        self._finish(consumer)
        if (self._unplaced or self._halted) and self._clock() >= self._place_at:
            self._place_at = self._clock() + _PLACE_EVERY_S
            self._place(consumer)
        waiting = list(self._buffers.values())
        if self._loading is None and due(
            waiting, self._clock(), age_s=self._config.age_s, size_bytes=self._config.size_bytes
        ):
            self._begin_load(loads)
        self._pause_or_resume(consumer)
        self._ends.look(self._wanted)

    # -- reading

    def _consume(self, consumer: Consumer) -> list[Message]:
        timeout = 0.01 if self._loading is not None and self._loading[1].done() else _POLL_S
        try:
            return consumer.consume(_RECORDS_PER_POLL, timeout)
        except KafkaException as error:
            self._problem(error.args[0], None)
            return []

    def _take(self, message: Message) -> None:
        error = message.error()
        partition = message.partition()
        if error is not None:
            self._problem(error, partition)
            return
        offset = message.offset()
        buffer = self._buffers.get(partition) if partition is not None else None
        if buffer is None or offset is None or not buffer.expects(offset):
            return
        now, size = self._clock(), len(message)
        headers = headers_of(message.headers())
        try:
            decoded = decode(headers, _bytes(message.key()), _bytes(message.value()))
            if isinstance(decoded, DecodedChanges):
                buffer.add_changes(offset, size, now, decoded)
                self._metrics.count("atlasco_loader_records", 1, kind="changes")
            else:
                buffer.add_watermark(offset, size, now, decoded)
                self._metrics.count("atlasco_loader_records", 1, kind="watermark")
        except Undecodable as why:
            rebuild, xid = buffer.state.rebuild, visible_xid(headers)
            if rebuild is not None and xid is not None and visible(xid, rebuild.snapshot):
                # Whatever it says, the rebuild has brought it.
                buffer.pass_over(offset, size, now)
                return
            log.error("undecodable record", extra={"partition": partition, "offset": offset, "reason": why.reason})
            buffer.add_dead_letter(offset, size, now, why)
            self._undecodable.append(UndecodableRecord.of(message, why.reason))

    def _problem(self, error: KafkaError, partition: int | None) -> None:
        """Something that Kafka reports in place of a record."""
        if error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE) and partition is not None:
            # The log no longer has the next record. Look what it has, and at whose log it is.
            self._drop(partition)
            self._unplaced.add(partition)
            return
        problem = translate(error)
        log.warning("kafka reports a problem", extra={"error": str(problem), "partition": partition})
        if not problem.retriable:
            raise problem

    def _pause_or_resume(self, consumer: Consumer) -> None:
        held = self._memory_bytes()
        if not self._paused and held >= self._config.memory_bytes:
            consumer.pause(self._partitions())
            self._paused = True
        elif self._paused and held * 2 < self._config.memory_bytes:
            consumer.resume(self._partitions())
            self._paused = False

    def _memory_bytes(self) -> int:
        loading = self._loading
        return sum(buffer.memory_bytes for buffer in list(self._buffers.values())) + (
            loading[0].memory_bytes if loading else 0
        )

    # -- partitions

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        log.info("partitions assigned", extra={"partitions": sorted(p.partition for p in partitions)})
        self._forget_all()
        self._unplaced = {p.partition for p in partitions}
        self._wanted = dict.fromkeys(self._unplaced)
        self._assigned = True
        self._place_at = 0.0
        # Nothing is read until the warehouse has said where to begin; it may not answer right now.
        consumer.assign([])

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        log.info("partitions revoked", extra={"partitions": sorted(p.partition for p in partitions)})
        self._forget_all()
        consumer.unassign()

    def _forget_all(self) -> None:
        self._buffers.clear()
        self._undecodable.clear()
        self._unplaced.clear()
        self._halted.clear()
        self._wanted = {}
        self._paused = False

    def _drop(self, partition: int) -> None:
        self._buffers.pop(partition, None)
        self._undecodable = [record for record in self._undecodable if record.partition != partition]

    def _partitions(self) -> list[TopicPartition]:
        return [TopicPartition(self._topic, p, buffer.end) for p, buffer in sorted(self._buffers.items())]

    def _place(self, consumer: Consumer) -> None:
        """Find where to begin in the partitions that have no place yet, or had none when last asked."""
        try:
            placed = self._decide(consumer)
        except (StorageError, BrokerError) as error:
            self._trouble = str(error)
            log.warning("cannot find where to begin", extra={"error": str(error)})
            return
        self._trouble = None
        if not placed:
            return
        for partition, state in placed.items():
            self._buffers[partition] = PartitionBuffer.at(state)
            self._halted.pop(partition, None)
        self._unplaced -= placed.keys()
        self._paused = False
        consumer.assign(self._partitions())
        log.info("reading", extra={"offsets": {p: b.end for p, b in sorted(self._buffers.items())}})

    def _decide(self, consumer: Consumer) -> dict[int, LoadState]:
        topic_id = self._topic_id()
        if topic_id is None:
            raise TopicMissing(f"there is no topic {self._topic}")
        states = self._warehouse.states()
        begin: dict[int, int] = {}
        halts: dict[int, str] = {}
        placed: dict[int, LoadState] = {}
        for partition in sorted(self._unplaced | self._halted.keys()):
            state = states.get(partition)
            low, high = self._log_range(consumer, partition)
            self._wanted[partition] = 0 if state is None else state.next_offset
            match decide(state, topic_id, low, high):
                case Begin():
                    begin[partition] = 0
                case Halted(reason, fresh):
                    if state is None:
                        begin[partition] = 0
                    if fresh:
                        halts[partition] = reason
                    if partition not in self._halted:
                        log.critical("partition halted", extra={"partition": partition, "reason": reason})
                    self._halted[partition] = reason
                case _:
                    assert state is not None
                    placed[partition] = state
        if begin:
            states = self._warehouse.open_partitions(topic_id, begin)
            placed |= {p: states[p] for p in begin if p not in halts and not states[p].halted}
        for partition, reason in halts.items():
            self._warehouse.halt(partition, states[partition].generation, reason)
        self._unplaced -= self._halted.keys()
        return placed

    def _log_range(self, consumer: Consumer, partition: int) -> tuple[int, int]:
        try:
            found = consumer.get_watermark_offsets(
                TopicPartition(self._topic, partition), timeout=_BROKER_TIMEOUT_S, cached=False
            )
        except KafkaException as error:
            raise translate(error.args[0]) from error
        if found is None:
            raise BrokerUnavailable("the brokers did not say what the log holds")
        return found

    # -- loading

    def _begin_load(self, loads: ThreadPoolExecutor) -> None:
        memory = sum(buffer.memory_bytes for buffer in self._buffers.values())
        units = [unit for _, buffer in sorted(self._buffers.items()) if (unit := buffer.take()) is not None]
        batch = Batch(tuple(units), tuple(self._undecodable), memory)
        self._undecodable = []
        self._loading = (batch, loads.submit(self._load_until_done, batch))

    def _load_until_done(self, batch: Batch) -> list[Outcome] | None:
        """The outcomes; None when the loader was stopped or the topic replaced before there were any."""
        attempt = 0
        began = self._clock()
        while True:
            try:
                outcomes = self._load.run(batch)
            except TopicReplaced:
                return None
            except (StorageError, BrokerError) as error:
                # Also what is not retriable: an operator can mend it, and skipping is not an option.
                attempt += 1
                pause = min(self._config.retry_s, 0.1 * 2 ** min(attempt, 16)) * random.uniform(0.5, 1.0)
                self._trouble = f"loading fails: {error}"
                self._metrics.count("atlasco_loader_retries")
                log.warning("load failed", extra={"attempt": attempt, "error": str(error), "pause_s": round(pause, 2)})
                if self._stop.wait(pause):
                    return None
                continue
            self._trouble = None
            self._metrics.observe("atlasco_loader_load_duration_seconds", self._clock() - began)
            return outcomes

    def _finish(self, consumer: Consumer, *, wait: bool = False) -> None:
        """Take up the result of a load, if it is there."""
        if self._loading is None or not (wait or self._loading[1].done()):
            return
        batch, future = self._loading
        outcomes = future.result()
        self._loading = None
        if outcomes is None:
            # Begin again from what the warehouse says.
            for unit in batch.units:
                if unit.partition in self._buffers:
                    self._drop(unit.partition)
                    self._unplaced.add(unit.partition)
            return
        committed = []
        for unit, outcome in zip(batch.units, outcomes, strict=True):
            buffer = self._buffers.get(unit.partition)
            if unit.partition in self._wanted:
                self._wanted[unit.partition] = outcome.state.next_offset
            if outcome.loaded:
                if buffer is not None:
                    committed.append(TopicPartition(self._topic, unit.partition, unit.end))
            elif buffer is not None:
                log.info(
                    "another loader was first",
                    extra={"partition": unit.partition, "next_offset": outcome.state.next_offset},
                )
                self._drop(unit.partition)
                self._unplaced.add(unit.partition)
        self._commit_offsets(consumer, committed)

    def _commit_offsets(self, consumer: Consumer, offsets: list[TopicPartition]) -> None:
        """Tell Kafka, for those who watch the group's lag; nothing of ours depends on it."""
        if not offsets:
            return
        try:
            consumer.commit(offsets=offsets, asynchronous=False)
            self._at("offsets-committed")
        except KafkaException as error:
            log.info("kafka's offsets were not committed", extra={"error": str(error.args[0])})


def _bytes(value: Any) -> bytes | None:
    return value.encode() if isinstance(value, str) else value
