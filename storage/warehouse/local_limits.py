"""Bounds of a local warehouse, for it and for its upkeep."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LocalLimits:
    """Bounds of a local warehouse. Times in seconds."""

    # Longer than the longest query: files that were replaced are deleted after it.
    grace_s: float = 3600.0
    # Compaction aims at files of this size.
    file_bytes: int = 128 * 1024 * 1024
    # How long change records are remembered. The relay sends again only what the outbox still has, and that is
    # retired once it is loaded: two weeks is far longer than both.
    batch_memory_s: float = 14 * 86400.0
    query_threads: int = 2
    query_memory_bytes: int = 1024 * 1024 * 1024
    # How long a step waits for a connection to the catalog before it fails, to be tried again.
    catalog_timeout_s: float = 10.0
