"""`atlasco maintain`: make history's partitions ahead, retire them behind, expire what has a term."""

import argparse
import asyncio
import dataclasses
import json
import signal
from dataclasses import dataclass
from datetime import datetime

from cli.argument_types import seconds
from cli.migrate import OwnerConfig, reporting_errors, say
from cli.tenant import print_table
from runtime.config import Kind, add_settings, duration, load_settings, positive_int, setting
from storage.errors import StorageError
from storage.maintenance import MaintenanceOptions, MaintenanceReport, maintain

EPILOG = """\
One run does everything once and ends: run it every hour, from cron or a CronJob, or let --every repeat it. It may be
stopped at any moment, and the next run goes on. Gateways and queries keep working meanwhile.

It never touches the outbox: what is there goes only when the warehouse has it.

exit codes besides the usual: 1 when something needs an operator (the report's "problems") or another run is at work.

examples:
  atlasco maintain --dsn postgresql://owner@db/telemetry
  atlasco maintain --every 1h --ahead 7d
  atlasco maintain --json | jq .outbox
"""


def _read_term(text: str) -> float:
    seconds = duration(text)
    if seconds < 3600:
        raise ValueError("too short")
    return seconds


_term = Kind(_read_term, "a duration of at least an hour, such as 30d", duration.write, "DURATION")


@dataclass(frozen=True)
class MaintainConfig(OwnerConfig):
    """Maintenance."""

    ahead_s: float = setting(
        "ATLASCO_AHEAD", 3 * 86400.0, "How far ahead of now partitions exist; at most 39d.", parse=_term
    )
    session_age_s: float = setting(
        "ATLASCO_SESSION_RETENTION",
        30 * 86400.0,
        "How long sessions, unconfirmed rejections and the ids of unary writes are remembered after their last use.",
        parse=_term,
    )
    dictionary_age_s: float = setting(
        "ATLASCO_DICTIONARY_RETENTION", 90 * 86400.0, "How long unused dictionaries are remembered.", parse=_term
    )
    lock_timeout_s: float = setting(
        "ATLASCO_MAINTAIN_LOCK_TIMEOUT",
        2.0,
        "How long a statement waits for a lock; whatever comes after it waits too.",
        parse=duration,
    )
    attempts: int = setting("ATLASCO_MAINTAIN_ATTEMPTS", 5, "How often a run tries to get a lock.", parse=positive_int)

    def __post_init__(self) -> None:
        self.options()

    def options(self) -> MaintenanceOptions:
        """What a run aims at. Raises ValueError when it is out of bounds."""
        return MaintenanceOptions(
            ahead_s=self.ahead_s,
            session_age_s=self.session_age_s,
            rejection_age_s=self.session_age_s,
            request_age_s=self.session_age_s,
            dictionary_age_s=self.dictionary_age_s,
            lock_timeout_s=self.lock_timeout_s,
            attempts=self.attempts,
        )


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `maintain`."""
    parser = subparsers.add_parser(
        "maintain",
        help="make partitions ahead, retire them behind, expire what has a term",
        description="Keep history within its bounds.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--every", metavar="DURATION", type=_every, help="repeat, until SIGTERM or Ctrl-C")
    parser.add_argument("--json", action="store_true", help="the report as one JSON object a run")
    add_settings(parser, MaintainConfig)
    parser.set_defaults(run=reporting_errors(_run))


def _every(text: str) -> float:
    every_s = seconds(text)
    if every_s <= 0:
        raise argparse.ArgumentTypeError("must be more than 0")
    return every_s


async def _run(arguments: argparse.Namespace) -> int:
    config = load_settings(MaintainConfig, arguments)
    if arguments.every is None:
        return await _once(config, as_json=arguments.json)
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    while not stopped.is_set():
        try:
            await _once(config, as_json=arguments.json)
        except StorageError as error:
            # A database that is away for a while is no reason to give up for good.
            say(f"atlasco: this run failed, the next is in {duration.write(arguments.every)}: {error}")
        try:
            await asyncio.wait_for(stopped.wait(), arguments.every)
        except TimeoutError:
            continue
    return 0


async def _once(config: MaintainConfig, *, as_json: bool) -> int:
    report = await maintain(config.dsn, config.options(), progress=say)
    if as_json:
        print(json.dumps(dataclasses.asdict(report), default=_plain), flush=True)
    else:
        _print(report)
    return 1 if report.problems else 0


def _plain(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _print(report: MaintenanceReport) -> None:
    oldest = report.outbox.oldest
    print_table(
        ("what", "count"),
        [
            ("ranges of history made", report.ranges_made),
            ("outbox partitions made", report.outbox_partitions_made),
            ("ranges retired", len(report.ranges_retired)),
            ("tables dropped", report.tables_dropped),
            ("tables delayed by a lock", len(report.tables_delayed)),
            *((f"rows deleted: {table}", rows) for table, rows in report.deleted.items()),
            ("outbox bytes", report.outbox.bytes),
            ("outbox, oldest batch", "none" if oldest is None else oldest.isoformat(timespec="seconds")),
        ],
    )
    print()
    print_table(
        ("table", "rows, estimated", "bytes", "partitions"),
        [(size.table, size.rows, size.bytes, size.partitions) for size in report.tables],
    )
    print(f"\ndone in {report.duration_s:.1f} s")
    for problem in report.problems:
        say(f"atlasco: {problem}")
