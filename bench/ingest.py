"""Acked readings per second through a gateway, and the account of every one of them."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from bench.cpu import cpu_seconds
from bench.devices import DeviceProcess, Spec
from bench.errors import BenchmarkVoid
from bench.stack import Gateway, Stack
from bench.workload import Shape


@dataclass(frozen=True, slots=True)
class Ingested:
    """One measured span."""

    readings_per_s: float
    # CPU seconds per million acked readings.
    gateway_cpu_s: float
    client_cpu_s: float
    postgres_cpu_s: float
    # Of the slowest process of devices.
    ack_p50_ms: float
    ack_p99_ms: float
    # Of the whole run, warm-up and flush included.
    stored: int
    readings_per_transaction: float
    # Of the measured span, on `time.perf_counter`, which the programs of one machine share.
    began_at: float
    ended_at: float


@dataclass(frozen=True, slots=True)
class Load:
    """What the devices do; see `devices.Spec`."""

    shape: Shape
    devices: int
    messages_out: int
    warm_up_s: float
    measured_s: float
    interval_s: float = 0.0
    processes: int = 1

    def specs(self, target: str) -> Iterator[Spec]:
        """The devices, split over the processes."""
        for number in range(self.processes):
            first = self.devices * number // self.processes
            end = self.devices * (number + 1) // self.processes
            yield Spec(
                target=target,
                first_device=first,
                devices=end - first,
                readings_per_message=self.shape.readings_per_message,
                messages_out=self.messages_out,
                warm_up_s=self.warm_up_s,
                measured_s=self.measured_s,
                interval_s=self.interval_s,
            )


def full_speed(readings_per_message: int, warm_up_s: float, measured_s: float, processes: int) -> Load:
    """A fleet that sends as fast as acks come."""
    shape = Shape(readings_per_message)
    return Load(shape, shape.devices, shape.messages_out, warm_up_s, measured_s, processes=processes)


def measure_ingest(stack: Stack, database: str, load: Load) -> Ingested:
    """Run the load through a gateway of its own.

    Raises BenchmarkVoid when anything that was acked is not stored, or anything was rejected.
    """
    with stack.gateway(database) as gateway:
        return _measure(stack, gateway, database, load)


def _measure(stack: Stack, gateway: Gateway, database: str, load: Load) -> Ingested:
    with _devices(load, gateway.target) as processes:
        for process in processes:
            process.go()
        starts = [process.wait("from") for process in processes]
        before = _cpu(stack, gateway, processes)
        ends = [process.wait("to") for process in processes]
        after = _cpu(stack, gateway, processes)
        done = [process.wait("done") for process in processes]
    acked = sum(end["acked"] - start["acked"] for start, end in zip(starts, ends, strict=True))
    if not acked:
        raise BenchmarkVoid("nothing was acked in the measured span")
    rates = [
        (end["acked"] - start["acked"]) / (end["at"] - start["at"]) for start, end in zip(starts, ends, strict=True)
    ]
    stored, per_transaction = _verify(stack, database, done)
    gateway_cpu, client_cpu, postgres_cpu = (
        (later - earlier) / acked * 1e6 for earlier, later in zip(before, after, strict=True)
    )
    return Ingested(
        readings_per_s=sum(rates),
        gateway_cpu_s=gateway_cpu,
        client_cpu_s=client_cpu,
        postgres_cpu_s=postgres_cpu,
        ack_p50_ms=max(end["p50_ms"] for end in ends),
        ack_p99_ms=max(end["p99_ms"] for end in ends),
        stored=stored,
        readings_per_transaction=per_transaction,
        began_at=min(start["at"] for start in starts),
        ended_at=max(end["at"] for end in ends),
    )


@contextmanager
def _devices(load: Load, target: str) -> Iterator[list[DeviceProcess]]:
    with ExitStack() as exits:
        processes = [exits.enter_context(DeviceProcess(spec)) for spec in load.specs(target)]
        for process in processes:
            process.wait("ready")
        yield processes


def _cpu(stack: Stack, gateway: Gateway, processes: list[DeviceProcess]) -> tuple[float, float, float]:
    clients = sum(cpu_seconds(process.pid) for process in processes)
    return cpu_seconds(gateway.pid), clients, cpu_seconds(stack.postgres_pid)


def _verify(stack: Stack, database: str, done: list[Mapping[str, Any]]) -> tuple[int, float]:
    """Count every device's rows against its acks: every reading had a key of its own, so the numbers are equal."""
    acked: dict[str, int] = {}
    for told in done:
        acked |= told["acked"]
        if told["rejected"]:
            raise BenchmarkVoid(f"{told['rejected']} readings were rejected")
    with stack.admin(database) as connection:
        rows = connection.execute(
            "SELECT e.external_id, count(*) FROM entity_attributes a JOIN entities e USING (tenant_id, entity_id)"
            " GROUP BY 1"
        ).fetchall()
        outbox = connection.execute("SELECT coalesce(sum(changes), 0), count(*) FROM outbox").fetchone()
    stored = {name: int(count) for name, count in rows}
    wrong = {name: (count, stored.get(name, 0)) for name, count in acked.items() if stored.get(name, 0) != count}
    if wrong:
        raise BenchmarkVoid(f"acked and stored readings differ, by device: {wrong}")
    assert outbox is not None
    total = sum(stored.values())
    if int(outbox[0]) != total:
        raise BenchmarkVoid(f"{total} readings are stored and {outbox[0]} changes are in the outbox")
    return total, total / int(outbox[1])
