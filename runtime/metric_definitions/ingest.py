"""Streams and batches, from their arrival to their commit."""

from collections.abc import Mapping
from typing import Final

from runtime.metric_definitions.model import LATENCY_BUCKETS, MetricDefinition, counter, gauge, histogram
from runtime.metric_definitions.names import MetricName

ROW_BUCKETS: Final = (1.0, 10.0, 100.0, 500.0, 1000.0, 2500.0, 5000.0, 10000.0, 25000.0, 50000.0, 100000.0)
"""Rows in one flush."""

VALUE_TYPES: Final = ("double", "bigint", "boolean", "text")
"""Values of the label `type`: the typed history tables."""

_TYPE: Final = {"type": VALUE_TYPES}

INGEST: Final[Mapping[MetricName, MetricDefinition]] = {
    "atlasco_streams_open": gauge(
        "{stream}",
        "Device streams that are open.",
        "A sudden fall: look at stream closes by reason. A steady rise on one pod: streams do not "
        "rebalance; lower the stream's maximum age.",
    ),
    "atlasco_stream_opens": counter(
        "{stream}",
        "Streams that were welcomed.",
        "Many more than devices: clients reconnect in a loop; see the reasons of stream closes.",
    ),
    "atlasco_stream_closes": counter(
        "{stream}",
        "Streams that ended, by the reason the client was told (OK, STREAM_SUPERSEDED, SEQUENCE_GAP, …).",
        "The reason's row in ingest.proto says whether the client or the network is at fault.",
        {"reason": ()},
    ),
    "atlasco_messages_received": counter(
        "{message}",
        "Data messages that were decoded.",
        "Few readings for each message: have the firmware pack more into one.",
    ),
    "atlasco_readings_received": counter(
        "{reading}",
        "Readings that were decoded, whether or not they were accepted.",
        "Far above committed for minutes: writes lag; look at the lane queues and flush duration.",
        _TYPE,
    ),
    "atlasco_readings_committed": counter(
        "{reading}",
        "Readings that became durable: the ones that were sent before and changed nothing included.",
        "Zero while readings are received: the database takes no writes; see commit retries.",
        _TYPE,
    ),
    "atlasco_readings_rejected": counter(
        "{reading}",
        "Readings refused for good, by RejectionReason.",
        "The reason's comment in ingest.proto says what the device sent; the log names the device.",
        {"reason": ()},
    ),
    "atlasco_readings_quarantined": counter(
        "{reading}",
        "Rejected readings that were kept aside for an operator, by RejectionReason.",
        "Inspect and release or drop them; widen the tenant's clock window for a back-fill.",
        {"reason": ()},
    ),
    "atlasco_readings_corrected": counter(
        "{reading}",
        "Readings that replaced another value of the same attribute and timestamp.",
        "Many: two sources write one device, or a device's clock repeats times.",
        _TYPE,
    ),
    "atlasco_ack_latency_seconds": histogram(
        "s",
        "From a message's receipt to its ack being handed to the transport.",
        "Compare with flush duration: a slow flush is the database, a fast one is queueing before it.",
        LATENCY_BUCKETS,
    ),
    "atlasco_throttles_sent": counter(
        "{throttle}",
        "Throttle messages sent, by the limit that was reached.",
        "TENANT_QUEUE: one customer exceeds its share. GATEWAY_QUEUE: add gateways. STORAGE: see the pool.",
        {"limit": ("TENANT_QUEUE", "GATEWAY_QUEUE", "STORAGE")},
    ),
    "atlasco_lane_queue_readings": gauge(
        "{reading}",
        "Readings that wait in a lane for its next flush.",
        "One lane far above the others: a hot device. All high: the database is the bound.",
        {"lane": ()},
    ),
    "atlasco_lane_queue_bytes": gauge(
        "By",
        "Bytes that wait in a lane for its next flush.",
        "As for the queue's readings; at the bound the gateway stops reading its streams.",
        {"lane": ()},
    ),
    "atlasco_flush_duration_seconds": histogram(
        "s",
        "One flush of a lane: from taking the batch to its commit.",
        "Rising: look for lock waits, checkpoints and replication in the database.",
        LATENCY_BUCKETS,
    ),
    "atlasco_flush_rows": histogram(
        "{row}",
        "Readings in one flush.",
        "Small while queues are long: the flush age is too short for the load.",
        ROW_BUCKETS,
    ),
    "atlasco_copy_rows": counter(
        "{row}", "Rows sent by COPY into the history.", "Compare with committed readings.", _TYPE
    ),
    "atlasco_copy_conflicts": counter(
        "{batch}",
        "Batches that held a key already stored and went again through the merge.",
        "Above a few percent: clients resend what was acked; see stream closes.",
        _TYPE,
    ),
    "atlasco_commit_retries": counter(
        "{retry}",
        "Flushes that were tried again, by SQLSTATE (or CONNECTION where there was none).",
        "40001 and 40P01 are contention; CONNECTION is a failover or the network.",
        {"sqlstate": ()},
    ),
    "atlasco_pool_connections": gauge(
        "{connection}",
        "Connections of a database pool.",
        "Below its minimum: the database refuses connections.",
        {"pool": ()},
    ),
    "atlasco_pool_connections_in_use": gauge(
        "{connection}",
        "Connections of a database pool that are at work.",
        "At the maximum for long: see waiting.",
        {"pool": ()},
    ),
    "atlasco_pool_waiting": gauge(
        "{request}",
        "Requests that wait for a connection of a database pool.",
        "Above zero for long: raise the pool's size, or find the slow statement.",
        {"pool": ()},
    ),
    "atlasco_write_requests": counter(
        "{request}",
        "Unary writes, by gRPC status.",
        "RESOURCE_EXHAUSTED is overload; UNAVAILABLE is the database.",
        {"status": ()},
    ),
}
