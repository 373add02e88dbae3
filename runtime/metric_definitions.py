"""Every metric of the platform: its kind, unit, labels, what it means, and what to do when it looks wrong.

The names are those Prometheus shows, save that it adds `_total` to counters. To add a metric, add its
name to `MetricName` and a row to `DEFINITIONS`; a test keeps the two equal.

No label ever holds a device's or a tenant's name: there are millions of the first, and the second would
tell one customer's business to whoever reads the dashboards.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

MetricName = Literal[
    "atlasco_streams_open",
    "atlasco_stream_opens",
    "atlasco_stream_closes",
    "atlasco_messages_received",
    "atlasco_readings_received",
    "atlasco_readings_committed",
    "atlasco_readings_rejected",
    "atlasco_readings_quarantined",
    "atlasco_readings_corrected",
    "atlasco_ack_latency_seconds",
    "atlasco_throttles_sent",
    "atlasco_lane_queue_readings",
    "atlasco_lane_queue_bytes",
    "atlasco_flush_duration_seconds",
    "atlasco_flush_rows",
    "atlasco_copy_rows",
    "atlasco_copy_conflicts",
    "atlasco_commit_retries",
    "atlasco_pool_connections",
    "atlasco_pool_connections_in_use",
    "atlasco_pool_waiting",
    "atlasco_write_requests",
    "atlasco_query_requests",
    "atlasco_query_duration_seconds",
    "atlasco_query_answers",
    "atlasco_query_degraded",
    "atlasco_query_fallbacks",
    "atlasco_query_staleness_seconds",
    "atlasco_exports_open",
    "atlasco_exports_unread",
    "atlasco_source_available",
    "atlasco_source_staleness_seconds",
    "atlasco_clock_uncertainty_seconds",
    "atlasco_fallback_queries",
    "atlasco_fallback_queries_limit",
    "atlasco_authentication_failures",
    "atlasco_tls_reloads",
    "atlasco_tls_certificate_remaining_seconds",
    "atlasco_outbox_oldest_seconds",
    "atlasco_outbox_batches",
    "atlasco_outbox_bytes",
    "atlasco_outbox_partitions_retired",
    "atlasco_outbox_retirements_postponed",
    "atlasco_relay_lanes_held",
    "atlasco_relay_incomplete_seconds",
    "atlasco_relay_batches_published",
    "atlasco_relay_changes_published",
    "atlasco_relay_records_published",
    "atlasco_relay_bytes_published",
    "atlasco_relay_failures",
    "atlasco_relay_rewinds",
    "atlasco_loader_records",
    "atlasco_loader_readings_loaded",
    "atlasco_loader_duplicates",
    "atlasco_loader_dead_letters",
    "atlasco_loader_retries",
    "atlasco_loader_buffer_bytes",
    "atlasco_loader_halted_partitions",
    "atlasco_loader_lag_records",
    "atlasco_loader_behind_seconds",
    "atlasco_loader_load_duration_seconds",
    "atlasco_rollup_lag_seconds",
    "atlasco_rollup_active",
    "atlasco_rollup_rounds",
    "atlasco_rollup_minutes_computed",
    "atlasco_rollup_rows_refreshed",
    "atlasco_rollup_backfills_pending",
    "atlasco_rollup_failed",
    "atlasco_rollup_failures",
    "atlasco_rollup_rewinds",
    "atlasco_deletions_open",
    "atlasco_deletions_failing",
    "atlasco_deletion_oldest_seconds",
    "atlasco_deletion_readings",
    "atlasco_event_loop_lag_seconds",
]

MetricKind = Literal["counter", "gauge", "histogram"]

LATENCY_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds. From below one commit to beyond any client's patience."""

ROW_BUCKETS: Final = (1.0, 10.0, 100.0, 500.0, 1000.0, 2500.0, 5000.0, 10000.0, 25000.0, 50000.0, 100000.0)
"""Rows in one flush."""

STALENESS_BUCKETS: Final = (
    0.001,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    5.0,
    15.0,
    30.0,
    60.0,
    300.0,
    900.0,
    1800.0,
    3600.0,
)
"""Seconds, with the default bounds of the tiers among them."""

