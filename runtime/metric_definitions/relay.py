"""The outbox, and its way to the log."""

from collections.abc import Mapping
from typing import Final

from runtime.metric_definitions.model import MetricDefinition, counter, gauge
from runtime.metric_definitions.names import MetricName

RELAY: Final[Mapping[MetricName, MetricDefinition]] = {
    "atlasco_outbox_oldest_seconds": gauge(
        "s",
        "Since the oldest committed batch of a lane that is not in Kafka yet was begun; 0 when there is none. "
        "Every relay reports all lanes.",
        "Growing: Kafka is down or no relay holds the lane; see the relay's failures. Nothing is lost meanwhile.",
        {"lane": ()},
    ),
    "atlasco_outbox_batches": gauge(
        "{batch}",
        "Committed batches of a lane that are not in Kafka yet, counted up to 20,000.",
        "As for the oldest.",
        {"lane": ()},
    ),
    "atlasco_outbox_bytes": gauge(
        "By",
        "Size of the outbox on disk: what is not loaded yet, and what waits to be dropped.",
        "Growing while batches are published: the warehouse lags, or a transaction stays open; see postponed "
        "retirements. Give the disk room: the outbox holds what an outage keeps back.",
    ),
    "atlasco_outbox_partitions_retired": counter(
        "{partition}", "Hourly partitions of the outbox that were dropped.", "About one an hour."
    ),
    "atlasco_outbox_retirements_postponed": counter(
        "{attempt}",
        "Attempts to drop a partition that found it still needed or in use.",
        "Rising for hours: look for a transaction that stays open, or a loader that does not advance; the log "
        "says which.",
    ),
    "atlasco_relay_lanes_held": gauge(
        "{lane}",
        "Lanes that this relay drains.",
        "The sum over all relays is the number of lanes; less for longer than a lease: no relay is left.",
    ),
    "atlasco_relay_incomplete_seconds": gauge(
        "s",
        "Age of the moment through which a lane is known to be complete in Kafka. Every relay reports all lanes.",
        "Beyond a minute: see the outbox's oldest batch and the relay's failures.",
        {"lane": ()},
    ),
    "atlasco_relay_batches_published": counter(
        "{batch}",
        "Outbox rows whose every record Kafka has confirmed; again for those published again.",
        "Compare with the flushes of the gateways.",
    ),
    "atlasco_relay_changes_published": counter(
        "{change}", "Changes in these batches.", "Compare with committed readings."
    ),
    "atlasco_relay_records_published": counter(
        "{record}",
        "Records that these batches became.",
        "Many for each batch: writes are small, or spread over many tenants.",
    ),
    "atlasco_relay_bytes_published": counter("By", "Payload of these batches.", "For sizing the topic."),
    "atlasco_relay_failures": counter(
        "{failure}",
        "What kept a lane or the leases from going on, by source. It is tried again.",
        "kafka, database: see whether they answer. lease: another relay took over, after a pause of this one. "
        "data: a batch cannot be sent as it is; the log names it, and its lane stands still.",
        {"source": ("database", "kafka", "lease", "data")},
    ),
    "atlasco_relay_rewinds": counter(
        "{rewind}",
        "Times a lane published the whole outbox again: after a failover, a restore, or with a new topic.",
        "Expected once a lane after each of these.",
        {"reason": ("rewind", "renumber")},
    ),
}
