"""Rollups, projections and the deletion of devices."""

from collections.abc import Mapping
from typing import Final

from runtime.metric_definitions.model import MetricDefinition, counter, gauge
from runtime.metric_definitions.names import MetricName

ROLLUP: Final[Mapping[MetricName, MetricDefinition]] = {
    "atlasco_rollup_lag_seconds": gauge(
        "s",
        "Age of the moment through which rollups and projections are complete.",
        "Rising: the worker does not keep up, or none works; queries read raw data, and the outbox is kept.",
    ),
    "atlasco_rollup_active": gauge(
        "1",
        "1 in the worker that has the lease, 0 in those that stand by.",
        "No worker with 1: see the logs; leases need the database.",
    ),
    "atlasco_rollup_rounds": counter(
        "{round}", "Rounds over the outbox that found something.", "Zero while readings are written: see the lag."
    ),
    "atlasco_rollup_minutes_computed": counter(
        "{bucket}",
        "Buckets of a minute computed from readings.",
        "Many times the minutes that pass for each series: late readings, or rounds too short (the poll interval).",
    ),
    "atlasco_rollup_rows_refreshed": counter(
        "{row}", "Rows of projections compared with the latest values.", "For sizing projections."
    ),
    "atlasco_rollup_backfills_pending": gauge(
        "{declaration}",
        "Rollups and projections that are not filled yet.",
        "For hours: look at the list with `atlasco projection list`; it moves, or its problem says why not.",
    ),
    "atlasco_rollup_failed": gauge(
        "{declaration}",
        "Rollups and projections that are out of service because the database refused their work.",
        "`atlasco rollup list` and `atlasco projection list` say why. Each is filled anew after ten minutes; one "
        "that fails again needs what its problem names.",
    ),
    "atlasco_rollup_failures": counter(
        "{failure}",
        "What kept the worker from going on, by source. It is tried again.",
        "database: see whether it answers. lease: another worker took over, after a pause of this one. data: a "
        "batch or a step cannot be carried out, or a tenant's rollups are out of service for a while; the log "
        "names it.",
        {"source": ("database", "lease", "data")},
    ),
    "atlasco_rollup_rewinds": counter(
        "{rewind}",
        "Times the worker went over the outbox again (rewind), or began anew (renumber).",
        "Expected once after a failover or a restore.",
        {"reason": ("rewind", "renumber")},
    ),
    "atlasco_deletions_open": gauge(
        "{operation}",
        "Devices whose deletion was ordered and has not ended.",
        "For hours: the operations say at which step, and what failed.",
    ),
    "atlasco_deletions_failing": gauge(
        "{operation}",
        "Of these, those whose last attempt failed.",
        "Any for long: the operation's problem and the worker's log say what failed; it is tried again.",
    ),
    "atlasco_deletion_oldest_seconds": gauge(
        "s",
        "Since the oldest deletion that has not ended was ordered; 0 when there is none.",
        "Beyond a day: a step fails, the worker is away, or the warehouse stands still.",
    ),
    "atlasco_deletion_readings": counter(
        "{reading}", "Readings of deleted devices removed from history.", "Zero with deletions open: see the log."
    ),
}
