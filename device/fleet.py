"""A fleet of simulated devices in one process, each with a client and a ledger of its own."""

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from device.buffer import Buffer
from device.client import DeviceClient
from device.connection import ChannelPool, DevelopmentIdentity, TlsFiles
from device.errors import FlushTimeoutError
from device.latency import LatencyHistogram
from device.ledger import Ledger
from device.outcomes import Rejected, Statistics
from device.settings import ClientSettings
from device.simulated import FaultRates, SimulatedDevice

# At full speed the simulated clock ticks on its own, ahead of the real one; it starts this far behind, so that its
# readings stay inside the clock window.
_HEAD_START_US = 3_600_000_000
_FULL_SPEED_TICK_US = 200


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """What to simulate; durations in seconds.

    `rate` is readings per second and device, None as fast as acks come. A device gathers its readings for
    `message_interval_s`, or until it has about `readings_per_message`. `start_us` (default: now) is the time of the
    first readings. Every `disconnect_every_s` a share of the devices lose their connection with messages out.
    """

    target: str
    tenant: str = "demo"
    service: str = "simulator"
    tls: TlsFiles | None = None
    devices: int = 100
    duration_s: float | None = 60.0
    rate: float | None = 10.0
    connections: int = 1
    seed: int = 1
    readings_per_message: int = 100
    message_interval_s: float = 1.0
    faults: FaultRates = field(default_factory=FaultRates)
    disconnect_every_s: float | None = None
    disconnect_share: float = 0.1
    keep_ledgers: bool = True
    flush_deadline_s: float = 30.0
    start_us: int | None = None
    client: ClientSettings = field(
        default_factory=lambda: ClientSettings(backoff_base_s=0.05, backoff_cap_s=5.0, close_deadline_s=0.0)
    )


@dataclass(frozen=True, slots=True)
class FleetStatistics:
    """What the fleet has done so far. Everything counts readings unless it says otherwise; see Statistics."""

    devices: int
    sent: int
    resent: int
    acked: int
    rejected: int
    rejected_by_reason: Mapping[str, int]
    messages_acked: int
    unacked: int
    reconnects: int
    throttled: int
    readings_per_s: float
    # NaN until something is acked.
    ack_p50_ms: float
    ack_p99_ms: float
    seconds: float


class _Member:
    """One device of the fleet, with its client."""

    def __init__(self, device: SimulatedDevice, client: DeviceClient, ledger: Ledger) -> None:
        self.device = device
        self.client = client
        self.ledger = ledger
        self.drop_next = False