TIERS: Final = ("critical", "dashboard", "report", "analytics")
"""Values of the label `tier`: the tier that was named, or the tightest one whose bound allows the staleness asked."""

ANSWER_SOURCES: Final = ("primary", "replica", "rollup", "projection", "warehouse", "split")
"""Values of the label `source` of answers: the kinds in Provenance.Source."""

VALUE_TYPES: Final = ("double", "bigint", "boolean", "text")
"""Values of the label `type`: the typed history tables."""


@dataclass(frozen=True)
class MetricDefinition:
    """What a metric is."""

    kind: MetricKind
    unit: str
    """UCUM: "s", "By", or what is counted in braces."""
    meaning: str
    remedy: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Label names, each with its values; an empty tuple where the values are bounded but not listed here.
    A counter whose values are listed starts at 0 for each, so that the first event already shows as an
    increase."""
    buckets: tuple[float, ...] = ()
    """Upper bounds, for histograms."""


def _counter(
    unit: str, meaning: str, remedy: str, labels: Mapping[str, tuple[str, ...]] | None = None
) -> MetricDefinition:
    return MetricDefinition("counter", unit, meaning, remedy, labels or {})


def _gauge(
    unit: str, meaning: str, remedy: str, labels: Mapping[str, tuple[str, ...]] | None = None
) -> MetricDefinition:
    return MetricDefinition("gauge", unit, meaning, remedy, labels or {})


def _histogram(
    unit: str,
    meaning: str,
    remedy: str,
    buckets: tuple[float, ...],
    labels: Mapping[str, tuple[str, ...]] | None = None,
) -> MetricDefinition:
    return MetricDefinition("histogram", unit, meaning, remedy, labels or {}, buckets)


_TYPE: Final = {"type": VALUE_TYPES}

DEFINITIONS: Final[Mapping[MetricName, MetricDefinition]] = MappingProxyType(
    {
        "atlasco_streams_open": _gauge(
            "{stream}",
            "Device streams that are open.",
            "A sudden fall: look at stream closes by reason. A steady rise on one pod: streams do not "
            "rebalance; lower the stream's maximum age.",
        ),
        "atlasco_stream_opens": _counter(
            "{stream}",
            "Streams that were welcomed.",
            "Many more than devices: clients reconnect in a loop; see the reasons of stream closes.",
        ),
        "atlasco_stream_closes": _counter(
            "{stream}",
            "Streams that ended, by the reason the client was told (OK, STREAM_SUPERSEDED, SEQUENCE_GAP, …).",
            "The reason's row in ingest.proto says whether the client or the network is at fault.",
            {"reason": ()},
        ),
        "atlasco_messages_received": _counter(
            "{message}",
            "Data messages that were decoded.",
            "Few readings for each message: have the firmware pack more into one.",
        ),
        "atlasco_readings_received": _counter(
            "{reading}",
            "Readings that were decoded, whether or not they were accepted.",
            "Far above committed for minutes: writes lag; look at the lane queues and flush duration.",
            _TYPE,
        ),
        "atlasco_readings_committed": _counter(
            "{reading}",
            "Readings that became durable: the ones that were sent before and changed nothing included.",
            "Zero while readings are received: the database takes no writes; see commit retries.",
            _TYPE,
        ),
        "atlasco_readings_rejected": _counter(
            "{reading}",
            "Readings refused for good, by RejectionReason.",
            "The reason's comment in ingest.proto says what the device sent; the log names the device.",
            {"reason": ()},
        ),
        "atlasco_readings_quarantined": _counter(
            "{reading}",
            "Rejected readings that were kept aside for an operator, by RejectionReason.",
            "Inspect and release or drop them; widen the tenant's clock window for a back-fill.",
            {"reason": ()},
        ),
        "atlasco_readings_corrected": _counter(
            "{reading}",
            "Readings that replaced another value of the same attribute and timestamp.",
            "Many: two sources write one device, or a device's clock repeats times.",
            _TYPE,
        ),
        "atlasco_ack_latency_seconds": _histogram(
            "s",
            "From a message's receipt to its ack being handed to the transport.",
            "Compare with flush duration: a slow flush is the database, a fast one is queueing before it.",
            LATENCY_BUCKETS,
        ),
        "atlasco_throttles_sent": _counter(
            "{throttle}",
            "Throttle messages sent, by the limit that was reached.",
            "TENANT_QUEUE: one customer exceeds its share. GATEWAY_QUEUE: add gateways. STORAGE: see the pool.",
            {"limit": ("TENANT_QUEUE", "GATEWAY_QUEUE", "STORAGE")},
        ),
        "atlasco_lane_queue_readings": _gauge(
            "{reading}",
            "Readings that wait in a lane for its next flush.",
            "One lane far above the others: a hot device. All high: the database is the bound.",
            {"lane": ()},
        ),
        "atlasco_lane_queue_bytes": _gauge(
            "By",
            "Bytes that wait in a lane for its next flush.",
            "As for the queue's readings; at the bound the gateway stops reading its streams.",
            {"lane": ()},
        ),
        "atlasco_flush_duration_seconds": _histogram(
            "s",
            "One flush of a lane: from taking the batch to its commit.",
            "Rising: look for lock waits, checkpoints and replication in the database.",
            LATENCY_BUCKETS,
        ),
        "atlasco_flush_rows": _histogram(
            "{row}",
            "Readings in one flush.",
            "Small while queues are long: the flush age is too short for the load.",
            ROW_BUCKETS,
        ),
        "atlasco_copy_rows": _counter(
            "{row}", "Rows sent by COPY into the history.", "Compare with committed readings.", _TYPE
        ),
        "atlasco_copy_conflicts": _counter(
            "{batch}",
            "Batches that held a key already stored and went again through the merge.",
            "Above a few percent: clients resend what was acked; see stream closes.",
            _TYPE,
        ),
        "atlasco_commit_retries": _counter(
            "{retry}",
            "Flushes that were tried again, by SQLSTATE (or CONNECTION where there was none).",
            "40001 and 40P01 are contention; CONNECTION is a failover or the network.",
            {"sqlstate": ()},
        ),
        "atlasco_pool_connections": _gauge(
            "{connection}",
            "Connections of a database pool.",
            "Below its minimum: the database refuses connections.",
            {"pool": ()},
        ),
        "atlasco_pool_connections_in_use": _gauge(
            "{connection}",
            "Connections of a database pool that are at work.",
            "At the maximum for long: see waiting.",
            {"pool": ()},
        ),
        "atlasco_pool_waiting": _gauge(
            "{request}",
            "Requests that wait for a connection of a database pool.",
            "Above zero for long: raise the pool's size, or find the slow statement.",
            {"pool": ()},
        ),
        "atlasco_write_requests": _counter(
            "{request}",
            "Unary writes, by gRPC status.",
            "RESOURCE_EXHAUSTED is overload; UNAVAILABLE is the database.",
            {"status": ()},
        ),
        "atlasco_query_requests": _counter(
            "{request}",
            "Queries, by method and gRPC status.",
            "DEADLINE_EXCEEDED: see query duration. RESOURCE_EXHAUSTED: queries exceed their concurrency.",
            {"method": (), "status": ()},
        ),
        "atlasco_query_duration_seconds": _histogram(
            "s",
            "From a query's arrival to its answer, by method and tier; `none`: no tier was asked, or the query was "
            "refused before.",
            "Look at the pool's waiting first, then at the statement's plan.",
            LATENCY_BUCKETS,
            {"method": (), "tier": (*TIERS, "none")},
        ),
        "atlasco_query_answers": _counter(
            "{answer}",
            "Reads that were answered, by method, tier and what answered; an export counts each of its pages.",
            "Dashboards from the primary while there are replicas: see fallbacks and the sources' staleness.",
            {"method": (), "tier": TIERS, "source": ANSWER_SOURCES},
        ),
        "atlasco_query_degraded": _counter(
            "{answer}",
            "Answers that were worse than asked and said so, by reason; one with two reasons counts in both.",
            "stale, read_token_unproven: no source was fresh enough. incomplete: dead letters. no_warehouse: a "
            "database answered in its place. range_cut: the caller asked for more than retention keeps.",
            {"reason": ("stale", "read_token_unproven", "incomplete", "range_cut", "no_warehouse")},
        ),
        "atlasco_query_fallbacks": _counter(
            "{attempt}",
            "Attempts to read that failed before another source answered, by the source's kind and cause. Queries that "
            "nobody answered are in the queries' status alone.",
            "unproven: the snapshot was older than asked (rollup: or they do not answer it, which is ordinary). "
            "unavailable: it is down. busy: no connection or place was free. conflict: replay cancelled it. range: it "
            "no longer keeps the beginning.",
            {
                "source": ("primary", "replica", "rollup", "warehouse", "split"),
                "cause": ("unproven", "unavailable", "busy", "conflict", "range"),
            },
        ),
        "atlasco_query_staleness_seconds": _histogram(
            "s",
            "How old an answer may be: its query's arrival minus as_of, with the clocks' uncertainty, by what "
            "answered; 0 from the primary.",
            "Near the tier's bound: the source lags; see its staleness.",
            STALENESS_BUCKETS,
            {"source": ANSWER_SOURCES},
        ),
        "atlasco_exports_open": _gauge(
            "{export}",
            "Exports that are being read by their clients.",
            "Many, and few answers to ExportSeries: the clients take their time.",
        ),
        "atlasco_exports_unread": _counter(
            "{export}",
            "Exports that were ended because their client left a message unread for ATLASCO_EXPORT_PATIENCE.",
            "A client forgets to read or cancel what it opens: the gateway's log names its tenant.",
        ),
        "atlasco_source_available": _gauge(
            "1",
            "1 while this gateway asks a source (primary, replica-1, …, warehouse), 0 while its circuit breaker is "
            "open.",
            "0: the gateway's log says why (`source failed`); the others answer meanwhile.",
            {"source": ()},
        ),
        "atlasco_source_staleness_seconds": _gauge(
            "s",
            "Age of the moment through which a replica or the warehouse was complete when it was measured last; absent "
            "until known.",
            "A replica above a second: replication or replay is held up. The warehouse: see the loader's lag.",
            {"source": ()},
        ),
        "atlasco_clock_uncertainty_seconds": _gauge(
            "s",
            "How far apart the bounds are between which this gateway knows the primary's clock; absent until known. "
            "Counted against the freshness of every source but the primary.",
            "Above 10 ms: heartbeats on the primary are slow or missing; replicas then prove less than they hold.",
        ),
        "atlasco_fallback_queries": _gauge(
            "{query}",
            "Queries of other sources that run on the primary now.",
            "Near its limit: further ones are refused (FALLBACK_CONCURRENCY), so that writes keep their share.",
        ),
        "atlasco_fallback_queries_limit": _gauge(
            "{query}",
            "The most such queries at once: ATLASCO_MAX_FALLBACK_QUERIES.",
            "Raise it only where the primary has room; mend the source first.",
        ),
        "atlasco_authentication_failures": _counter(
            "{request}",
            "Calls whose peer had no valid identity, by reason.",
            "After a rotation: devices with certificates of the old authority. Otherwise: probing.",
            {"reason": ()},
        ),
        "atlasco_tls_reloads": _counter(
            "{reload}",
            "Changes of the certificate files that were noticed, and whether the new ones are served.",
            "failed: the old certificate is still served and will expire; the log says what is wrong.",
            {"result": ("loaded", "failed")},
        ),
        "atlasco_tls_certificate_remaining_seconds": _gauge(
            "s",
            "Time until the certificate that is served expires.",
            "Below a few days: the rotation does not work; see TLS reloads.",
        ),
        "atlasco_outbox_oldest_seconds": _gauge(
            "s",
            "Since the oldest committed batch of a lane that is not in Kafka yet was begun; 0 when there is none. "
            "Every relay reports all lanes.",
            "Growing: Kafka is down or no relay holds the lane; see the relay's failures. Nothing is lost meanwhile.",
            {"lane": ()},
        ),
        "atlasco_outbox_batches": _gauge(
            "{batch}",
            "Committed batches of a lane that are not in Kafka yet, counted up to 20,000.",
            "As for the oldest.",
            {"lane": ()},
        ),
        "atlasco_outbox_bytes": _gauge(
            "By",
            "Size of the outbox on disk: what is not loaded yet, and what waits to be dropped.",
            "Growing while batches are published: the warehouse lags, or a transaction stays open; see postponed "
            "retirements. Give the disk room: the outbox holds what an outage keeps back.",
        ),
        "atlasco_outbox_partitions_retired": _counter(
            "{partition}", "Hourly partitions of the outbox that were dropped.", "About one an hour."
        ),
        "atlasco_outbox_retirements_postponed": _counter(
            "{attempt}",
            "Attempts to drop a partition that found it still needed or in use.",
            "Rising for hours: look for a transaction that stays open, or a loader that does not advance; the log "
            "says which.",
        ),
        "atlasco_relay_lanes_held": _gauge(
            "{lane}",
            "Lanes that this relay drains.",
            "The sum over all relays is the number of lanes; less for longer than a lease: no relay is left.",
        ),
        "atlasco_relay_incomplete_seconds": _gauge(
            "s",
            "Age of the moment through which a lane is known to be complete in Kafka. Every relay reports all lanes.",
            "Beyond a minute: see the outbox's oldest batch and the relay's failures.",
            {"lane": ()},
        ),
        "atlasco_relay_batches_published": _counter(
            "{batch}",
            "Outbox rows whose every record Kafka has confirmed; again for those published again.",
            "Compare with the flushes of the gateways.",
        ),
        "atlasco_relay_changes_published": _counter(
            "{change}", "Changes in these batches.", "Compare with committed readings."
        ),
        "atlasco_relay_records_published": _counter(
            "{record}",
            "Records that these batches became.",
            "Many for each batch: writes are small, or spread over many tenants.",
        ),
        "atlasco_relay_bytes_published": _counter("By", "Payload of these batches.", "For sizing the topic."),
        "atlasco_relay_failures": _counter(
            "{failure}",
            "What kept a lane or the leases from going on, by source. It is tried again.",
            "kafka, database: see whether they answer. lease: another relay took over, after a pause of this one. "
            "data: a batch cannot be sent as it is; the log names it, and its lane stands still.",
            {"source": ("database", "kafka", "lease", "data")},
        ),
        "atlasco_relay_rewinds": _counter(
            "{rewind}",
            "Times a lane published the whole outbox again: after a failover, a restore, or with a new topic.",
            "Expected once a lane after each of these.",
            {"reason": ("rewind", "renumber")},
        ),
        "atlasco_loader_records": _counter(
            "{record}",
            "Records of the log that were decoded, by kind.",
            "No watermarks for minutes: the relay stands still, and the warehouse cannot get fresher.",
            {"kind": ("changes", "watermark")},
        ),
        "atlasco_loader_readings_loaded": _counter(
            "{reading}",
            "Changes that this loader put into the warehouse.",
            "Zero while readings are published: see the loader's readiness and retries.",
        ),
        "atlasco_loader_duplicates": _counter(
            "{record}",
            "Change records left out because they had been loaded before.",
            "Some after a relay's failure; a steady stream means that a relay dies again and again.",
        ),
        "atlasco_loader_dead_letters": _counter(
            "{record}",
            "Records that could not be decoded and went to the dead-letter topic.",
            "Any: answers that may lack them are marked incomplete. The log says why; mend, then run "
            "`atlasco load --redrive`.",
        ),
        "atlasco_loader_retries": _counter(
            "{attempt}",
            "Loads that failed and were tried again.",
            "Rising: the warehouse, the staging bucket or Kafka does not answer; the log says which.",
        ),
        "atlasco_loader_buffer_bytes": _gauge(
            "By",
            "Memory held by changes that wait for a load or are in one.",
            "At its bound for long: loads are slower than the log; see the load duration.",
        ),
        "atlasco_loader_halted_partitions": _gauge(
            "{partition}",
            "Partitions that cannot go on, because the log lacks records or the topic was made anew.",
            "Any: nothing is lost, but the warehouse stands still there. Run `atlasco rebuild`.",
        ),
        "atlasco_loader_lag_records": _gauge(
            "{record}",
            "Records of the log that are not in the warehouse yet, over the partitions of this loader; absent until "
            "known.",
            "Growing: loads are slower than the log, or fail; see the load duration and retries. Add loaders, up to "
            "the number of partitions.",
        ),
        "atlasco_loader_behind_seconds": _gauge(
            "s",
            "Age, on the primary's clock, of the moment through which the warehouse is complete, as of this loader's "
            "last load; absent until known.",
            "Far above the load age while the lag is small: no watermarks come, see the relay's incompleteness. Else "
            "as for the lag; a halted partition makes it grow for ever.",
        ),
        "atlasco_loader_load_duration_seconds": _histogram(
            "s",
            "One load, from full buffers to the warehouse's commit, retries included.",
            "Above the load age: loads pile up; look at the warehouse.",
            LATENCY_BUCKETS,
        ),
        "atlasco_rollup_lag_seconds": _gauge(
            "s",
            "Age of the moment through which rollups and projections are complete.",
            "Rising: the worker does not keep up, or none works; queries read raw data, and the outbox is kept.",
        ),
        "atlasco_rollup_active": _gauge(
            "1",
            "1 in the worker that has the lease, 0 in those that stand by.",
            "No worker with 1: see the logs; leases need the database.",
        ),
        "atlasco_rollup_rounds": _counter(
            "{round}", "Rounds over the outbox that found something.", "Zero while readings are written: see the lag."
        ),
        "atlasco_rollup_minutes_computed": _counter(
            "{bucket}",
            "Buckets of a minute computed from readings.",
            "Many times the minutes that pass for each series: late readings, or rounds too short (the poll interval).",
        ),
        "atlasco_rollup_rows_refreshed": _counter(
            "{row}", "Rows of projections compared with the latest values.", "For sizing projections."
        ),
        "atlasco_rollup_backfills_pending": _gauge(
            "{declaration}",
            "Rollups and projections that are not filled yet.",
            "For hours: look at the list with `atlasco projection list`; it moves, or its problem says why not.",
        ),
        "atlasco_rollup_failed": _gauge(
            "{declaration}",
            "Rollups and projections that are out of service because the database refused their work.",
            "`atlasco rollup list` and `atlasco projection list` say why. Each is filled anew after ten minutes; one "
            "that fails again needs what its problem names.",
        ),
        "atlasco_rollup_failures": _counter(
            "{failure}",
            "What kept the worker from going on, by source. It is tried again.",
            "database: see whether it answers. lease: another worker took over, after a pause of this one. data: a "
            "batch or a step cannot be carried out, or a tenant's rollups are out of service for a while; the log "
            "names it.",
            {"source": ("database", "lease", "data")},
        ),
        "atlasco_rollup_rewinds": _counter(
            "{rewind}",
            "Times the worker went over the outbox again (rewind), or began anew (renumber).",
            "Expected once after a failover or a restore.",
            {"reason": ("rewind", "renumber")},
        ),
        "atlasco_deletions_open": _gauge(
            "{operation}",
            "Devices whose deletion was ordered and has not ended.",
            "For hours: the operations say at which step, and what failed.",
        ),
        "atlasco_deletions_failing": _gauge(
            "{operation}",
            "Of these, those whose last attempt failed.",
            "Any for long: the operation's problem and the worker's log say what failed; it is tried again.",
        ),
        "atlasco_deletion_oldest_seconds": _gauge(
            "s",
            "Since the oldest deletion that has not ended was ordered; 0 when there is none.",
            "Beyond a day: a step fails, the worker is away, or the warehouse stands still.",
        ),
        "atlasco_deletion_readings": _counter(
            "{reading}", "Readings of deleted devices removed from history.", "Zero with deletions open: see the log."
        ),
        "atlasco_event_loop_lag_seconds": _histogram(
            "s",
            "How late a timer of the event loop fires: time in which nothing else could run.",
            "Above 50 ms: something computes or blocks on the loop; everything waits for it, acks included.",
            LATENCY_BUCKETS,
        ),
    }
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
