"""`atlasco replay`: stream a text file of measurements as the devices in it would."""

import argparse
import asyncio
import dataclasses
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cli.argument_types import label
from device.connection import TlsFiles
from device.dictionary import ValueType
from device.errors import DeviceError
from device.outcomes import Rejected
from device.replay.errors import ReplayError, StalledError
from device.replay.layout import Layout, ReplayOptions, Survey, survey
from device.replay.run import Replay, ReplaySettings

DESCRIPTION = """\
Stream a CSV or whitespace-separated file as the devices in it would: every row is a device at a time, every other
column an attribute. Waits until each reading is acked, that is durable, or rejected with a reason.
"""

EPILOG = """\
examples:
  The turbofan form: no header, blanks between columns, a cycle number instead of a time. Engine 1's cycle 5 is
  stored at start + 5 x period:

    atlasco replay train_FD001.txt \\
      --columns unit,cycle,setting1,setting2,setting3,s1,s2,s3,s4,s5,s6,s7,s8,s9,s10,s11,s12,s13,s14,s15,s16,s17,\\
s18,s19,s20,s21 --device-column unit --cycle-column cycle --period 1h --start 2026-01-01T00:00:00Z \\
      --entity-type turbofan

  One station, date and time in two columns, decimal commas, -200 for "no value":

    atlasco replay AirQuality.csv --device station-1 --decimal , --null -200 \\
      --time-column Date --time-column Time --time-format '%d/%m/%Y %H.%M.%S'

times:
  ISO 8601, or a number since 1970 in s, ms, us or ns (told apart by size), or --time-format as for strptime. A time
  without a zone is UTC. Readings must lie in the tenant's clock window; --historical leaves latest values alone.

types:
  A column is int64 when all its numbers are written as integers and fit 64 bits, double for other numbers (100.0 is
  a double, so are integers beyond 64 bits, with a warning), bool for true and false, else string. The majority of its
  cells decides; a cell that does not fit is reported with its line and rejected alone. --type COLUMN=TYPE overrides.

result:
  The last line is one JSON object: rows, blank_rows, devices, sent, acked, rejected (by reason), nulls, resent,
  unacked, seconds. sent, acked, nulls, resent and unacked count readings. Reasons that begin with ROW_ count rows.
  Exit code 0 when every reading was acked or rejected with a reason, and not all were rejected.
"""

# Per reason; the counts in the closing line are complete.
_MOST_REPORTS = 1000
_MOST_REJECTION_REPORTS = 20
_PLAIN_INTERVAL_S = 5.0


