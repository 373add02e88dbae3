"""Everything at once at a moderate load: does the outbox stay short, and how fresh is the warehouse?"""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Self

import psycopg

from bench.cpu import cpu_seconds
from bench.errors import BenchmarkVoid
from bench.fan_out import FanOut, pid_of
from bench.ingest import Ingested, Load, measure_ingest
from embedded.program import Program
from storage.errors import StorageError
from storage.statements import statements
from storage.warehouse.port import Scope

_MEASURE_LANES = statements("relay.sql")["measure_lanes"]
_MOST_COUNTED = 20_000
_LOOK_S = 0.5
_LOADED_S = 60.0


@dataclass(frozen=True, slots=True)
class Together:
    """One run; what is listed is of the first, the middle and the last third of the measured span."""

    ingested: Ingested
    # Medians: batches committed and not yet in Kafka, and the age in seconds of the oldest.
    outbox_batches: Sequence[float]
    outbox_oldest_s: Sequence[float]
    grows: bool
    behind_p50_s: float
    behind_max_s: float
    # CPU seconds per million readings, by program.
    cpu_s: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Look:
    """How things stood at one moment; `at` is on `time.perf_counter`, times in seconds."""

    at: float
    batches: int
    oldest_s: float
    # How far back the moment is that the warehouse is complete through; None before it is known.
    behind_s: float | None
    cpu_s: Mapping[str, float] = field(default_factory=dict)


def measure_together(fan_out: FanOut, load: Load) -> Together:
    """Run the load with a relay and a loader at work, then wait until the loader has loaded it all.

    Raises BenchmarkVoid when it does not, or the warehouse does not hold exactly what PostgreSQL does.
    """
    with fan_out.relay() as relay, fan_out.loader() as loader:
        relay.wait_ready()
        loader.wait_ready()
        pids = {"relay": relay.pid, "kafka": pid_of(fan_out.kafka), "loader": loader.pid}
        with _Looks(fan_out, pids) as looks:
            ingested = measure_ingest(fan_out.stack, fan_out.database, load)
        _wait_loaded(loader, ingested.stored)
        relay.check()
        loader.check()
    fan_out.verify(ingested.stored)
    return _result(ingested, looks.between(ingested.began_at, ingested.ended_at))


def _wait_loaded(loader: Program, readings: int) -> None:
    # Not for the warehouse to be known as complete: without data that takes until the relay's next idle watermark.
    deadline = time.monotonic() + _LOADED_S
    while (loaded := loader.metrics().get("atlasco_loader_readings_loaded_total", 0)) < readings:
        if time.monotonic() > deadline:
            raise BenchmarkVoid(f"{_LOADED_S:.0f} s after the load {loaded:.0f} of {readings} readings are loaded")
        loader.check()
        time.sleep(0.1)


def _result(ingested: Ingested, looks: Sequence[Look]) -> Together:
    behind = sorted(look.behind_s for look in looks if look.behind_s is not None)
    if len(looks) < 3 or not behind:
        raise BenchmarkVoid(f"{len(looks)} looks at the outbox and {len(behind)} at the warehouse say nothing")
    thirds = [looks[len(looks) * third // 3 : len(looks) * (third + 1) // 3] for third in range(3)]
    batches = [median(look.batches for look in third) for third in thirds]
    seconds = looks[-1].at - looks[0].at
    readings = seconds * ingested.readings_per_s
    return Together(
        ingested,
        outbox_batches=batches,
        outbox_oldest_s=[median(look.oldest_s for look in third) for third in thirds],
        grows=grows(batches, ingested.readings_per_s / ingested.readings_per_transaction),
        behind_p50_s=median(behind),
        behind_max_s=behind[-1],
        cpu_s={name: (looks[-1].cpu_s[name] - looks[0].cpu_s[name]) / readings * 1e6 for name in looks[0].cpu_s},
    )


def grows(batches: Sequence[float], batches_per_s: float) -> bool:
    """Whether the backlog at the end is more than one second's batches above that at the start.

    Nearly all batches wait for some milliseconds, and a pause of the machine makes some hundred of them wait: neither
    is growth. A relay that is five per cent too slow shows within half a minute.
    """
    return batches[-1] - batches[0] > batches_per_s


class _Looks:
    """Looks at the outbox and the warehouse twice a second, in a thread of its own, for as long as the block lasts."""

    def __init__(self, fan_out: FanOut, pids: Mapping[str, int]) -> None:
        self._fan_out = fan_out
        self._pids = pids
        self._looks: list[Look] = []
        self._failure: Exception | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="looks")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def between(self, began_at: float, ended_at: float) -> list[Look]:
        """The looks of a span. Raises BenchmarkVoid when looking failed."""
        if self._failure is not None:
            raise BenchmarkVoid(f"the outbox and the warehouse could not be looked at: {self._failure!r}")
        return [look for look in self._looks if began_at <= look.at <= ended_at]

    def _run(self) -> None:
        try:
            with self._fan_out.stack.admin(self._fan_out.database) as connection:
                while not self._ending.wait(_LOOK_S):
                    self._looks.append(self._look(connection))
        except (psycopg.Error, StorageError, BenchmarkVoid) as error:
            self._failure = error

    def _look(self, connection: psycopg.Connection) -> Look:
        at = time.perf_counter()
        lanes = connection.execute(_MEASURE_LANES, {"most": _MOST_COUNTED}).fetchall()
        as_of_us = self._fan_out.warehouse.completeness(Scope()).as_of_us
        return Look(
            at,
            batches=sum(int(batches) for _, _, batches, _ in lanes),
            oldest_s=max((float(oldest) for _, oldest, _, _ in lanes), default=0.0),
            behind_s=None if as_of_us is None else time.time() - as_of_us / 1e6,
            cpu_s={name: cpu_seconds(pid) for name, pid in self._pids.items()},
        )
