"""Loopback ports that an embedded server can keep for life."""

from __future__ import annotations

import random
import socket

LOOPBACK = "127.0.0.1"

# Below every default ephemeral range (Linux starts at 32768, others at 49152): a port from the
# ephemeral range could be taken by any outgoing connection while its server restarts, and the server
# would come back elsewhere, out of its clients' sight.
_FIRST, _LAST = 15_000, 29_999


def is_free(port: int) -> bool:
    """Tell whether a server could listen on this loopback port now (nothing is reserved)."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: connections in TIME_WAIT from a server's former life do not block it.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """Pick a free loopback port at random. Not reserved: a caller that loses the race picks again."""
    for _ in range(200):
        port = random.randint(_FIRST, _LAST)
        if is_free(port):
            return port
    raise OSError(f"no free port found in {_FIRST}-{_LAST} on {LOOPBACK}")