def add_parser(subparsers: Any) -> None:
    """Add `replay` to the command line."""
    parser = subparsers.add_parser(
        "replay",
        help="stream a file as devices would",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    columns = parser.add_argument_group("what the columns mean (by name, or by number from 1)")
    columns.add_argument("--device-column", metavar="COLUMN", help="names the device of each row")
    columns.add_argument("--device", metavar="NAME", help="the one device of the file")
    columns.add_argument(
        "--time-column",
        action="append",
        default=[],
        metavar="COLUMN",
        help="the time; repeat it for a time in several columns, which are joined by a blank",
    )
    columns.add_argument("--time-format", metavar="FORMAT", help="as for strptime, e.g. '%%d/%%m/%%Y %%H:%%M'")
    columns.add_argument("--cycle-column", metavar="COLUMN", help="a count; the time is start + count x period")
    columns.add_argument("--period", metavar="DURATION", help="e.g. 1h, 15m, 30s, 250ms; needs --cycle-column")
    columns.add_argument("--start", metavar="TIME", help="the time of cycle 0; needs --cycle-column")
    columns.add_argument("--columns", metavar="A,B,…", help="the columns' names, for a file without a header")
    columns.add_argument(
        "--type",
        action="append",
        default=[],
        metavar="COLUMN=TYPE",
        help="double, int64, bool or string, instead of what the file suggests; repeatable",
    )
    text = parser.add_argument_group("how the file is written")
    text.add_argument("--separator", metavar="CHAR", help="one character, tab or whitespace (default: sniffed)")
    text.add_argument("--decimal", choices=[".", ","], default=".", help="the decimal mark (default: .)")
    text.add_argument(
        "--null",
        action="append",
        default=[],
        metavar="MARKER",
        help="a cell that means no value, such as -200 (also matches -200.0) or NA; repeatable; the empty cell "
        "always does",
    )
    sending = parser.add_argument_group("how it is sent")
    sending.add_argument("--target", default=os.environ.get("ATLASCO_TARGET", "127.0.0.1:7070"), metavar="HOST:PORT")
    sending.add_argument("--tenant", default=os.environ.get("ATLASCO_TENANT", "demo"))
    sending.add_argument("--ca", type=Path, metavar="FILE", help="mutual TLS: the roots to check the server against")
    sending.add_argument("--cert", type=Path, metavar="FILE", help="mutual TLS: the client's certificate")
    sending.add_argument("--key", type=Path, metavar="FILE", help="mutual TLS: the certificate's key")
    sending.add_argument("--connections", type=int, default=1, metavar="N", help="HTTP/2 connections (default: 1)")
    sending.add_argument(
        "--speed", default="max", metavar="N", help="N times real time, or max: as fast as acked (default)"
    )
    sending.add_argument("--historical", action="store_true", help="back-fill: latest values do not move")
    sending.add_argument("--entity-type", default="", metavar="TYPE", help="the kind of device, at first sight")
    at_first = "at first sight; repeatable"
    sending.add_argument("--label", action="append", default=[], type=label, metavar="KEY=VALUE", help=at_first)
    sending.add_argument(
        "--give-up-after", type=float, default=60.0, metavar="SECONDS", help="without any ack (default: 60)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Replay the file; returns the exit code."""
    console = Console(stderr=True, highlight=False)
    try:
        options = parse_options(arguments)
        settings = parse_settings(arguments)
        layout = Layout(options)
        found = _survey(layout, settings, console)
    except (ReplayError, ValueError) as error:
        print(f"atlasco replay: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"atlasco replay: {arguments.file}: {error.strerror}", file=sys.stderr)
        return 2
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return asyncio.run(_send(layout, found, settings, console))


def parse_options(arguments: argparse.Namespace) -> ReplayOptions:
    """What the arguments say about the file. Raises ReplayError."""
    types = {}
    for pair in arguments.type:
        column, _, name = pair.rpartition("=")
        if not column or name.upper() not in ValueType.__members__:
            raise ReplayError(f"--type {pair}: write COLUMN=TYPE with double, int64, bool or string")
        types[column] = ValueType[name.upper()]
    return ReplayOptions(
        path=arguments.file,
        device_column=arguments.device_column,
        device=arguments.device,
        time_columns=arguments.time_column,
        time_format=arguments.time_format,
        cycle_column=arguments.cycle_column,
        period=arguments.period,
        start=arguments.start,
        columns=arguments.columns.split(",") if arguments.columns else (),
        nulls=arguments.null,
        separator=arguments.separator,
        decimal=arguments.decimal,
        types=types,
    )


def parse_settings(arguments: argparse.Namespace) -> ReplaySettings:
    """What the arguments say about the sending. Raises ReplayError."""
    files = (arguments.ca, arguments.cert, arguments.key)
    if any(files) and not all(files):
        raise ReplayError("mutual TLS needs --ca, --cert and --key")
    try:
        speed = None if arguments.speed == "max" else float(arguments.speed)
    except ValueError:
        speed = 0.0
    if speed is not None and not 0 < speed < float("inf"):
        raise ReplayError("--speed is max or a number above 0")
    if arguments.connections < 1:
        raise ReplayError("--connections must be at least 1")
    if arguments.give_up_after <= 0:
        raise ReplayError("--give-up-after must be above 0")
    return ReplaySettings(
        target=arguments.target,
        tenant=arguments.tenant,
        tls=TlsFiles(*files) if all(files) else None,
        connections=arguments.connections,
        speed=speed,
        historical=arguments.historical,
        entity_type=arguments.entity_type,
        labels=dict(arguments.label),
        give_up_s=arguments.give_up_after,
    )


def _survey(layout: Layout, settings: ReplaySettings, console: Console) -> Survey:
    with _Progress(console, "reading", None) as progress:
        found = survey(layout, paced=settings.speed is not None, note_row=progress.at)
    if not found.columns:
        raise ReplayError("every cell of every column is null: there is nothing to send")
    return found


async def _send(layout: Layout, found: Survey, settings: ReplaySettings, console: Console) -> int:
    reports: Counter[str] = Counter()

    def report(reason: str, most: int, text: Callable[[], str]) -> None:
        reports[reason] += 1
        if reports[reason] <= most:
            console.print(text(), markup=False, soft_wrap=True)
        elif reports[reason] == most + 1:
            console.print(f"… more {reason}: counted in the closing line", markup=False)

    def problem(line: int, reason: str, text: str) -> None:
        report(reason, _MOST_REPORTS, lambda: f"line {line}: {reason}: {text}")

    def rejected(device: str, rejections: Sequence[Rejected]) -> None:
        for one in rejections:
            where = f"{one.reading.attribute} at {one.reading.time_us}" if one.reading else "a reading"
            report(
                one.reason,
                _MOST_REJECTION_REPORTS,
                lambda one=one, where=where: f"device {device}: {one.reason}: {where}: {one.text}",  # type: ignore[misc]
            )

    replay = Replay(layout, found, settings, on_problem=problem, on_rejected=rejected)
    exit_code = 0
    with _Progress(console, "sending", found.rows) as progress:
        try:
            async with asyncio.TaskGroup() as tasks:
                watch = tasks.create_task(_show(replay, progress))
                try:
                    await replay.run()
                except StalledError as error:
                    console.print(f"atlasco replay: {error} ({settings.target})", markup=False)
                    exit_code = 1 if error.ever_acked else 3
                except (DeviceError, OSError) as error:
                    console.print(f"atlasco replay: {error}", markup=False)
                    exit_code = 1
                finally:
                    watch.cancel()
        finally:
            result = replay.result()
            progress.at(result.rows)
    print(json.dumps(dataclasses.asdict(result)))
    if exit_code == 0 and (result.unacked or (result.acked == 0 and result.rejected)):
        exit_code = 1
    return exit_code


async def _show(replay: Replay, progress: "_Progress") -> None:
    while True:
        await asyncio.sleep(0.25)
        result = replay.result()
        progress.at(result.rows, f"{result.acked:,} readings acked")


class _Progress:
    """A bar on a terminal, else a plain line every few seconds, on standard error."""

    def __init__(self, console: Console, verb: str, total: int | None) -> None:
        self._console = console
        self._verb = verb
        self._total = total
        self._next_line = time.monotonic() + _PLAIN_INTERVAL_S
        self._bar: Progress | None = None

    def __enter__(self) -> "_Progress":
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn(f"{self._verb} rows"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=self._total)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def at(self, rows: int, text: str = "") -> None:
        """So many rows are done."""
        if self._bar is not None:
            # Drawing is rate-limited by rich; telling it of every row is not free.
            if rows % 1000 == 0 or text:
                self._bar.update(self._task, completed=rows, description=text)
        elif (now := time.monotonic()) >= self._next_line:
            self._next_line = now + _PLAIN_INTERVAL_S
            of = f" of {self._total:,}" if self._total else ""
            print(f"{self._verb}: {rows:,}{of} rows {text}".rstrip(), file=sys.stderr)
