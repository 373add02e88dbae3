"""`atlasco simulate`: a fleet of believable devices that stream to a gateway."""

import argparse
import asyncio
import dataclasses
import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from device.connection import TlsFiles
from device.errors import DeviceError
from device.fleet import Fleet, FleetConfig, FleetStatistics, perfect
from device.simulated import FaultRates

DESCRIPTION = """\
Simulate a fleet: cold-chain freezers, wind turbines, electricity meters and delivery vans, with attributes of all four
types, daily cycles, faults (stuck sensors, dropouts, spikes, wrong clocks) and now and then a reading that the gateway
must reject.
"""

EPILOG = """\
examples:
  atlasco simulate --devices 200 --duration 60                  ten readings per second and device, for a minute
  atlasco simulate --devices 100 --rate max --duration 30       as fast as the gateway acks
  atlasco simulate --duration 60 --disconnect-every 5           every 5 s a tenth of the fleet loses its connection

result:
  The last line is one JSON object; sent, resent, acked, rejected and unacked count readings.
  Exit code 0 when every reading was acked or rejected.
"""

_PLAIN_INTERVAL_S = 5.0


def add_parser(subparsers: Any) -> None:
    """Add `simulate` to the command line."""
    parser = subparsers.add_parser(
        "simulate",
        help="stream from a simulated fleet",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--target",
        default=os.environ.get("ATLASCO_TARGET", "127.0.0.1:7070"),
        metavar="HOST:PORT",
        help="the gateway (default: $ATLASCO_TARGET or 127.0.0.1:7070)",
    )
    parser.add_argument(
        "--tenant",
        default=os.environ.get("ATLASCO_TENANT", "demo"),
        help="with a development identity (default: $ATLASCO_TENANT or demo)",
    )
    parser.add_argument("--ca", type=Path, metavar="FILE", help="mutual TLS: the roots to check the server against")
    parser.add_argument("--cert", type=Path, metavar="FILE", help="mutual TLS: a service's certificate")
    parser.add_argument("--key", type=Path, metavar="FILE", help="mutual TLS: the certificate's key")
    parser.add_argument("--devices", type=int, default=100, metavar="N", help="default: 100")
    parser.add_argument("--duration", type=float, default=None, metavar="SECONDS", help="default: until interrupted")
    parser.add_argument(
        "--rate", default="10", metavar="R", help="readings per second and device, or max (default: 10)"
    )
    parser.add_argument("--connections", type=int, default=1, metavar="N", help="HTTP/2 connections (default: 1)")
    parser.add_argument("--readings-per-message", type=int, default=100, metavar="N", help="default: 100")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="equal seeds simulate equal fleets")
    parser.add_argument(
        "--disconnect-every", type=float, default=None, metavar="SECONDS", help="break connections on purpose"
    )
    parser.add_argument(
        "--disconnect-share", type=float, default=0.1, metavar="SHARE", help="of the devices (default: 0.1)"
    )
    parser.add_argument(
        "--corrections", type=float, default=0.0, metavar="SHARE", help="messages that correct a reading (default: 0)"
    )
    parser.add_argument("--perfect", action="store_true", help="no faults at all")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Simulate; returns the exit code."""
    try:
        config = parse_config(arguments)
    except ValueError as error:
        print(f"atlasco simulate: {error}", file=sys.stderr)
        return 2
    return asyncio.run(_simulate(config))


def parse_config(arguments: argparse.Namespace) -> FleetConfig:
    """The fleet the arguments describe. Raises ValueError."""
    rate = None if arguments.rate == "max" else _number("--rate", arguments.rate)
    for flag in ("devices", "connections", "readings_per_message"):
        if getattr(arguments, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least 1")
    for flag in ("duration", "disconnect_every"):
        if getattr(arguments, flag) is not None:
            _number(f"--{flag.replace('_', '-')}", getattr(arguments, flag))
    for flag in ("disconnect_share", "corrections"):
        if not 0 <= getattr(arguments, flag) <= 1:
            raise ValueError(f"--{flag.replace('_', '-')} is a share between 0 and 1")
    files = (arguments.ca, arguments.cert, arguments.key)
    if any(files) and not all(files):
        raise ValueError("mutual TLS needs --ca, --cert and --key")
    config = FleetConfig(
        target=arguments.target,
        tenant=arguments.tenant,
        tls=TlsFiles(*files) if all(files) else None,
        devices=arguments.devices,
        duration_s=arguments.duration,
        rate=rate,
        connections=arguments.connections,
        seed=arguments.seed,
        readings_per_message=arguments.readings_per_message,
        faults=FaultRates(corrected=arguments.corrections),
        disconnect_every_s=arguments.disconnect_every,
        disconnect_share=arguments.disconnect_share,
        # Nobody audits here, and a fleet may run for days.
        keep_ledgers=False,
    )
    return perfect(config) if arguments.perfect else config


def _number(flag: str, text: str | float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{flag} {text}: give a number above 0")
    return number


async def _simulate(config: FleetConfig) -> int:
    fleet = Fleet(config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, fleet.stop)
    failure = ""
    try:
        async with asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(_show(fleet, config))
            try:
                await fleet.run()
            finally:
                watch.cancel()
    except* DeviceError as group:
        failure = str(_first(group))
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    statistics = fleet.statistics()
    if failure:
        print(f"atlasco simulate: {failure}", file=sys.stderr)
    print(json.dumps(_json(statistics)))
    if failure or statistics.unacked:
        return 3 if not failure and not statistics.acked else 1
    return 0


def _json(statistics: FleetStatistics) -> dict[str, Any]:
    result = dataclasses.asdict(statistics)
    for name, value in result.items():
        if isinstance(value, float):
            # JSON has no NaN.
            result[name] = round(value, 3) if math.isfinite(value) else None
    return result


def _first(group: BaseExceptionGroup[DeviceError]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _show(fleet: Fleet, config: FleetConfig) -> None:
    """Progress on standard error: a table on a terminal, else a line every few seconds."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        while True:
            await asyncio.sleep(_PLAIN_INTERVAL_S)
            print(_line(fleet.statistics()), file=sys.stderr)
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        while True:
            live.update(_table(fleet.statistics(), config))
            await asyncio.sleep(0.5)


def _line(now: FleetStatistics) -> str:
    return (
        f"{now.seconds:.0f} s: {now.acked:,} readings acked ({now.readings_per_s:,.0f}/s), {now.unacked:,} unacked, "
        f"{now.rejected:,} rejected, {now.resent:,} resent, ack p50 {now.ack_p50_ms:.1f} ms p99 {now.ack_p99_ms:.1f} ms"
    )


def _table(now: FleetStatistics, config: FleetConfig) -> Table:
    table = Table(title=f"{now.devices} devices → {config.target}", show_header=False)
    for name, value in (
        ("seconds", f"{now.seconds:.1f}"),
        ("readings acked", f"{now.acked:,}"),
        ("readings/s", f"{now.readings_per_s:,.0f}"),
        ("unacked", f"{now.unacked:,}"),
        ("ack p50 / p99", f"{now.ack_p50_ms:.1f} / {now.ack_p99_ms:.1f} ms"),
        ("rejected", f"{now.rejected:,}"),
        ("resent", f"{now.resent:,}"),
        ("reconnects", f"{now.reconnects:,}"),
    ):
        table.add_row(name, value)
    return table
