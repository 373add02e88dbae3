"""How fast a backlog goes from the outbox to Kafka, and from Kafka to the warehouse, with ingest stopped."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.cpu import cpu_seconds, machine_cpu_seconds
from bench.errors import BenchmarkVoid
from bench.fan_out import FanOut, pid_of
from embedded.program import Program

RELAY_FLOOR = 1.5
"""Draining over ingesting, of the same run: below it a backlog is not caught up with in reasonable time."""
LOAD_FLOOR = 300_000
"""Readings per second into a local warehouse on two cores."""

_MACHINE = "machine"
_LOOK_S = 0.05
# Without any progress.
_STALLED_S = 60.0


@dataclass(frozen=True, slots=True)
class Drained:
    """One backlog carried one step on."""

    readings: int
    readings_per_s: float
    # CPU seconds per million readings, by program.
    cpu_s: Mapping[str, float]
    # Cores that everything else on the machine kept busy meanwhile, this program included.
    cores_of_others: float


def measure_relay(fan_out: FanOut, readings: int) -> Drained:
    """Have a relay publish a backlog, from when it takes the lanes until Kafka has confirmed everything.

    Raises BenchmarkVoid when the cursor does not cover exactly the backlog afterwards.
    """
    with fan_out.relay() as relay:
        drained = _watch(
            relay,
            {"relay": relay.pid, "kafka": pid_of(fan_out.kafka), "postgres": fan_out.stack.postgres_pid},
            readings,
            begun=lambda metrics: metrics.get("atlasco_relay_lanes_held", 0) > 0,
            done=lambda metrics: metrics.get("atlasco_relay_changes_published_total", 0),
        )
        # A page is counted before the cursor moves past it.
        deadline = time.monotonic() + _STALLED_S
        while (published := fan_out.published()) != readings:
            if time.monotonic() > deadline:
                raise BenchmarkVoid(f"{readings} readings were to be published, {published} are")
            time.sleep(_LOOK_S)
    return drained


def measure_load(fan_out: FanOut, readings: int) -> Drained:
    """Have a loader load what is in the topic, from the first record it takes until the last load is committed.

    Raises BenchmarkVoid when the warehouse does not hold exactly what PostgreSQL does afterwards.
    """
    with fan_out.loader() as loader:
        drained = _watch(
            loader,
            {"loader": loader.pid, "kafka": pid_of(fan_out.kafka), "postgres": fan_out.stack.postgres_pid},
            readings,
            begun=lambda metrics: metrics.get("atlasco_loader_records_total", 0) > 0,
            done=lambda metrics: metrics.get("atlasco_loader_readings_loaded_total", 0),
        )
    fan_out.verify(readings)
    return drained


def _watch(
    process: Program,
    pids: Mapping[str, int],
    readings: int,
    *,
    begun: Callable[[Mapping[str, float]], bool],
    done: Callable[[Mapping[str, float]], float],
) -> Drained:
    """The span begins when the last look was asked for that saw no work, so rather too early than too late."""
    started_at, started_cpu = time.perf_counter(), _cpu(pids)
    working, seen, seen_at = False, (False, 0.0), started_at
    while True:
        at, cpu = time.perf_counter(), _cpu(pids)
        metrics = process.metrics()
        working = working or begun(metrics)
        if not working:
            started_at, started_cpu = at, cpu
        if done(metrics) >= readings:
            seconds = time.perf_counter() - started_at
            ended_cpu = _cpu(pids)
            if done(metrics) > readings:
                raise BenchmarkVoid(f"{readings} readings were ingested and {done(metrics):.0f} drained")
            spent = {name: ended_cpu[name] - started_cpu[name] for name in ended_cpu}
            others = (spent[_MACHINE] - sum(spent[name] for name in pids)) / seconds
            per_million = {name: spent[name] / readings * 1e6 for name in pids}
            return Drained(readings, readings / seconds, per_million, others)
        if seen != (working, done(metrics)):
            seen, seen_at = (working, done(metrics)), at
        if at - seen_at > _STALLED_S:
            raise BenchmarkVoid(f"after {seen[1]:.0f} of {readings} readings there was no progress")
        process.check()
        time.sleep(_LOOK_S)


def _cpu(pids: Mapping[str, int]) -> dict[str, float]:
    return {name: cpu_seconds(pid) for name, pid in pids.items()} | {_MACHINE: machine_cpu_seconds()}
