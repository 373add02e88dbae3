"""Every metric of the platform: its kind, unit, labels, what it means, and what to do when it looks wrong.

    names      which metrics there are
    model      what there is to say of one
    ingest     streams and batches, from their arrival to their commit
    queries    questions, their sources and what came of them
    relay      the outbox, and its way to the log
    loader     the log's way to the warehouse
    rollup     rollups, projections and the deletion of devices
    process    who is let in, certificates, the event loop

To add a metric, add its name to `MetricName` and a row to the module that it belongs to; a test keeps the two equal.

No label ever holds a device's or a tenant's name: there are millions of the first, and the second would
tell one customer's business to whoever reads the dashboards.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from runtime.metric_definitions.ingest import INGEST
from runtime.metric_definitions.loader import LOADER
from runtime.metric_definitions.model import MetricDefinition, MetricKind
from runtime.metric_definitions.names import MetricName
from runtime.metric_definitions.process import PROCESS
from runtime.metric_definitions.queries import QUERIES
from runtime.metric_definitions.relay import RELAY
from runtime.metric_definitions.rollup import ROLLUP

__all__ = ["DEFINITIONS", "MetricDefinition", "MetricKind", "MetricName", "describe_metrics"]

DEFINITIONS: Final[Mapping[MetricName, MetricDefinition]] = MappingProxyType(
    {**INGEST, **QUERIES, **RELAY, **LOADER, **ROLLUP, **PROCESS}
)


def describe_metrics() -> str:
    """The metrics as a Markdown table."""
    lines = ["| Metric | Kind | Unit | Labels | Meaning | Remedy |", "| --- | --- | --- | --- | --- | --- |"]
    for name, definition in DEFINITIONS.items():
        shown = f"{name}_total" if definition.kind == "counter" else name
        labels = ", ".join(f"`{label}`" for label in definition.labels) or "-"
        cells = (f"`{shown}`", definition.kind, definition.unit.strip("{}"), labels)
        lines.append("| " + " | ".join((*cells, definition.meaning, definition.remedy)) + " |")
    return "\n".join(lines) + "\n"
