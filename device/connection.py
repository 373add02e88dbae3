"""How a client reaches the gateway: identity, encryption, and HTTP/2 connections that many clients may share."""

import zlib
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from device.errors import ClientClosedError

# The server welcomes pings at most every 30 s (KEEPALIVE in ingest.proto); more often ends the connection.
MIN_KEEPALIVE_S = 30.0
# The transport's hard limit on one message, in either direction.
_MAX_MESSAGE_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class DevelopmentIdentity:
    """Who the client says it is, for gateways that listen on loopback only and believe it.

    Exactly one of `device` and `service` is set. Against mutual TLS the identity is in the certificate instead.
    """

    tenant: str
    device: str = ""
    service: str = ""

    def __post_init__(self) -> None:
        if bool(self.device) == bool(self.service):
            raise ValueError("an identity is a device or a service")

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The request metadata that carries it."""
        role = ("atlasco-device", self.device) if self.device else ("atlasco-service", self.service)
        return (("atlasco-tenant", self.tenant), role)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files for mutual TLS: the roots the server is checked against, and the client's certificate and key."""

    root_certificates: Path
    certificate_chain: Path
    private_key: Path
    # The name the server's certificate is checked for, where it is not the name in the target.
    server_name: str = ""

    def credentials(self) -> grpc.ChannelCredentials:
        """The channel credentials. Raises OSError when a file cannot be read."""
        return grpc.ssl_channel_credentials(
            self.root_certificates.read_bytes(),
            self.private_key.read_bytes(),
            self.certificate_chain.read_bytes(),
        )


def open_channel(target: str, *, tls: TlsFiles | None = None, keepalive_s: float = 40.0) -> grpc.aio.Channel:
    """A channel with a connection of its own. Must be called in the event loop that will use it.

    Raises ValueError for a keepalive interval the server would not bear, OSError for unreadable TLS files.
    """
    if keepalive_s < MIN_KEEPALIVE_S:
        raise ValueError(f"the keepalive interval must be at least {MIN_KEEPALIVE_S:g} s")
    options: list[tuple[str, str | int]] = [
        ("grpc.keepalive_time_ms", int(keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # Channels with equal arguments share one connection, and with it the server's bound on streams per
        # connection, unless each has a pool of its own.
        ("grpc.use_local_subchannel_pool", 1),
        # A channel waits out its own backoff before it connects again, on top of the client's; kept short, for
        # it is one attempt per channel however many devices share it.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ]
    if tls is None:
        return grpc.aio.insecure_channel(target, options)
    if tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return grpc.aio.secure_channel(target, tls.credentials(), options)


class ChannelPool:
    """`connections` channels to one target, shared by many clients of one process.

    One HTTP/2 connection carries many device streams, bounded by the server's grpc.max_concurrent_streams: a
    stream beyond it waits unseen. Choose connections ≥ devices / that bound.
    """

    def __init__(self, target: str, *, connections: int = 1, tls: TlsFiles | None = None) -> None:
        if connections < 1:
            raise ValueError("connections must be at least 1")
        self._target = target
        self._connections = connections
        self._tls = tls
        self._channels: list[grpc.aio.Channel] = []
        self._exit = AsyncExitStack()

    async def __aenter__(self) -> Self:
        for _ in range(self._connections):
            channel = open_channel(self._target, tls=self._tls)
            self._channels.append(await self._exit.enter_async_context(channel))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._channels.clear()
        await self._exit.aclose()

    def channel(self, device_id: str) -> grpc.aio.Channel:
        """The channel of this device; the same one every time. Raises ClientClosedError outside `async with`."""
        if not self._channels:
            raise ClientClosedError("the pool is not open")
        return self._channels[zlib.crc32(device_id.encode()) % len(self._channels)]
