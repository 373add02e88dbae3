"""`python -m bench`: one JSON line per measure on standard output, progress on standard error.

Ends with 1, and says why, when a figure would be worth nothing: acked readings are missing from the database, or
the server does not write what it acknowledges to disk.
"""

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from bench.drain import LOAD_FLOOR, RELAY_FLOOR, measure_load, measure_relay
from bench.errors import BenchmarkVoid
from bench.fan_out import KafkaMissing, fan_out, running_kafka
from bench.idle import measure_idle
from bench.ingest import Ingested, Load, full_speed, measure_ingest
from bench.micro import measure_parts
from bench.queries import measure_queries
from bench.query_run import query_lines
from bench.raw import Replayed, Transaction, build_transactions, replay
from bench.sizes import SIZES, Size
from bench.stack import Stack
from bench.together import measure_together
from bench.workload import Shape
from embedded.errors import ProcessFailed
from embedded.kafka import EmbeddedKafka

_CONNECTIONS = (1, 2, 4)
_PACKAGES = ("grpcio", "protobuf", "psycopg", "numpy")
_DATABASE, _REPLAYED = "bench_ingest_run", "bench_raw_run"
# Readings per message of the moderate load.
_LATENCY_MESSAGE = 10
FAN_OUT_MEASURES = ("relay_drain", "load_drain", "together")
# Of what is offered; less is a backlog too, at the devices.
_KEPT_UP = 0.97


