"""The query part of the benchmark: which databases, which cases, and what a result says of each."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

from bench.fleet import Fleet
from bench.history import History
from bench.kept import Kept, Say, kept_databases, warm
from bench.query_cases import Case, aggregate_cases, find_cases, history_cases
from bench.query_load import QueryLoad
from bench.query_measures import Latencies, Measured, Side, Turns, measure, percentile
from bench.sizes import QuerySize
from bench.stack import Stack

GROWTH_LIMIT = 1.5
"""How much slower a query may be on ten times the readings."""

# Of what is offered; a server that answers less is behind, whatever its latencies say.
_KEPT_UP = 0.97

Line: TypeAlias = tuple[str, dict[str, Any]]


def query_lines(directory: Path, size: QuerySize, say: Say) -> Iterator[Line]:
    """Build what is missing below `directory`, measure, and tell each result as it is there.

    Raises BenchmarkVoid when an answer is not what was asked for.
    """
    longer, shorter = History(size.readings, size.devices), History(size.readings // 10, size.devices)
    fleet = Fleet(size.fleet)
    turns = Turns(size.rounds, size.span_s, size.bare, size.warm_up_s)
    with kept_databases(directory, [longer, shorter, fleet], say) as (stack, kept), QueryLoad() as load:
        stack.settings()
        gib = warm(stack, [one.content.database for one in kept]) / 2**30
        say(f"{gib:.1f} GiB of data are in memory")
        yield (
            "query_data",
            {
                "readings": longer.readings,
                "shorter_readings": shorter.readings,
                "devices": longer.devices,
                "fleet": fleet.devices,
                "gib": gib,
                "build_s": {one.content.database: one.facts["build_s"] for one in kept},
            },
        )
        yield from _of_history(stack, load, kept[0], kept[1], size, turns, say)
        yield from _of_fleet(stack, load, fleet.database, size, turns, say)


def _of_history(
    stack: Stack, load: QueryLoad, longer: Kept, shorter: Kept, size: QuerySize, turns: Turns, say: Say
) -> Iterator[Line]:
    database = longer.content.database
    with ExitStack() as running:
        gateways = [running.enter_context(stack.gateway(one.content.database)) for one in (longer, shorter)]
        cases = [history_cases(one, size.latest_per_s, size.dashboard_per_s) for one in (longer, shorter)]
        for case, same in zip(*cases, strict=True):
            say(f"{case.measure}, {case.case}")
            measured = measure(
                stack,
                load,
                Side(database, gateways[0], case),
                turns,
                Side(shorter.content.database, gateways[1], same),
            )
            yield case.measure, _fields(case, measured)
            yield "growth", _growth_fields(case, measured)
        with stack.rollup(database):
            for case in aggregate_cases(longer, size.aggregate_per_s):
                say(f"{case.measure}, {case.case}")
                yield case.measure, _fields(case, measure(stack, load, Side(database, gateways[0], case), turns))


def _of_fleet(stack: Stack, load: QueryLoad, database: str, size: QuerySize, turns: Turns, say: Say) -> Iterator[Line]:
    with stack.rollup(database), stack.gateway(database) as gateway:
        say("find_entities: reading ahead to the later pages")
        for case in find_cases(gateway.target, size.find_per_s, size.later_pages):
            say(f"{case.measure}, {case.case}")
            yield case.measure, _fields(case, measure(stack, load, Side(database, gateway, case), turns))


def _fields(case: Case, measured: Measured) -> dict[str, Any]:
    told = measured.gateway
    p99_ms = percentile(told.times, 99)
    fields: dict[str, Any] = {
        "case": case.case,
        "requests": len(told.times),
        "offered_per_s": case.rate,
        "answered_per_s": told.answered_per_s,
        "failed": dict(told.failed),
        **_times(told),
        "p99_by_round_ms": [round(p99, 1) for p99 in told.p99_by_round],
        "p99_of_best_ms": min(told.p99_by_round),
        "late_p99_ms": percentile(told.late, 99),
        "gateway_cpu_s_per_1000": measured.gateway_cpu_s,
        "postgres_cpu_s_per_1000": measured.postgres_cpu_s,
        "cores_of_others": [round(cores, 2) for cores in told.cores_of_others],
    }
    if measured.bare:
        bare_p50, bare_p99 = (percentile(measured.bare, percent) for percent in (50, 99))
        fields |= {
            "bare_p50_ms": bare_p50,
            "bare_p99_ms": bare_p99,
            "ratio": percentile(told.times, 50) / bare_p50,
            "ratio_p99": p99_ms / bare_p99,
        }
    if case.limit_ms is not None:
        kept_up = told.answered_per_s >= _KEPT_UP * case.rate
        fields |= {"limit_ms": case.limit_ms, "met": p99_ms <= case.limit_ms and kept_up and not told.failed}
    return fields


def _growth_fields(case: Case, measured: Measured) -> dict[str, Any]:
    assert measured.shorter is not None
    longer, shorter = ([percentile(one.times, p) for p in (50, 99)] for one in (measured.gateway, measured.shorter))
    ratios = [long / short for long, short in zip(longer, shorter, strict=True)]
    return {
        "query": case.measure,
        "case": case.case,
        **_times(measured.gateway),
        **{f"shorter_{name}": value for name, value in _times(measured.shorter).items()},
        "ratio": ratios[0],
        "ratio_p99": ratios[1],
        "ratio_p99_of_best": min(measured.gateway.p99_by_round) / min(measured.shorter.p99_by_round),
        "limit": GROWTH_LIMIT,
        "met": max(ratios) <= GROWTH_LIMIT,
    }


def _times(told: Latencies) -> dict[str, float]:
    return {
        "p50_ms": percentile(told.times, 50),
        "p99_ms": percentile(told.times, 99),
        "max_ms": percentile(told.times, 100),
    }
