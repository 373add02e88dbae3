"""Memory per idle device stream."""

from dataclasses import dataclass

from bench.cpu import resident_bytes
from bench.devices import DeviceProcess, Spec
from bench.stack import Stack

# Opened before, so that what the first streams alone cost is not counted.
_FIRST = 50


@dataclass(frozen=True, slots=True)
class Idle:
    """What idle streams cost the gateway."""

    streams: int
    rss_kib_per_stream: float
    gateway_rss_mib: float


def measure_idle(stack: Stack, database: str, streams: int) -> Idle:
    """Connect devices that say hello and nothing else."""
    with stack.gateway(database) as gateway, DeviceProcess(_silent(gateway.target, 0, _FIRST)) as first:
        first.wait("ready")
        before = resident_bytes(gateway.pid)
        with DeviceProcess(_silent(gateway.target, _FIRST, streams)) as process:
            process.wait("ready")
            after = resident_bytes(gateway.pid)
    return Idle(streams, (after - before) / streams / 1024, after / 1024**2)


def _silent(target: str, first: int, devices: int) -> Spec:
    return Spec(
        target=target,
        first_device=first,
        devices=devices,
        readings_per_message=100,
        messages_out=2,
        warm_up_s=0,
        measured_s=0,
        interval_s=None,
    )
