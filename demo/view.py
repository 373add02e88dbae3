"""The live view: how the fleet and each part of the stack are doing, once a second."""

import asyncio
import sys
import time

from rich.console import Console
from rich.live import Live
from rich.table import Table

from demo.stack import Stack
from device.fleet import Fleet, FleetStatistics
from storage.warehouse.port import Scope, Warehouse

_PLAIN_INTERVAL_S = 5.0
_WAREHOUSE = " → Kafka → warehouse"


async def show(fleet: Fleet, stack: Stack) -> None:
    """Show progress on standard error until cancelled: a table on a terminal, else a line every few seconds."""
    console = Console(stderr=True, highlight=False)
    warehouse = stack.pipeline.warehouse if stack.pipeline else None

    async def look() -> tuple[dict[str, float], float | None]:
        metrics = await asyncio.to_thread(stack.metrics)
        return metrics, await asyncio.to_thread(seconds_behind, warehouse) if warehouse else None

    if not console.is_terminal:
        while True:
            await asyncio.sleep(_PLAIN_INTERVAL_S)
            metrics, behind = await look()
            print(_line(fleet.statistics(), metrics, behind), file=sys.stderr)
    with Live(console=console, refresh_per_second=4) as live:
        previous: FleetStatistics | None = None
        while True:
            stack.check()
            now = fleet.statistics()
            metrics, behind = await look()
            live.update(_table(now, previous, metrics, behind, stack))
            previous = now
            await asyncio.sleep(1.0)


def seconds_behind(warehouse: Warehouse) -> float | None:
    """How far behind now the warehouse is known to be complete; None when it is not known yet."""
    as_of_us = warehouse.completeness(Scope()).as_of_us
    return None if as_of_us is None else max(0.0, time.time() - as_of_us / 1e6)


def _line(now: FleetStatistics, metrics: dict[str, float], behind: float | None) -> str:
    warehouse = "" if behind is None else f", warehouse {behind:.1f} s behind"
    return (
        f"{now.seconds:.0f} s: {now.acked:,} acked ({now.readings_per_s:,.0f}/s), {now.resent:,} sent again, "
        f"{now.rejected:,} rejected, ack p50 {now.ack_p50_ms:.0f} ms p99 {now.ack_p99_ms:.0f} ms, "
        f"{metrics.get('atlasco_lane_queue_readings', 0):,.0f} waiting{warehouse}"
    )


def _table(
    now: FleetStatistics,
    previous: FleetStatistics | None,
    metrics: dict[str, float],
    behind: float | None,
    stack: Stack,
) -> Table:
    span = now.seconds - previous.seconds if previous else now.seconds
    acked = now.acked - (previous.acked if previous else 0)
    table = Table(
        title=f"AtlasCo Telemetry: devices → gateway → PostgreSQL{_WAREHOUSE if stack.pipeline else ''}",
        title_justify="left",
        show_header=False,
    )
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
        *(_pipeline_rows(metrics, behind) if stack.pipeline else ()),
    ):
        table.add_row(name, value, meaning)
    table.caption = (
        "in a second terminal:\n"
        f"  atlasco query devices --target {stack.target} --tenant demo\n"
        f"  atlasco query latest DEVICE --target {stack.target} --tenant demo"
    )
    table.caption_justify = "left"
    return table


def _pipeline_rows(metrics: dict[str, float], behind: float | None) -> tuple[tuple[str, str, str], ...]:
    published = metrics.get("atlasco_relay_changes_published_total", 0)
    loaded = metrics.get("atlasco_loader_readings_loaded_total", 0)
    return (
        ("outbox age", f"{metrics.get('atlasco_outbox_oldest_seconds', 0):.1f} s", "oldest change not yet in Kafka"),
        ("published", f"{published:,.0f}", "changes in Kafka"),
        ("waiting in Kafka", f"{max(0, published - loaded):,.0f}", "changes not yet in the warehouse"),
        ("loaded", f"{loaded:,.0f}", "readings in the warehouse"),
        ("warehouse", "not yet known" if behind is None else f"{behind:.1f} s behind", "complete through"),
    )
