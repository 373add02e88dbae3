"""The configuration of an embedded PostgreSQL: what is ours, what a caller may choose."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from embedded.ports import LOOPBACK

DEFAULTS: Mapping[str, str] = {
    # Durability is what an ack promises: never relaxed by default, not even for speed in tests.
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    # A replica can be attached at any time.
    "wal_level": "replica",
    "max_wal_senders": "8",
    "max_replication_slots": "8",
    "hot_standby": "on",
    # A slot nobody reads any more must not fill the disk.
    "max_slot_wal_keep_size": "2GB",
    # Modest: it shares the machine with everything else.
    "shared_buffers": "128MB",
    "max_connections": "100",
    "max_wal_size": "1GB",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %q%u@%d ",
}
"""Settings of a server unless `settings` say otherwise."""

_OURS = frozenset({"port", "listen_addresses", "unix_socket_directories", "data_directory", "hba_file"})


def check_names(settings: Mapping[str, str]) -> None:
    """Errors: ValueError for a setting that is ours to make, or that is no name at all."""
    for name, value in settings.items():
        if not re.fullmatch(r"[A-Za-z_][\w.]*", name) or name in _OURS or "\n" in value:
            raise ValueError(f"{name!r} is not a setting that can be given here")


def render(settings: Mapping[str, str], port: int, socket_dir: Path | None) -> str:
    """Return the text of the configuration file that the cluster includes."""
    complete = {
        **settings,
        "listen_addresses": LOOPBACK,
        "port": str(port),
        "unix_socket_directories": str(socket_dir or ""),
    }
    lines = ["# Written at each start: changes made here are lost."]
    lines += [f"{name} = '{_quoted(value)}'" for name, value in complete.items()]
    return "\n".join(lines) + "\n"


def _quoted(value: str) -> str:
    return value.replace("\\", "\\\\").replace("'", "''")