@dataclass(frozen=True, slots=True)
class Options:
    """What to run."""

    size: Size
    processes: int
    # Where the histories of the queries are kept.
    histories: Path
    started: float

    def say(self, text: str) -> None:
        """Progress."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", file=sys.stderr, flush=True)


def emit(measure: str, **values: Any) -> None:
    """One line of the result."""
    rounded = {name: _rounded(value) for name, value in values.items()}
    print(json.dumps({"measure": measure, **rounded}), flush=True)


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return round(value) if abs(value) >= 1_000 else float(f"{value:.4g}")


# -- the measures -----------------------------------------------------------------------------------------------------


def run_parts(stack: Stack, options: Options) -> None:
    """Decode, arrange, copy_rows, encode_outbox."""
    for timing in measure_parts(options.size.micro_messages, options.size.micro_repeats):
        emit(**asdict(timing))


def run_ingest(stack: Stack, options: Options) -> None:
    """Ingest and raw limit in turns, so that a noisy neighbour meets both; queries on what the last one left."""
    for readings_per_message, rounds in options.size.rounds.items():
        results = []
        for number in range(rounds):
            options.say(f"ingest, {readings_per_message} readings per message, round {number + 1} of {rounds}")
            results.append(_round(stack, options, readings_per_message, ask=readings_per_message == 100 and not number))
        _emit_rounds(readings_per_message, results)


def _round(stack: Stack, options: Options, readings_per_message: int, *, ask: bool) -> tuple[Ingested, list[Replayed]]:
    size = options.size
    load = full_speed(readings_per_message, size.warm_up_s, size.measured_s, options.processes)
    with stack.fresh_database(_DATABASE) as database:
        ingested = measure_ingest(stack, database, load)
        options.say(f"  {ingested.readings_per_s:,.0f} readings/s, {ingested.stored:,} stored and found")
        if ask:
            options.say("  queries")
            with stack.gateway(database) as gateway:
                for times in asyncio.run(measure_queries(gateway.target, load.shape, size.queries)):
                    emit(**asdict(times))
        transactions = build_transactions(stack, database)
    return ingested, [_replay(stack, options, transactions, connections) for connections in _CONNECTIONS]


def _replay(stack: Stack, options: Options, transactions: list[Transaction], connections: int) -> Replayed:
    with stack.fresh_database(_REPLAYED) as database:
        replayed = replay(stack, database, transactions, connections)
    options.say(f"  raw limit, {connections} connections: {replayed.readings_per_s:,.0f} readings/s")
    return replayed


def _emit_rounds(readings_per_message: int, rounds: list[tuple[Ingested, list[Replayed]]]) -> None:
    best = [max(replays, key=lambda one: one.readings_per_s) for _, replays in rounds]
    emit(
        "raw_limit",
        readings_per_message=readings_per_message,
        readings_per_s=median(one.readings_per_s for one in best),
        rounds=[round(one.readings_per_s) for one in best],
        **{
            f"connections_{connections}": median(replays[position].readings_per_s for _, replays in rounds)
            for position, connections in enumerate(_CONNECTIONS)
        },
        client_cpu_s_per_million=median(one.client_cpu_s for one in best),
        postgres_cpu_s_per_million=median(one.postgres_cpu_s for one in best),
    )
    ratios = [ingested.readings_per_s / limit.readings_per_s for (ingested, _), limit in zip(rounds, best, strict=True)]
    runs = [ingested for ingested, _ in rounds]
    emit(
        "ingest",
        readings_per_message=readings_per_message,
        readings_per_s=median(run.readings_per_s for run in runs),
        raw_limit_per_s=median(one.readings_per_s for one in best),
        ratio=median(ratios),
        ratio_of_best=max(run.readings_per_s for run in runs) / max(one.readings_per_s for one in best),
        gateway_cpu_s_per_million=median(run.gateway_cpu_s for run in runs),
        client_cpu_s_per_million=median(run.client_cpu_s for run in runs),
        postgres_cpu_s_per_million=median(run.postgres_cpu_s for run in runs),
        ack_p50_ms=median(run.ack_p50_ms for run in runs),
        ack_p99_ms=median(run.ack_p99_ms for run in runs),
        readings_per_transaction=median(run.readings_per_transaction for run in runs),
        rounds=[round(run.readings_per_s) for run in runs],
        ratios=[round(ratio, 3) for ratio in ratios],
    )


def run_latency(stack: Stack, options: Options) -> None:
    """Time to the ack at a load far below the limit."""
    size = options.size
    load = Load(
        Shape(_LATENCY_MESSAGE),
        devices=size.latency_devices,
        messages_out=64,
        warm_up_s=max(size.warm_up_s, 1.0),
        measured_s=size.latency_s,
        interval_s=size.latency_devices * _LATENCY_MESSAGE / size.latency_readings_per_s,
        processes=options.processes,
    )
    options.say(f"ack latency at {size.latency_readings_per_s:,} readings/s of {size.latency_devices} devices")
    with stack.fresh_database(_DATABASE) as database:
        result = measure_ingest(stack, database, load)
    emit(
        "ack_latency",
        devices=size.latency_devices,
        readings_per_message=_LATENCY_MESSAGE,
        readings_per_s=result.readings_per_s,
        ack_p50_ms=result.ack_p50_ms,
        ack_p99_ms=result.ack_p99_ms,
    )


def run_idle(stack: Stack, options: Options) -> None:
    """Memory of streams on which nothing happens."""
    options.say(f"{options.size.idle_streams} idle streams")
    with stack.fresh_database(_DATABASE) as database:
        emit("idle_streams", **asdict(measure_idle(stack, database, options.size.idle_streams)))


def run_fan_out(stack: Stack, options: Options) -> None:
    """Drain a backlog to Kafka and into the warehouse, then everything at once; without Kafka, say so."""
    options.say("starting Kafka")
    try:
        with running_kafka(stack.directory) as kafka:
            for readings_per_message in options.size.drained_messages:
                _drain(stack, options, kafka, readings_per_message)
            for readings_per_message in options.size.together_messages:
                _together(stack, options, kafka, readings_per_message)
    except KafkaMissing as error:
        options.say(f"the fan-out is not measured, for there is no Kafka: {error}")
        for measure in FAN_OUT_MEASURES:
            emit(measure, skipped=str(error))


def _drain(stack: Stack, options: Options, kafka: EmbeddedKafka, readings_per_message: int) -> None:
    size = options.size
    load = full_speed(readings_per_message, size.warm_up_s, size.measured_s, options.processes)
    options.say(f"a backlog, {readings_per_message} readings per message")
    with (
        stack.fresh_database(_DATABASE) as database,
        fan_out(stack, kafka, database, f"bench.drain.{readings_per_message}") as behind,
    ):
        ingested = measure_ingest(stack, database, load)
        options.say(f"  {ingested.stored:,} readings, ingested at {ingested.readings_per_s:,.0f} readings/s")
        drained = measure_relay(behind, ingested.stored)
        options.say(f"  published at {drained.readings_per_s:,.0f} readings/s")
        ratio = drained.readings_per_s / ingested.readings_per_s
        emit(
            "relay_drain",
            readings_per_message=readings_per_message,
            readings=drained.readings,
            readings_per_s=drained.readings_per_s,
            ingest_per_s=ingested.readings_per_s,
            ratio=ratio,
            floor=RELAY_FLOOR,
            met=ratio >= RELAY_FLOOR,
            cores_of_others=drained.cores_of_others,
            **_cpu_fields(drained.cpu_s),
        )
        loaded = measure_load(behind, ingested.stored)
        options.say(f"  loaded at {loaded.readings_per_s:,.0f} readings/s, and compared")
        emit(
            "load_drain",
            readings_per_message=readings_per_message,
            readings=loaded.readings,
            readings_per_s=loaded.readings_per_s,
            floor=LOAD_FLOOR,
            met=loaded.readings_per_s >= LOAD_FLOOR,
            cores_of_others=loaded.cores_of_others,
            **_cpu_fields(loaded.cpu_s),
        )


def _together(stack: Stack, options: Options, kafka: EmbeddedKafka, readings_per_message: int) -> None:
    size = options.size
    offered = size.together_readings_per_s
    load = Load(
        Shape(readings_per_message),
        devices=size.together_devices,
        messages_out=64,
        warm_up_s=max(size.warm_up_s, 1.0),
        measured_s=size.together_s,
        interval_s=size.together_devices * readings_per_message / offered,
        processes=options.processes,
    )
    options.say(f"everything together at {offered:,} readings/s, {readings_per_message} per message")
    with (
        stack.fresh_database(_DATABASE) as database,
        fan_out(stack, kafka, database, f"bench.together.{readings_per_message}") as behind,
    ):
        result = measure_together(behind, load)
    ingested = result.ingested
    options.say(f"  the warehouse holds all {ingested.stored:,} readings")
    emit(
        "together",
        readings_per_message=readings_per_message,
        offered_per_s=offered,
        readings_per_s=ingested.readings_per_s,
        outbox_batches=[round(batches) for batches in result.outbox_batches],
        outbox_oldest_s=[round(seconds, 3) for seconds in result.outbox_oldest_s],
        grows=result.grows,
        met=not result.grows and ingested.readings_per_s >= _KEPT_UP * offered,
        warehouse_behind_p50_s=result.behind_p50_s,
        warehouse_behind_max_s=result.behind_max_s,
        ack_p50_ms=ingested.ack_p50_ms,
        ack_p99_ms=ingested.ack_p99_ms,
        loaded=ingested.stored,
        gateway_cpu_s_per_million=ingested.gateway_cpu_s,
        client_cpu_s_per_million=ingested.client_cpu_s,
        postgres_cpu_s_per_million=ingested.postgres_cpu_s,
        **_cpu_fields(result.cpu_s),
    )


def _cpu_fields(cpu_s: Mapping[str, float]) -> dict[str, float]:
    return {f"{name}_cpu_s_per_million": seconds for name, seconds in cpu_s.items()}


def run_queries(stack: Stack, options: Options) -> None:
    """Queries on long histories, which are on a server of their own."""
    for measure, fields in query_lines(options.histories, options.size.query, options.say):
        emit(measure, **fields)


MEASURES: dict[str, Callable[[Stack, Options], None]] = {
    "parts": run_parts,
    "ingest": run_ingest,
    "latency": run_latency,
    "idle": run_idle,
    "fan_out": run_fan_out,
    "queries": run_queries,
}


# -- the command ------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="quick" if os.environ.get("QUICK", "") not in {"", "0"} else "full",
        help="full takes about 25 minutes, quick (also QUICK=1) five; tiny only shows that everything works",
    )
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", help="the same as --size quick")
    parser.add_argument("--only", action="append", choices=MEASURES, help="run this part; may be given more than once")
    parser.add_argument("--device-processes", type=int, default=1, help="processes that the devices run in")
    parser.add_argument(
        "--history-directory",
        type=Path,
        default=Path("var/bench"),
        help="where the histories that queries are measured on are built, once, and kept; var/bench by default",
    )
    parser.add_argument("--readings", type=_count, help="of the long history, such as 10M; by default the size's own")
    parser.add_argument("--directory", type=Path, help="where PostgreSQL keeps its data; by default a temporary one")
    return parser


def _count(text: str) -> int:
    """A number with an optional K or M behind it."""
    factor = {"K": 1_000, "M": 1_000_000}.get(text[-1:].upper())
    return int(text) if factor is None else int(text[:-1]) * factor


def _options(arguments: argparse.Namespace) -> Options:
    size = SIZES[arguments.size]
    if arguments.readings:
        size = replace(size, query=replace(size.query, readings=arguments.readings))
    return Options(size, arguments.device_processes, arguments.history_directory, time.monotonic())


@contextmanager
def _directory(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="atlasco-bench-") as made:
        yield Path(made)


def main() -> int:
    """Run the benchmark."""
    arguments = _parser().parse_args()
    options = _options(arguments)
    try:
        with _directory(arguments.directory) as directory:
            options.say("starting PostgreSQL")
            with Stack(directory) as stack:
                emit(
                    "run",
                    size=arguments.size,
                    cores=len(os.sched_getaffinity(0)),
                    machine=platform.machine(),
                    python=platform.python_version(),
                    **{name: version(name) for name in _PACKAGES},
                    postgres=stack.settings(),
                )
                asyncio.run(stack.prepare())
                for name in arguments.only or MEASURES:
                    MEASURES[name](stack, options)
            options.say("done")
    except (BenchmarkVoid, ProcessFailed) as error:
        print(f"void: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
