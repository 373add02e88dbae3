"""`atlasco demo`: everything on this machine, with simulated devices and an audit at the end."""

import argparse
import asyncio
import json
import math
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from demo.audit import Audit, WarehouseLate, audit, primary_clock, wait_until_loaded
from demo.questions import QueryFigures, Questions
from demo.stack import Stack
from demo.view import show
from device.errors import DeviceError
from device.fleet import Fleet, FleetConfig, FleetStatistics
from embedded.errors import EmbeddedError, ProcessFailed
from embedded.ports import is_free
from storage.errors import StorageError

TENANT = "demo"
_LOAD_DEADLINE_S = 120.0
# The one in every example of the README.
_USUAL_PORT = 7070

DESCRIPTION = """\
Start PostgreSQL with a streaming replica, Kafka, a gateway, the rollup worker, and the relay and the loader of a local
warehouse on this machine, simulate a fleet of devices, cut some of their connections on purpose, ask questions at every
tier of freshness, and show what happens. At the end, compare what the devices know was acked with what is stored in
PostgreSQL and in the warehouse, reading by reading.

Kafka needs Java 17 and, the first time, Maven (apt-get install openjdk-17-jre-headless maven); without them the demo
says so and runs ingest, rollups and queries alone.
"""

EPILOG = """\
result:
  The last line is one JSON object. sent, resent, acked, rejected, stored and loaded count readings, published changes;
  lost counts acked readings that are not in the database and the warehouse with their value, duplicated counts changes
  and warehouse rows beyond one for each reading. answers counts answers by tier and source, unanswered refusals by
  tier and reason; dishonest counts, of the answers that were checked, those that lacked what they claimed to hold: what
  was acked before a CRITICAL question, what was committed before the answer's as_of, or the tier's bound on its age.
  Exit code 0 when nothing was lost, duplicated or dishonest, something was sent again, and each tier had answers.

examples:
  atlasco demo                                    until Ctrl-C
  atlasco demo --duration 20 --devices 200        ends by itself
"""


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "demo",
        help="everything on this machine, with simulated devices",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--duration", type=float, metavar="SECONDS", help="default: until Ctrl-C")
    parser.add_argument("--devices", type=int, default=100, metavar="N", help="default: 100")
    parser.add_argument("--rate", type=float, default=10.0, metavar="R", help="readings per second and device")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="equal seeds simulate equal fleets")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("ATLASCO_DATA_DIR", "atlasco-data")),
        metavar="DIR",
        help="where the embedded database lives; kept for the next time (default: $ATLASCO_DATA_DIR or atlasco-data)",
    )
    parser.add_argument(
        "--dsn", default=os.environ.get("ATLASCO_DSN", ""), metavar="DSN", help="a PostgreSQL of your own instead"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; returns the exit code."""
    if arguments.devices < 1 or arguments.rate <= 0 or (arguments.duration is not None and arguments.duration <= 0):
        print("atlasco demo: --devices, --rate and --duration must be above 0", file=sys.stderr)
        return 2
    _heed_sigterm()
    try:
        port = _USUAL_PORT if is_free(_USUAL_PORT) else None
        with Stack(arguments.data_dir.resolve(), dsn=arguments.dsn, port=port, progress=_progress) as stack:
            since = primary_clock(stack.dsn)
            fleet = Fleet(_fleet_config(arguments, stack.target))
            _progress(f"{arguments.devices} devices stream to {stack.target}")
            questions = Questions(stack.target, TENANT, progress=_progress)
            asyncio.run(_simulate(fleet, stack, questions))
            # Asyncio has put the default back, which would leave everything that was started behind.
            _heed_sigterm()
            warehouse = stack.pipeline.warehouse if stack.pipeline else None
            if warehouse is not None:
                _progress("waiting until the warehouse has everything")
                wait_until_loaded(stack.dsn, warehouse, deadline_s=_LOAD_DEADLINE_S)
            asyncio.run(questions.ask_once())
            _progress("comparing what was acked with what is stored, reading by reading")
            found = audit(stack.dsn, TENANT, fleet.ledgers(), since=since, warehouse=warehouse)
            statistics, asked = fleet.statistics(), questions.figures()
    except WarehouseLate as error:
        print(f"atlasco demo: {error}", file=sys.stderr)
        return 1
    except (EmbeddedError, StorageError) as error:
        print(f"atlasco demo: {error}", file=sys.stderr)
        return 3
    if asked.problem:
        _progress(f"the last trouble with queries: {asked.problem}")
    print(json.dumps(closing(statistics, found, asked)))
    return exit_code(statistics, found, asked)


def exit_code(statistics: FleetStatistics, found: Audit, asked: QueryFigures) -> int:
    """0 when the demo showed what it promises.

    Nothing was lost or duplicated although messages were sent again, and every tier answered, and honestly.
    """
    is_broken = found.lost > 0 or found.duplicated > 0 or asked.dishonest > 0 or statistics.unacked > 0
    showed_all = statistics.resent > 0 and all(tier.answers for tier in asked.tiers.values())
    return int(is_broken or not showed_all)


def closing(statistics: FleetStatistics, found: Audit, asked: QueryFigures) -> dict[str, Any]:
    """The closing JSON object."""
    return {
        "sent": statistics.sent,
        "resent": statistics.resent,
        "acked": statistics.acked,
        "rejected": statistics.rejected,
        "unacked": statistics.unacked,
        "stored": found.stored,
        "published": found.published,
        "loaded": found.loaded,
        "lost": found.lost,
        "duplicated": found.duplicated,
        "readings_per_s": round(statistics.readings_per_s, 1),
        "ack_p50_ms": _finite(statistics.ack_p50_ms),
        "ack_p99_ms": _finite(statistics.ack_p99_ms),
        "answers": {tier: dict(figures.answers) for tier, figures in asked.tiers.items()},
        "unanswered": {tier: dict(reasons) for tier, reasons in asked.unanswered.items()},
        "checked": asked.checked,
        "dishonest": asked.dishonest,
    }


def _finite(value: float) -> float | None:
    """JSON has no NaN, which is what a percentile of nothing is."""
    return round(value, 1) if math.isfinite(value) else None


def _fleet_config(arguments: argparse.Namespace, target: str) -> FleetConfig:
    duration = arguments.duration
    return FleetConfig(
        target=target,
        tenant=TENANT,
        devices=arguments.devices,
        duration_s=duration,
        rate=arguments.rate,
        seed=arguments.seed,
        connections=2,
        # Several rounds, however short the run: cutting a connection shows something only when a message is out.
        disconnect_every_s=min(5.0, duration / 8) if duration else 5.0,
    )


async def _simulate(fleet: Fleet, stack: Stack, questions: Questions) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, fleet.stop)
    try:
        async with asyncio.TaskGroup() as tasks:
            others = [tasks.create_task(show(fleet, stack, questions)), tasks.create_task(questions.run())]
            try:
                await fleet.run()
            finally:
                for task in others:
                    task.cancel()
    except* (DeviceError, ProcessFailed) as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise ProcessFailed(str(first)) from group
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _heed_sigterm() -> None:
    """From here on SIGTERM ends the demo as Ctrl-C does: what was started is stopped, in order."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def _progress(text: str) -> None:
    print(f"· {text}", file=sys.stderr, flush=True)
