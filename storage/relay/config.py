"""Configuration of the relay."""

from dataclasses import dataclass

import psycopg
from psycopg.conninfo import conninfo_to_dict

from runtime.config import REQUIRED, Kind, byte_size, choice, duration, non_negative_int, positive_int, setting


def _read_dsn(text: str) -> str:
    try:
        conninfo_to_dict(text)
    except psycopg.ProgrammingError as error:
        raise ValueError("not a connection string") from error
    return text


connection_string = Kind(_read_dsn, "a connection string (host=… dbname=…) or a postgresql:// URI", metavar="DSN")
"""Reads a libpq connection string or URI."""


@dataclass(frozen=True)
class RelayConfig:
    """Relay."""

    dsn: str = setting(
        "ATLASCO_DSN", REQUIRED, "The primary, as a member of atlasco_relay.", parse=connection_string, secret=True
    )
    topic_partitions: int = setting(
        "ATLASCO_TOPIC_PARTITIONS", 12, "Partitions of the topic, when the relay makes it.", parse=positive_int
    )
    topic_replication: int = setting(
        "ATLASCO_TOPIC_REPLICATION",
        0,
        "Replicas of the topic, when the relay makes it; 0: the brokers' default. Use 3 in production.",
        parse=non_negative_int,
    )
    topic_retention_s: float = setting(
        "ATLASCO_TOPIC_RETENTION",
        7 * 86_400.0,
        "How long the topic keeps records, when the relay makes it.",
        parse=duration,
    )
    poll_s: float = setting(
        "ATLASCO_RELAY_POLL", 0.1, "Pause between looks at an outbox that had nothing more.", parse=duration
    )
    page_rows: int = setting("ATLASCO_RELAY_PAGE_ROWS", 500, "Outbox rows in one page of a lane.", parse=positive_int)
    page_bytes: int = setting(
        "ATLASCO_RELAY_PAGE_BYTES", 8 * 1024 * 1024, "Payload in one page of a lane.", parse=byte_size
    )
    watermark_s: float = setting(
        "ATLASCO_RELAY_WATERMARK", 1.0, "Interval of a lane's watermarks while data flows.", parse=duration
    )
    idle_watermark_s: float = setting(
        "ATLASCO_RELAY_IDLE_WATERMARK", 5.0, "Interval of a lane's watermarks while none does.", parse=duration
    )
    delivery_timeout_s: float = setting(
        "ATLASCO_RELAY_DELIVERY_TIMEOUT",
        30.0,
        "How long a record may wait for Kafka's confirmation before its page is tried again.",
        parse=duration,
    )
    lease_s: float = setting(
        "ATLASCO_RELAY_LEASE",
        15.0,
        "How long after its death another relay takes over a relay's lanes.",
        parse=duration,
    )
    retire_after: str = setting(
        "ATLASCO_RETIRE_AFTER",
        "loaded",
        "What an outbox partition must be before it is dropped; published is for deployments without a warehouse, "
        "never keeps all of it.",
        parse=choice("loaded", "published", "never"),
    )
    retire_margin_s: float = setting(
        "ATLASCO_RETIRE_MARGIN", 900.0, "How much longer an outbox partition is kept.", parse=duration
    )
    retire_interval_s: float = setting(
        "ATLASCO_RETIRE_INTERVAL", 60.0, "Interval of the search for outbox partitions to drop.", parse=duration
    )
    measure_interval_s: float = setting(
        "ATLASCO_RELAY_MEASURE_INTERVAL", 10.0, "Interval at which the outbox is measured.", parse=duration
    )

    def __post_init__(self) -> None:
        if self.lease_s < 1.0:
            raise ValueError("ATLASCO_RELAY_LEASE must be 1s or more: shorter ones are lost to any pause")
        if self.delivery_timeout_s < 1.0:
            raise ValueError("ATLASCO_RELAY_DELIVERY_TIMEOUT must be 1s or more")
