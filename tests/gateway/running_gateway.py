"""A whole gateway in the test's own process, on a real port and a real database."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from embedded.ports import free_port
from gateway.config import GatewayConfig
from gateway.server import serve
from gateway.tls import TlsConfig
from runtime.admin import AdminConfig, AdminServer
from runtime.config import Address
from runtime.metrics import OpenTelemetryMetrics
from runtime.process import Shutdown
from runtime.tracing import Tracing
from storage.warehouse.port import Warehouse
from tests.storage.conftest import Database
from tests.waiting import PATIENCE_S


@dataclass
class RunningGateway:
    """A gateway that serves; `stop` drains it."""

    target: str
    config: GatewayConfig
    metrics: OpenTelemetryMetrics
    admin: AdminServer
    shutdown: Shutdown
    task: "asyncio.Task[int]"
    channel: grpc.aio.Channel

    async def stop(self) -> int:
        """Ask it to end, as SIGTERM does, and wait for it; returns its exit code."""
        self.shutdown.request("test")
        async with asyncio.timeout(PATIENCE_S):
            return await self.task


@asynccontextmanager
async def running_gateway(
    database: Database, *, warehouse: Warehouse | None = None, tracing: Tracing | None = None, **changes: Any
) -> AsyncIterator[RunningGateway]:
    """`changes` are fields of GatewayConfig. A drain has all the time of a test: one cut short drops what it has."""
    settings: dict[str, Any] = {
        "dsn": database(user="test_ingest"),
        "query_dsn": database(user="test_query"),
        "listen": Address("127.0.0.1", free_port()),
        "register_tenants": True,
        "hello_timeout": PATIENCE_S,
        "drain_timeout": PATIENCE_S,
        "reconnect_delay": 0.05,
    }
    config = GatewayConfig(**{**settings, **changes})
    metrics = OpenTelemetryMetrics("atlasco-gateway")
    admin = AdminServer(AdminConfig(listen=Address("127.0.0.1", 0)), metrics)
    shutdown = Shutdown()
    task: asyncio.Task[int] = asyncio.create_task(
        _as_int(serve(config, TlsConfig(), admin, metrics, shutdown, warehouse, tracing))
    )
    channel = new_channel(str(config.listen))
    try:
        ready = asyncio.create_task(channel.channel_ready())
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.wait({ready, task}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            ready.cancel()
            raise AssertionError(f"the gateway ended at once: {task.result()}")
        yield RunningGateway(str(config.listen), config, metrics, admin, shutdown, task, channel)
    finally:
        # First, for some tests leave their streams open, and the drain would wait for them.
        await channel.close()
        shutdown.request("end of test")
        await asyncio.wait({task}, timeout=PATIENCE_S)
        metrics.close()
        # A gateway that crashed fails the test that noticed nothing else.
        task.result()


def new_channel(target: str, **options: int) -> grpc.aio.Channel:
    """A connection of its own, which tries again quickly."""
    arguments = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 200),
        ("grpc.max_send_message_length", 64 << 20),
        *((f"grpc.{name}", value) for name, value in options.items()),
    ]
    return grpc.aio.insecure_channel(target, arguments)


async def _as_int(code: Awaitable[int]) -> int:
    return int(await code)
