"""Is the broker ready? Asked in Kafka's own protocol, without a client library.

An open port is not enough: a broker accepts connections before its controller has let it take part, and
until then clients are told that there is no broker.
"""

from __future__ import annotations

import socket
import struct

from embedded.ports import LOOPBACK

_METADATA, _VERSION = 3, 1
_CORRELATION = 0x41544C53
_LIMIT_BYTES = 1_000_000


def serves(port: int, timeout_s: float = 2) -> bool:
    """Tell whether a Kafka broker on this loopback port counts itself among the cluster's brokers."""
    # Header: key, version, correlation id, no client id. Body: an empty list of topics (none, not all).
    request = struct.pack(">hhihi", _METADATA, _VERSION, _CORRELATION, -1, 0)
    try:
        with socket.create_connection((LOOPBACK, port), timeout_s) as connection:
            connection.sendall(struct.pack(">i", len(request)) + request)
            (size,) = struct.unpack(">i", _read(connection, 4))
            if not 8 <= size <= _LIMIT_BYTES:
                return False  # whatever answers there, it is no Kafka
            correlation, brokers = struct.unpack(">ii", _read(connection, size)[:8])
    except (OSError, EOFError):
        return False
    return bool(correlation == _CORRELATION and brokers > 0)


def _read(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        chunk = connection.recv(size - len(received))
        if not chunk:
            raise EOFError
        received += chunk
    return received
