"""How long queries take: the same questions through a gateway and as bare statements, in turns.

Turns, because the machine's noise changes from one minute to the next: it then meets both. Where a shorter history is
compared, its gateway takes a turn too.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.bare_sql import BareSql, Statements
from bench.cpu import cpu_seconds, machine_cpu_seconds
from bench.errors import BenchmarkVoid
from bench.query_cases import Case
from bench.query_load import QueryLoad, Span
from bench.stack import Gateway, Stack

# Of the questions in one turn of the bare statements: how many are written down, and played again and again.
_RECORDED = 2
_CHECKED = 5


@dataclass(frozen=True, slots=True)
class Turns:
    """How often each takes its turn, and for how long."""

    rounds: int
    # Of the gateway's, seconds.
    span_s: float
    # Questions in each of the bare statements' turns.
    bare: int
    # Before the first, seconds.
    warm_up_s: float


@dataclass(slots=True)
class Latencies:
    """What one side of a comparison took, all its turns together. Milliseconds."""

    times: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    p99_by_round: list[float] = field(default_factory=list)
    # What everything else on the machine kept busy in each turn.
    cores_of_others: list[float] = field(default_factory=list)

    def add(self, span: Span, cores_of_others: float = 0.0) -> None:
        """Take in a turn of a gateway."""
        self.times += span.latencies_ms
        self.late += span.late_ms
        self.failed.update(span.failed)
        self.seconds += span.seconds
        self.p99_by_round.append(percentile(span.latencies_ms, 99))
        self.cores_of_others.append(cores_of_others)

    @property
    def answered_per_s(self) -> float:
        """Answers per second of load."""
        return len(self.times) / self.seconds


@dataclass(frozen=True, slots=True)
class Measured:
    """One case, measured. CPU seconds are for a thousand requests."""

    gateway: Latencies
    # Empty where a case has no bare statements.
    bare: Sequence[float]
    # The shorter history's gateway, at the same questions; None where there is none.
    shorter: Latencies | None
    gateway_cpu_s: float
    postgres_cpu_s: float


@dataclass(frozen=True, slots=True)
class Side:
    """A gateway on a database, and the case as it is asked there."""

    database: str
    gateway: Gateway
    case: Case


def measure(stack: Stack, load: QueryLoad, side: Side, turns: Turns, shorter: Side | None = None) -> Measured:
    """Measure one case.

    Raises BenchmarkVoid when an answer is not what the case is about, or none came.
    """
    rng = random.Random(17)
    sides = [side] if shorter is None else [side, shorter]
    for one in sides:
        _span(load, one, rng, turns.warm_up_s)
    asked = [side.case.make(rng).ask for _ in range(_RECORDED * turns.bare)]
    asks = [ask for ask in asked if ask is not None]
    latencies, bare = [Latencies() for _ in sides], []
    gateway_cpu = postgres_cpu = 0.0
    with BareSql(stack, side.database) as bare_sql:
        recordings: list[Statements] = bare_sql.record(asks) if asks else []
        bare_sql.play(recordings)
        for _ in range(turns.rounds):
            for place, one in enumerate(sides):
                pids = [each.gateway.pid for each in sides] + [stack.postgres_pid, load.pid]
                before = [cpu_seconds(pid) for pid in pids], machine_cpu_seconds()
                span = _span(load, one, rng, turns.span_s)
                spent = [cpu_seconds(pid) - was for pid, was in zip(pids, before[0], strict=True)]
                # A virtual machine's own counters lag behind those of its processes now and then.
                others = max(0.0, machine_cpu_seconds() - before[1] - sum(spent))
                latencies[place].add(span, others / span.seconds)
                if place == 0:
                    gateway_cpu += spent[0]
                    postgres_cpu += spent[-2]
            if recordings:
                bare += bare_sql.play([rng.choice(recordings) for _ in range(turns.bare)])
    thousands = len(latencies[0].times) / 1000
    if not thousands:
        raise BenchmarkVoid(f"{side.case.measure}, {side.case.case}: no request was answered: {latencies[0].failed}")
    return Measured(
        latencies[0],
        bare,
        None if shorter is None else latencies[1],
        gateway_cpu / thousands,
        postgres_cpu / thousands,
    )


def percentile(times: Sequence[float], percent: float) -> float:
    """The time that `percent` of them do not exceed; infinite when there are none."""
    return float(np.percentile(times, percent, method="higher")) if times else float("inf")


def _span(load: QueryLoad, side: Side, rng: random.Random, seconds: float) -> Span:
    case = side.case
    count = max(_CHECKED, round(case.rate * seconds))
    requests = [case.make(rng).request for _ in range(count)]
    span = load.span(side.gateway.target, case.method, requests, case.rate, keep=_CHECKED)
    for answer in span.answers:
        case.check(answer)
    return span
