"""The live view: how the fleet and each part of the stack are doing, once a second."""

import asyncio
import sys

from rich.console import Console
from rich.live import Live
from rich.table import Table

from demo.stack import Stack
from device.fleet import Fleet, FleetStatistics

_PLAIN_INTERVAL_S = 5.0


async def show(fleet: Fleet, stack: Stack) -> None:
    """Show progress on standard error until cancelled: a table on a terminal, else a line every few seconds."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        while True:
            await asyncio.sleep(_PLAIN_INTERVAL_S)
            metrics = await asyncio.to_thread(stack.gateway.metrics)
            print(_line(fleet.statistics(), metrics), file=sys.stderr)
    with Live(console=console, refresh_per_second=4) as live:
        previous: FleetStatistics | None = None
        while True:
            stack.gateway.check()
            now = fleet.statistics()
            live.update(_table(now, previous, await asyncio.to_thread(stack.gateway.metrics), stack))
            previous = now
            await asyncio.sleep(1.0)


def _line(now: FleetStatistics, metrics: dict[str, float]) -> str:
    return (
        f"{now.seconds:.0f} s: {now.acked:,} acked ({now.readings_per_s:,.0f}/s), {now.resent:,} sent again, "
        f"{now.rejected:,} rejected, ack p50 {now.ack_p50_ms:.0f} ms p99 {now.ack_p99_ms:.0f} ms, "
        f"{metrics.get('atlasco_lane_queue_readings', 0):,.0f} waiting"
    )


def _table(now: FleetStatistics, previous: FleetStatistics | None, metrics: dict[str, float], stack: Stack) -> Table:
    span = now.seconds - previous.seconds if previous else now.seconds
    acked = now.acked - (previous.acked if previous else 0)
    table = Table(title="AtlasCo Telemetry: devices → gateway → PostgreSQL", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right", min_width=16)
    table.add_column(style="dim")
    for name, value, meaning in (
        ("streams", f"{metrics.get('atlasco_streams_open', 0):,.0f}", "devices connected"),
        ("acked per second", f"{acked / span if span else 0:,.0f}", "readings the devices may forget"),
        ("acked", f"{now.acked:,}", "readings, durable in PostgreSQL"),
        ("sent again", f"{now.resent:,}", "readings, after a connection was cut on purpose"),
        ("rejected", f"{now.rejected:,}", "bad readings, each with a reason"),
        ("ack p50 / p99", f"{now.ack_p50_ms:.0f} / {now.ack_p99_ms:.0f} ms", "from sending to the ack"),
        ("waiting", f"{metrics.get('atlasco_lane_queue_readings', 0):,.0f}", "readings in the gateway's lanes"),
        ("rows written", f"{metrics.get('atlasco_copy_rows_total', 0):,.0f}", "by COPY into the history"),
    ):
        table.add_row(name, value, meaning)
    table.caption = (
        "in a second terminal:\n"
        f"  atlasco query devices --target {stack.target} --tenant demo\n"
        f"  atlasco query latest DEVICE --target {stack.target} --tenant demo"
    )
    table.caption_justify = "left"
    return table
