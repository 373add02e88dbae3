"""The log's way to the warehouse."""

from collections.abc import Mapping
from typing import Final

from runtime.metric_definitions.model import LATENCY_BUCKETS, MetricDefinition, counter, gauge, histogram
from runtime.metric_definitions.names import MetricName

LOADER: Final[Mapping[MetricName, MetricDefinition]] = {
    "atlasco_loader_records": counter(
        "{record}",
        "Records of the log that were decoded, by kind.",
        "No watermarks for minutes: the relay stands still, and the warehouse cannot get fresher.",
        {"kind": ("changes", "watermark")},
    ),
    "atlasco_loader_readings_loaded": counter(
        "{reading}",
        "Changes that this loader put into the warehouse.",
        "Zero while readings are published: see the loader's readiness and retries.",
    ),
    "atlasco_loader_duplicates": counter(
        "{record}",
        "Change records left out because they had been loaded before.",
        "Some after a relay's failure; a steady stream means that a relay dies again and again.",
    ),
    "atlasco_loader_dead_letters": counter(
        "{record}",
        "Records that could not be decoded and went to the dead-letter topic.",
        "Any: answers that may lack them are marked incomplete. The log says why; mend, then run "
        "`atlasco load --redrive`.",
    ),
    "atlasco_loader_retries": counter(
        "{attempt}",
        "Loads that failed and were tried again.",
        "Rising: the warehouse, the staging bucket or Kafka does not answer; the log says which.",
    ),
    "atlasco_loader_buffer_bytes": gauge(
        "By",
        "Memory held by changes that wait for a load or are in one.",
        "At its bound for long: loads are slower than the log; see the load duration.",
    ),
    "atlasco_loader_halted_partitions": gauge(
        "{partition}",
        "Partitions that cannot go on, because the log lacks records or the topic was made anew.",
        "Any: nothing is lost, but the warehouse stands still there. Run `atlasco rebuild`.",
    ),
    "atlasco_loader_lag_records": gauge(
        "{record}",
        "Records of the log that are not in the warehouse yet, over the partitions of this loader; absent until known.",
        "Growing: loads are slower than the log, or fail; see the load duration and retries. Add loaders, up to "
        "the number of partitions.",
    ),
    "atlasco_loader_behind_seconds": gauge(
        "s",
        "Age, on the primary's clock, of the moment through which the warehouse is complete, as of this loader's "
        "last load; absent until known.",
        "Far above the load age while the lag is small: no watermarks come, see the relay's incompleteness. Else "
        "as for the lag; a halted partition makes it grow for ever.",
    ),
    "atlasco_loader_load_duration_seconds": histogram(
        "s",
        "One load, from full buffers to the warehouse's commit, retries included.",
        "Above the load age: loads pile up; look at the warehouse.",
        LATENCY_BUCKETS,
    ),
}
