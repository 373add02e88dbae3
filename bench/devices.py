"""The devices, a process of their own: `python -m bench.devices SPEC`, and the side that starts it.

The process prints one JSON line per event: `ready` when every device was welcomed; after a line on its standard
input, `from` and `to` at the edges of the measured span; `done` when everything it sent is acked. It ends when its
standard input ends.
"""

import asyncio
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bench.dialogue import Dialogue
from bench.errors import BenchmarkVoid
from bench.workload import ENTITY_TYPE, TENANT, Messages, Shape, device_name
from device import Buffer, ChannelPool, ClientSettings, DevelopmentIdentity, DeviceClient
from device.latency import LatencyHistogram
from device.packing import PackingLimits

# Behind the clock: a fleet that sends as fast as it can outruns it.
_BEHIND_US = 3_600_000_000
_FLUSH_S = 60.0
_OPEN_S = 120.0


@dataclass(frozen=True, slots=True)
class Spec:
    """What a process of devices does."""

    target: str
    first_device: int
    devices: int
    readings_per_message: int
    # Messages that each device may have out.
    messages_out: int
    warm_up_s: float
    measured_s: float
    # Seconds between two messages of a device; 0: as fast as acks come; None: says hello and nothing else.
    interval_s: float | None = 0.0
    connections: int = 2


# -- the process ------------------------------------------------------------------------------------------------------


class _Devices:
    def __init__(self, spec: Spec, pool: ChannelPool) -> None:
        self._spec = spec
        self._shape = Shape(spec.readings_per_message)
        self._stopping = False
        self._start_us = time.time_ns() // 1000 - _BEHIND_US
        self._indices = range(spec.first_device, spec.first_device + spec.devices)
        self.rejected = 0
        self.clients = [self._client(device_name(index), pool) for index in self._indices]

    def _client(self, name: str, pool: ChannelPool) -> DeviceClient:
        return DeviceClient(
            device_id=name,
            channel=pool.channel(name),
            identity=DevelopmentIdentity(TENANT, service="bench"),
            entity_type=ENTITY_TYPE,
            attributes=self._shape.attributes,
            buffer=Buffer(max_messages=self._spec.messages_out),
            settings=ClientSettings(backoff_base_s=0.05, backoff_cap_s=2.0),
            on_rejections=lambda told: self._note_rejected(sum(one.count for one in told)),
        )

    def _note_rejected(self, readings: int) -> None:
        self.rejected += readings

    @property
    def acked(self) -> int:
        return sum(client.statistics().acked_readings for client in self.clients)

    async def open(self) -> None:
        """Connect one after the other, as a crowd that was not switched on in the same instant."""
        async with asyncio.timeout(_OPEN_S):
            for client in self.clients:
                await client.open()
                await asyncio.sleep(0.0005)
            for client in self.clients:
                # The client does not tell when Welcome comes; it takes over the gateway's limits then, and those
                # differ from what it assumes before.
                while client.limits == PackingLimits():  # noqa: ASYNC110
                    await asyncio.sleep(0.005)

    async def send(self, client: DeviceClient, index: int) -> None:
        messages = Messages(self._shape, index, self._start_us)
        interval = self._spec.interval_s or 0.0
        # Spread over the interval, as clocks of devices are.
        due = time.perf_counter() + interval * (index - self._spec.first_device) / self._spec.devices
        while not self._stopping:
            if interval:
                await asyncio.sleep(due - time.perf_counter())
                due += interval
            await client.send_columns(**messages.next_columns())

    async def measure(self) -> None:
        spec = self._spec
        async with asyncio.TaskGroup() as group:
            if spec.interval_s is not None:
                for client, index in zip(self.clients, self._indices, strict=True):
                    group.create_task(self.send(client, index))
            await asyncio.sleep(spec.warm_up_s)
            latency = LatencyHistogram()
            for client in self.clients:
                client.latency = latency
            _tell("from", at=time.perf_counter(), acked=self.acked)
            await asyncio.sleep(spec.measured_s)
            _tell(
                "to",
                at=time.perf_counter(),
                acked=self.acked,
                p50_ms=latency.percentile(50) * 1000 if latency.count else None,
                p99_ms=latency.percentile(99) * 1000 if latency.count else None,
                messages=latency.count,
            )
            self._stopping = True
        for client in self.clients:
            await client.flush(_FLUSH_S)
        acked = {client.device_id: client.statistics().acked_readings for client in self.clients}
        _tell("done", acked=acked, rejected=self.rejected)


async def _main(spec: Spec) -> None:
    async with ChannelPool(spec.target, connections=spec.connections) as pool:
        devices = _Devices(spec, pool)
        await devices.open()
        _tell("ready")
        if await asyncio.to_thread(sys.stdin.readline):
            await devices.measure()
            await asyncio.to_thread(sys.stdin.readline)
        for client in devices.clients:
            await client.close()


def _tell(event: str, **values: Any) -> None:
    print(json.dumps({"event": event, **values}), flush=True)


# -- the side that starts it ------------------------------------------------------------------------------------------


class DeviceProcess(Dialogue):
    """A process of devices; ended when the block is left."""

    def __init__(self, spec: Spec) -> None:
        super().__init__("bench.devices", json.dumps(asdict(spec)))

    def go(self) -> None:
        """Let it send."""
        self.tell("go")

    def wait(self, event: str) -> Mapping[str, Any]:
        """What it says with its next event, which must be this one. Raises BenchmarkVoid."""
        told = self.hear()
        if told is None:
            raise BenchmarkVoid(f"the devices ended before they were {event!r}")
        if told["event"] != event:
            raise BenchmarkVoid(f"the devices were to say {event!r} and said {told['event']!r}")
        return told


if __name__ == "__main__":
    asyncio.run(_main(Spec(**json.loads(sys.argv[1]))))