class Fleet:
    """Simulates for `duration_s`, or until `stop`, then waits for the last acks. Used once.

    The ledgers and the statistics stay readable afterwards.
    """

    def __init__(self, config: FleetConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self._clock = clock
        self._latency = LatencyHistogram()
        self._members: list[_Member] = []
        self._reasons: Counter[str] = Counter()
        self._rng = random.Random(config.seed)
        self._started = self._ended = 0.0
        self._stopping = False

    # -- running ------------------------------------------------------------------------------------------------

    async def run(self) -> FleetStatistics:
        """Run to the end; returns the final statistics. `unacked` is not 0 when the last acks did not come.

        Raises the permanent error of any of the clients (an ExceptionGroup where several differ).
        """
        config = self.config
        self._stop = asyncio.Event()
        if self._stopping:
            self._stop.set()
        self._started = self._clock()
        start_us = config.start_us if config.start_us is not None else time.time_ns() // 1000
        async with ChannelPool(config.target, connections=config.connections, tls=config.tls) as pool:
            self._members = [self._member(index, pool) for index in range(config.devices)]
            try:
                for member in self._members:
                    await member.client.open()
                await self._simulate(start_us)
                await self._flush()
            finally:
                self._ended = self._clock()
                for member in self._members:
                    await member.client.close()
        return self.statistics()

    async def _simulate(self, start_us: int) -> None:
        async with asyncio.TaskGroup() as tasks:
            others = [tasks.create_task(self._end_in_time()), tasks.create_task(self._drill())]
            senders = [tasks.create_task(self._send(member, start_us)) for member in self._members]
            await self._stop.wait()
            # A sender may be waiting for room that no ack makes any more.
            await asyncio.wait(senders, timeout=self.config.flush_deadline_s)
            for task in (*others, *senders):
                task.cancel()

    def stop(self) -> None:
        """End the simulation now; `run` still waits for the last acks."""
        self._stopping = True
        if self._started:
            self._stop.set()

    def force_disconnects(self, share: float) -> None:
        """Have this share of the devices, at least one, lose its connection around its next message.

        For about every other device that message is lost on its way, and is sent again for certain; for the rest it was
        written, and the gateway may have it or not: the ack is what is lost.
        """
        count = min(len(self._members), max(1, round(share * len(self._members))))
        for member in self._rng.sample(self._members, count):
            if self._rng.random() < 0.5:
                member.client.disconnect(with_next_message=True)
            else:
                member.drop_next = True

    def _member(self, index: int, pool: ChannelPool) -> _Member:
        config = self.config
        device = SimulatedDevice(index, seed=config.seed, faults=config.faults)
        ledger = Ledger(device.device_id, device.dictionary)
        client = DeviceClient(
            device_id=device.device_id,
            channel=pool.channel(device.device_id),
            identity=None if config.tls else DevelopmentIdentity(config.tenant, service=config.service),
            entity_type=device.kind.name,
            labels=device.labels,
            attributes=device.kind.attributes,
            # At full speed a deep buffer only adds to the time until the ack.
            buffer=Buffer(max_messages=16 if config.rate is None else 256, max_bytes=4 * 1024 * 1024),
            settings=config.client,
            on_rejections=lambda rejected: self._note_rejected(member, rejected),
            on_acked=ledger.acked,
            latency=self._latency,
            clock=self._clock,
            rng=random.Random(config.seed * 1_000_003 + index),
        )
        member = _Member(device, client, ledger)
        return member

    def _note_rejected(self, member: _Member, rejected: Sequence[Rejected]) -> None:
        member.ledger.rejected(rejected)
        for one in rejected:
            self._reasons[one.reason] += one.count

    async def _end_in_time(self) -> None:
        if self.config.duration_s is not None:
            await asyncio.sleep(self.config.duration_s)
            self._stop.set()

    async def _drill(self) -> None:
        while self.config.disconnect_every_s is not None:
            await asyncio.sleep(self.config.disconnect_every_s)
            self.force_disconnects(self.config.disconnect_share)

    async def _send(self, member: _Member, start_us: int) -> None:
        config = self.config
        width = len(member.device.kind.attributes)
        ticks, tick_us = cadence(config, width)
        now_us = start_us - (_HEAD_START_US if config.rate is None else 0)
        # Devices were not all switched on in the same instant.
        due = self._started + (self._rng.random() * ticks * tick_us / 1e6 if config.rate is not None else 0.0)
        while not self._stop.is_set():
            if config.rate is None:
                await asyncio.sleep(0)
            elif not await self._wait_until(due):
                return
            times_us = now_us + tick_us * np.arange(ticks, dtype=np.int64)
            now_us += ticks * tick_us
            due += ticks * tick_us / 1e6
            for packed in member.device.messages(times_us, member.client.limits):
                [ticket] = await member.client.send_packed([packed])
                if config.keep_ledgers:
                    member.ledger.sent(ticket, packed)
            if member.drop_next and member.client.messages_out:
                member.drop_next = False
                member.client.disconnect()

    async def _wait_until(self, due: float) -> bool:
        """False when the simulation ends before."""
        delay = due - self._clock()
        if delay <= 0:
            return True
        try:
            async with asyncio.timeout(delay):
                await self._stop.wait()
        except TimeoutError:
            return True
        return False

    async def _flush(self) -> None:
        deadline = self._clock() + self.config.flush_deadline_s
        for member in self._members:
            try:
                await member.client.flush(max(0.0, deadline - self._clock()))
            except FlushTimeoutError:
                # Told by `unacked`; the other devices may well be done.
                continue

    # -- looking ------------------------------------------------------------------------------------------------

    def ledgers(self) -> Mapping[str, Ledger]:
        """Every device's ledger, by device id."""
        return {member.device.device_id: member.ledger for member in self._members}

    def statistics(self) -> FleetStatistics:
        """A snapshot."""
        total = Counter[str]()
        for member in self._members:
            each: Statistics = member.client.statistics()
            total["sent"] += each.sent_readings
            total["resent"] += each.resent_readings
            total["acked"] += each.acked_readings
            total["rejected"] += each.rejected_readings
            total["messages"] += each.acked_messages
            total["unacked"] += each.buffered_readings
            total["reconnects"] += each.reconnects
            total["throttled"] += each.throttled
        seconds = (self._ended or self._clock()) - self._started if self._started else 0.0
        return FleetStatistics(
            devices=len(self._members),
            sent=total["sent"],
            resent=total["resent"],
            acked=total["acked"],
            rejected=total["rejected"],
            rejected_by_reason=dict(sorted(self._reasons.items())),
            messages_acked=total["messages"],
            unacked=total["unacked"],
            reconnects=total["reconnects"],
            throttled=total["throttled"],
            readings_per_s=total["acked"] / seconds if seconds > 0 else 0.0,
            ack_p50_ms=self._latency.percentile(50) * 1000,
            ack_p99_ms=self._latency.percentile(99) * 1000,
            seconds=seconds,
        )


def cadence(config: FleetConfig, attributes: int) -> tuple[int, int]:
    """(samples per message, microseconds between samples) of a device with so many attributes."""
    most = max(1, config.readings_per_message // attributes)
    if config.rate is None:
        return most, _FULL_SPEED_TICK_US
    tick_us = max(1, round(attributes / config.rate * 1e6))
    wanted = math.floor(config.message_interval_s * 1e6 / tick_us)
    return max(1, min(most, wanted)), tick_us


def perfect(config: FleetConfig) -> FleetConfig:
    """The same fleet in a world without faults."""
    return replace(config, faults=FaultRates(0, 0, 0, 0, 0, 0), disconnect_every_s=None)
