"""The loader's settings."""

from dataclasses import dataclass

from runtime.config import byte_size, duration, setting


@dataclass(frozen=True)
class LoaderConfig:
    """Loading the warehouse."""

    age_s: float = setting(
        "ATLASCO_LOAD_AGE",
        60.0,
        "A load begins at the latest when the oldest change waiting is this old: the warehouse's freshness.",
        parse=duration,
    )
    size_bytes: int = setting(
        "ATLASCO_LOAD_SIZE",
        64 * 1024 * 1024,
        "A load begins as soon as this much of the log waits.",
        parse=byte_size,
    )
    memory_bytes: int = setting(
        "ATLASCO_LOAD_MEMORY",
        512 * 1024 * 1024,
        "Decoded changes held at once; at the bound the loader stops reading the log.",
        parse=byte_size,
    )
    group: str = setting("ATLASCO_LOAD_GROUP", "atlasco-loader", "Consumer group of the loaders of one warehouse.")
    retry_s: float = setting(
        "ATLASCO_LOAD_RETRY",
        30.0,
        "Longest pause between attempts while the warehouse, the staging bucket or Kafka does not answer.",
        parse=duration,
    )
    session_s: float = setting(
        "ATLASCO_LOAD_SESSION",
        15.0,
        "A loader that is not heard of for this long loses its partitions to the others.",
        parse=duration,
    )
    compact_s: float = setting(
        "ATLASCO_WAREHOUSE_COMPACT_EVERY",
        600.0,
        "Time between two compactions of the warehouse by a loader; 0: none, run `atlasco warehouse compact`.",
        parse=duration,
    )

    def __post_init__(self) -> None:
        if self.session_s < 1:
            raise ValueError("ATLASCO_LOAD_SESSION must be at least 1s")
        if self.memory_bytes < 2 * self.size_bytes:
            raise ValueError("ATLASCO_LOAD_MEMORY must be at least twice ATLASCO_LOAD_SIZE")
