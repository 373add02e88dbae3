"""Configuration of the worker of rollups, projections and deletions."""

from dataclasses import dataclass

from runtime.config import REQUIRED, byte_size, duration, positive_int, setting
from storage.relay.config import connection_string


@dataclass(frozen=True)
class RollupConfig:
    """Rollup."""

    dsn: str = setting(
        "ATLASCO_DSN", REQUIRED, "The primary, as a member of atlasco_rollup.", parse=connection_string, secret=True
    )
    poll_s: float = setting(
        "ATLASCO_ROLLUP_POLL",
        0.2,
        "Pause between looks at an outbox that had nothing more: how far rollups and projections are behind.",
        parse=duration,
    )
    page_rows: int = setting("ATLASCO_ROLLUP_PAGE_ROWS", 500, "Outbox rows of a lane in one round.", parse=positive_int)
    page_bytes: int = setting(
        "ATLASCO_ROLLUP_PAGE_BYTES", 8 * 1024 * 1024, "Payload of a lane in one round.", parse=byte_size
    )
    backfill_devices: int = setting(
        "ATLASCO_ROLLUP_BACKFILL_DEVICES",
        100,
        "Devices in one step of a rollup's back-fill, which takes six hours of their readings.",
        parse=positive_int,
    )
    settle_s: float = setting(
        "ATLASCO_DELETION_SETTLE",
        60.0,
        "How long after a device's last reading was deleted to look for more; longer than any write request may take.",
        parse=duration,
    )
    lease_s: float = setting(
        "ATLASCO_ROLLUP_LEASE", 15.0, "How long after its death another worker takes over.", parse=duration
    )
    measure_interval_s: float = setting(
        "ATLASCO_ROLLUP_MEASURE_INTERVAL", 10.0, "Interval at which the worker measures itself.", parse=duration
    )

    def __post_init__(self) -> None:
        if self.lease_s < 1.0:
            raise ValueError("ATLASCO_ROLLUP_LEASE must be 1s or more: shorter ones are lost to any pause")
