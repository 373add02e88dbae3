"""The gateway's configuration; that of its TLS is in tls.py."""

from dataclasses import dataclass

from runtime.config import (
    REQUIRED,
    Address,
    address,
    boolean,
    byte_size,
    duration,
    positive_int,
    setting,
)


@dataclass(frozen=True)
class GatewayConfig:
    """Settings of one gateway process. Durations are seconds, sizes bytes."""

    dsn: str = setting(
        "ATLASCO_DSN", REQUIRED, "PostgreSQL that takes the writes: connection string or URI.", secret=True
    )
    query_dsn: str = setting(
        "ATLASCO_QUERY_DSN", "", "PostgreSQL for queries, as the query role; the same as ATLASCO_DSN when empty.",
        secret=True,
    )  # fmt: skip
    listen: Address = setting(
        "ATLASCO_LISTEN", Address("127.0.0.1", 7070), "Where devices and services connect.", parse=address
    )
    register_tenants: bool = setting(
        "ATLASCO_REGISTER_TENANTS", False, "Register a tenant on first sight; otherwise by `atlasco tenant create`.",
        parse=boolean,
    )  # fmt: skip
    query_connections: int = setting(
        "ATLASCO_QUERY_CONNECTIONS", 4, "Database connections for queries.", parse=positive_int
    )
    registry_connections: int = setting(
        "ATLASCO_REGISTRY_CONNECTIONS", 2, "Database connections for hellos and registration.", parse=positive_int
    )
    unary_connections: int = setting(
        "ATLASCO_UNARY_CONNECTIONS", 2, "Database connections for unary writes; as many run at once.",
        parse=positive_int,
    )  # fmt: skip
    flush_readings: int = setting(
        "ATLASCO_FLUSH_READINGS", 20_000, "A lane flushes at so many readings.", parse=positive_int
    )
    flush_bytes: int = setting("ATLASCO_FLUSH_BYTES", 4 << 20, "A lane flushes at so many bytes.", parse=byte_size)
    flush_age: float = setting(
        "ATLASCO_FLUSH_AGE", 0.02, "A lane flushes when its oldest message has waited so long.", parse=duration
    )
    queue_readings: int = setting(
        "ATLASCO_QUEUE_READINGS", 400_000, "Readings that may wait in the gateway.", parse=positive_int
    )
    tenant_queue_readings: int = setting(
        "ATLASCO_TENANT_QUEUE_READINGS", 200_000, "Readings of one tenant that may wait.", parse=positive_int
    )
    credit_messages: int = setting(
        "ATLASCO_CREDIT_MESSAGES", 64, "Unacked messages a device may have out.", parse=positive_int
    )
    credit_bytes: int = setting(
        "ATLASCO_CREDIT_BYTES", 1 << 20, "Unacked bytes a device may have out.", parse=byte_size
    )
    max_message_bytes: int = setting(
        "ATLASCO_MAX_MESSAGE_BYTES", 1 << 20, "Largest message; a larger one is rejected whole.", parse=byte_size
    )
    max_readings_per_message: int = setting(
        "ATLASCO_MAX_READINGS_PER_MESSAGE", 10_000, "Most readings in one message.", parse=positive_int
    )
    max_batch_readings: int = setting(
        "ATLASCO_MAX_BATCH_READINGS", 50_000, "Most readings in one unary write.", parse=positive_int
    )
    max_string_bytes: int = setting(
        "ATLASCO_MAX_STRING_BYTES", 4096, "Longest text value, in bytes of UTF-8.", parse=byte_size
    )
    max_aliases: int = setting("ATLASCO_MAX_ALIASES", 10_000, "Most aliases of one stream.", parse=positive_int)
    max_unconfirmed: int = setting(
        "ATLASCO_MAX_UNCONFIRMED", 1_000, "Messages whose rejections a device may leave unconfirmed.",
        parse=positive_int,
    )  # fmt: skip
    hello_timeout: float = setting("ATLASCO_HELLO_TIMEOUT", 10.0, "How long a hello may take.", parse=duration)
    idle_timeout: float = setting(
        "ATLASCO_IDLE_TIMEOUT", 900.0, "A stream on which nothing comes for so long is told to reconnect.",
        parse=duration,
    )  # fmt: skip
    max_stream_age: float = setting(
        "ATLASCO_MAX_STREAM_AGE", 1800.0, "A stream is told to reconnect at this age, give or take a fifth.",
        parse=duration,
    )  # fmt: skip
    write_timeout: float = setting(
        "ATLASCO_WRITE_TIMEOUT", 30.0, "How long a client may leave its acks unread.", parse=duration
    )
    throttle_after: float = setting(
        "ATLASCO_THROTTLE_AFTER", 1.0, "A device whose message has waited for room so long is told to pause.",
        parse=duration,
    )  # fmt: skip
    drain_timeout: float = setting(
        "ATLASCO_DRAIN_TIMEOUT", 20.0, "On SIGTERM: how long streams have to leave.", parse=duration
    )
    reconnect_delay: float = setting(
        "ATLASCO_RECONNECT_DELAY", 5.0, "Devices told to leave come back within this time, at random.", parse=duration
    )
    max_streams: int = setting(
        "ATLASCO_MAX_STREAMS", 50_000, "Device streams this process serves at once.", parse=positive_int
    )
    max_concurrent_queries: int = setting(
        "ATLASCO_MAX_CONCURRENT_QUERIES", 64, "Queries that run or wait at once.", parse=positive_int
    )
    max_tenant_queries: int = setting(
        "ATLASCO_MAX_TENANT_QUERIES", 48, "Queries of one tenant that run or wait at once.", parse=positive_int
    )
    max_tenant_exports: int = setting(
        "ATLASCO_MAX_TENANT_EXPORTS", 16, "Exports of one tenant that are open at once.", parse=positive_int
    )
    export_patience: float = setting(
        "ATLASCO_EXPORT_PATIENCE", 60.0, "An export is ended when its client leaves a message unread for so long.",
        parse=duration,
    )  # fmt: skip
    replica_dsns: str = setting(
        "ATLASCO_REPLICA_DSNS", "", "Streaming replicas for queries, as the query role: connection strings or URIs, "
        "separated by ';'.", secret=True,
    )  # fmt: skip
    replica_connections: int = setting(
        "ATLASCO_REPLICA_CONNECTIONS", 4, "Database connections for queries, to each replica.", parse=positive_int
    )
    beat_interval: float = setting(
        "ATLASCO_BEAT_INTERVAL", 0.03, "Between two heartbeats, by which replicas prove their freshness.",
        parse=duration,
    )  # fmt: skip
    max_fallback_queries: int = setting(
        "ATLASCO_MAX_FALLBACK_QUERIES", 16,
        "Queries at once that the primary takes over from a replica or a warehouse that fails.", parse=positive_int,
    )  # fmt: skip
    warehouse_queries: int = setting(
        "ATLASCO_WAREHOUSE_QUERIES", 2, "Queries at once in the warehouse; twice as many may wait.", parse=positive_int
    )
    warehouse_measured: float = setting(
        "ATLASCO_WAREHOUSE_MEASURED", 15.0,
        "How old the measurement may be of how far Redshift has come; each one costs it a transaction.",
        parse=duration,
    )  # fmt: skip
    critical_staleness: float = setting(
        "ATLASCO_CRITICAL_STALENESS", 0.0, "How stale an answer of tier CRITICAL may be.", parse=duration
    )
    dashboard_staleness: float = setting(
        "ATLASCO_DASHBOARD_STALENESS", 0.1, "How stale an answer of tier DASHBOARD may be.", parse=duration
    )
    report_staleness: float = setting(
        "ATLASCO_REPORT_STALENESS", 30.0,
        "How stale an answer of tier REPORT may be; from here on the warehouse is asked.", parse=duration,
    )  # fmt: skip
    analytics_staleness: float = setting(
        "ATLASCO_ANALYTICS_STALENESS", 900.0,
        "How stale an answer of tier ANALYTICS may be; from here on the warehouse is asked first.", parse=duration,
    )  # fmt: skip
    session_retention: float = setting(
        "ATLASCO_SESSION_RETENTION",
        30 * 86_400.0,
        "How long `atlasco maintain`, which reads the same variable, keeps unused sessions; told to devices.",
        parse=duration,
    )  # fmt: skip

    @property
    def replicas(self) -> tuple[str, ...]:
        """The connection strings of the replicas."""
        return tuple(filter(None, (dsn.strip() for dsn in self.replica_dsns.split(";"))))

    def __post_init__(self) -> None:
        if self.tenant_queue_readings > self.queue_readings:
            raise ValueError("ATLASCO_TENANT_QUEUE_READINGS is above ATLASCO_QUEUE_READINGS")
        if self.max_tenant_queries > self.max_concurrent_queries:
            raise ValueError("ATLASCO_MAX_TENANT_QUERIES is above ATLASCO_MAX_CONCURRENT_QUERIES")
        tiers = (self.critical_staleness, self.dashboard_staleness, self.report_staleness, self.analytics_staleness)
        if list(tiers) != sorted(tiers):
            raise ValueError("the tiers' staleness must not fall from CRITICAL over DASHBOARD and REPORT to ANALYTICS")
        if self.max_message_bytes >= HARD_MESSAGE_BYTES:
            raise ValueError(f"ATLASCO_MAX_MESSAGE_BYTES must stay below {HARD_MESSAGE_BYTES}, the transport's limit")


# The transport refuses larger messages before the gateway sees them, and ends the stream. Above max_message_bytes, so
# that a message somewhat too large gets a rejection instead.
HARD_MESSAGE_BYTES = 4 << 20
