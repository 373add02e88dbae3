"""The live view: how the fleet and each part of the stack are doing, once a second."""

import asyncio
import sys
import time

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from demo.questions import TIERS, QueryFigures, Questions, Tier
from demo.stack import Stack
from device.fleet import Fleet, FleetStatistics
from storage.warehouse.port import Scope, Warehouse

_PLAIN_INTERVAL_S = 5.0
_WAREHOUSE = " → Kafka → warehouse"


async def show(fleet: Fleet, stack: Stack, questions: Questions) -> None:
    """Show progress on standard error until cancelled: a table on a terminal, else a line every few seconds."""
    console = Console(stderr=True, highlight=False)
    warehouse = stack.pipeline.warehouse if stack.pipeline else None

    async def look() -> tuple[dict[str, float], float | None]:
        metrics = await asyncio.to_thread(stack.metrics)
        return metrics, await asyncio.to_thread(seconds_behind, warehouse) if warehouse else None

    if not console.is_terminal:
        while True:
            await asyncio.sleep(_PLAIN_INTERVAL_S)
            stack.check()
            metrics, behind = await look()
            print(_line(fleet.statistics(), metrics, behind), file=sys.stderr)
            print(_query_line(questions.figures()), file=sys.stderr)
    with Live(console=console, refresh_per_second=4) as live:
        previous: FleetStatistics | None = None
        while True:
            stack.check()
            now = fleet.statistics()
            metrics, behind = await look()
            live.update(_screen(_table(now, previous, metrics, behind, stack), questions.figures(), stack))
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
    return table


def _screen(figures: Table, queries: QueryFigures, stack: Stack) -> RenderableType:
    """Both tables side by side where the terminal is wide enough, and what to try below."""
    hint = (
        "in a second terminal:\n"
        f"  atlasco query devices --target {stack.target} --tenant demo\n"
        f"  atlasco query latest DEVICE --target {stack.target} --tenant demo --freshness dashboard --explain"
    )
    parts: list[RenderableType] = [Columns([figures, _query_table(queries)])]
    if queries.problem:
        # Text: the gateway's words are data, and markup in them must not style the terminal.
        parts.append(Text(f"queries: {queries.problem}", style="red"))
    return Group(*parts, Text(hint, style="dim"))


def _query_table(queries: QueryFigures) -> Table:
    table = Table(title="queries: who answers, and how old answers are", title_justify="left")
    table.add_column("tier", style="bold")
    table.add_column("answered by")
    table.add_column("age", justify="right")
    table.add_column("took", justify="right")
    for tier in TIERS:
        found = queries.tiers[tier]
        table.add_row(tier, "\n".join(_sources(queries, tier)), _duration(found.staleness_s), _duration(found.took_s))
    table.caption = f"{queries.checked:,} answers checked, {queries.dishonest:,} dishonest"
    table.caption_justify = "left"
    return table


def _sources(queries: QueryFigures, tier: Tier) -> list[str]:
    """The most frequent source first, then what was not answered."""
    answers = sorted(queries.tiers[tier].answers.items(), key=lambda item: -item[1])
    return [f"{source} {count:,}" for source, count in answers] + [
        f"{reason} {count:,}" for reason, count in queries.unanswered.get(tier, {}).items()
    ]


def _query_line(queries: QueryFigures) -> str:
    told = "; ".join(
        f"{tier} {', '.join(_sources(queries, tier)) or 'none'} ({_duration(queries.tiers[tier].staleness_s)} old)"
        for tier in TIERS
    )
    problem = f"; {queries.problem}" if queries.problem else ""
    return f"  queries: {told}; {queries.checked:,} checked, {queries.dishonest:,} dishonest{problem}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


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
