"""The gateway process: its parts put together, started, and stopped in order."""

import asyncio
import gc
import logging
from contextlib import AsyncExitStack
from dataclasses import replace

import grpc
from atlasco.telemetry.v1 import admin_pb2, admin_pb2_grpc, query_pb2, query_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection
from psycopg_pool import PoolTimeout

from gateway.auth import Authenticator, DevelopmentAuthenticator, MutualTlsAuthenticator
from gateway.batch import Committer
from gateway.config import HARD_MESSAGE_BYTES, GatewayConfig
from gateway.ingest import SERVICE, IngestService
from gateway.lanes import FlushLimits, Lanes
from gateway.query import QueryServicer
from gateway.query_admin import AdminServicer
from gateway.query_metrics import report_sources
from gateway.query_sources import open_sources, query_limits
from gateway.room import Room
from gateway.tls import ServerCertificates, TlsConfig
from gateway.unary import UnaryWriter
from runtime.admin import AdminServer
from runtime.config import Address, ConfigError
from runtime.metrics import Metrics
from runtime.process import DependencyUnreachable, ExitCode, Shutdown
from runtime.tracing import Tracing
from storage.commit import Writer
from storage.database import Pool, PoolSettings, Role, make_pool
from storage.errors import StorageError
from storage.migrations import schema_state
from storage.outbox import ensure_outbox
from storage.partitions import HistoryCoverage
from storage.registry import Registry
from storage.warehouse.port import Warehouse

log = logging.getLogger(__name__)

QUERY_SERVICE = query_pb2.DESCRIPTOR.services_by_name["QueryService"].full_name
ADMIN_SERVICE = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name

# How long the databases may take to answer at start, in seconds.
_DATABASE_START_S = 30.0
# Each lane has a connection: one that waits for it waits for the server, and devices are to be told so.
_LANE_WAITS_S = 1.0
# Between two looks at the outbox's partitions, which are made for three hours ahead.
_OUTBOX_AHEAD_S = 1800.0


def server_options() -> list[tuple[str, int]]:
    """Transport settings; the keepalive numbers are part of the protocol (ingest.proto)."""
    return [
        ("grpc.max_receive_message_length", HARD_MESSAGE_BYTES),
        ("grpc.max_send_message_length", 64 << 20),
        # The default calls a ping within five minutes abuse, and cuts the connection; NAT forgets sooner.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 25_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Finds peers that vanished without a word.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_metadata_size", 16 * 1024),
        ("grpc.server_handshake_timeout_ms", 10_000),
        # Two gateways on one port would each get half the connections, unnoticed.
        ("grpc.so_reuseport", 0),
    ]


async def serve(
    config: GatewayConfig,
    tls: TlsConfig,
    admin: AdminServer,
    metrics: Metrics,
    shutdown: Shutdown,
    warehouse: Warehouse | None = None,
    tracing: Tracing | None = None,
) -> ExitCode:
    """Run a gateway until `shutdown` is requested, then drain it. `warehouse` answers analytical queries;
    `tracing` gets a span for each flush and for each query.

    The drain, in order: health says NOT_SERVING, so that balancers stop sending; streams get a ReconnectNotice; what
    was received is committed and acked; the port closes; the lanes empty; the pools close.

    Raises:
        DependencyUnreachable: the database does not answer, or its schema is not the one this program needs.
        ConfigError: the settings contradict each other.
    """
    async with AsyncExitStack() as stack:
        certificates = await stack.enter_async_context(ServerCertificates(tls, metrics)) if tls.enabled else None
        authenticator: Authenticator = (
            MutualTlsAuthenticator(tls.trust_domain) if tls.enabled else DevelopmentAuthenticator(config.listen)
        )
        await _check_schema(config.dsn)
        registry_pool = await _open(stack, metrics, config.dsn, Role.INGEST, "registry", config.registry_connections)
        registry = Registry(
            registry_pool, register_tenants=config.register_tenants, clock=asyncio.get_running_loop().time
        )
        settings = await registry.settings()
        write_pool = await _open(stack, metrics, config.dsn, Role.INGEST, "write", settings.lanes, wait_s=_LANE_WAITS_S)
        unary_pool = await _open(stack, metrics, config.dsn, Role.INGEST, "unary", config.unary_connections)
        query_pool = await _open(
            stack, metrics, config.query_dsn or config.dsn, Role.QUERY, "query", config.query_connections
        )
        committer = Committer(
            registry, HistoryCoverage(registry_pool), registry_pool, metrics, max_string_bytes=config.max_string_bytes
        )
        room = Room(per_tenant=config.tenant_queue_readings, total=config.queue_readings)
        lanes = Lanes(
            settings,
            committer,
            lambda: Writer(write_pool, buckets=settings.buckets),
            room,
            FlushLimits(config.flush_readings, config.flush_bytes, config.flush_age),
            metrics,
            (tracing or Tracing("atlasco-gateway")).tracer("gateway.lanes"),
        )
        unary = UnaryWriter(committer, registry, room, settings, config, Writer(unary_pool, buckets=settings.buckets))
        ingest = IngestService(authenticator, registry, lanes, unary, config, metrics)
        sources = await open_sources(stack, config, query_pool, warehouse)
        report_sources(metrics, sources.router, sources.clock, config.max_fallback_queries)
        query = QueryServicer(
            sources.router,
            sources.clock,
            authenticator,
            metrics,
            limits=query_limits(config),
            # A span that goes nowhere would cost every query a little all the same.
            tracer=tracing.tracer("gateway.query") if tracing is not None and tracing.exported else None,
        )

        server = grpc.aio.server(options=server_options())
        health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        reflection.enable_server_reflection(
            (
                SERVICE,
                QUERY_SERVICE,
                ADMIN_SERVICE,
                health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
                reflection.SERVICE_NAME,
            ),
            server,
        )
        _serve_calls(server, ingest, query, AdminServicer(registry_pool, registry, authenticator))
        listening = _listen(server, config.listen, certificates)

        async def writes() -> str | None:
            return lanes.trouble

        async def staying() -> str | None:
            return "the gateway is stopping" if shutdown.requested else None

        admin.add_check("writes", writes)
        admin.add_check("staying", staying)
        await stack.enter_async_context(admin)
        async with asyncio.TaskGroup() as group:
            writing = group.create_task(lanes.run(), name="lanes")
            background = (
                group.create_task(ingest.watch_credentials(), name="credentials"),
                group.create_task(_keep_outbox(registry_pool), name="outbox partitions"),
                group.create_task(sources.watch.run(), name="sources"),
            )
            await _begin_serving(server, health)
            log.info("gateway serving", extra={"address": str(listening), "admin": str(admin.address)})
            await shutdown.wait()

            log.info("gateway draining", extra={"reason": shutdown.reason})
            await health.enter_graceful_shutdown()
            await ingest.drain()
            await server.stop(grace=1.0)
            lanes.close()
            for task in background:
                task.cancel()
            try:
                async with asyncio.timeout(config.drain_timeout):
                    await asyncio.wait({writing})
            except TimeoutError:
                # Not acked, so not lost: the devices hold what is dropped here.
                log.error("readings that could not be written were given up", extra={"readings": room.used})
                writing.cancel()
                return ExitCode.FAILED
        log.info("gateway stopped")
        return ExitCode.OK


async def _begin_serving(server: grpc.aio.Server, health: HealthServicer) -> None:
    # What start-up made stays for good. A full collection that walks it would hold up every stream and query for tens
    # of milliseconds, each time.
    gc.collect()
    gc.freeze()
    await server.start()
    for service in ("", SERVICE, QUERY_SERVICE, ADMIN_SERVICE):
        await health.set(service, health_pb2.HealthCheckResponse.SERVING)


def _serve_calls(server: grpc.aio.Server, ingest: IngestService, query: QueryServicer, tenant: AdminServicer) -> None:
    server.add_generic_rpc_handlers((ingest.handler(),))
    query_pb2_grpc.add_QueryServiceServicer_to_server(query, server)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(tenant, server)


async def _keep_outbox(pool: Pool) -> None:
    while True:
        try:
            await ensure_outbox(pool)
        except StorageError as error:
            log.warning("outbox partitions could not be made ahead", extra={"problem": str(error)})
        await asyncio.sleep(_OUTBOX_AHEAD_S)


async def _check_schema(dsn: str) -> None:
    try:
        async with asyncio.timeout(_DATABASE_START_S):
            state = await schema_state(dsn)
    except Exception as error:
        raise DependencyUnreachable(f"the database does not answer (ATLASCO_DSN): {error}") from error
    if state.pending:
        names = ", ".join(str(migration) for migration in state.pending)
        raise DependencyUnreachable(f"the database's schema is behind this program ({names}): run `atlasco migrate`")


async def _open(
    stack: AsyncExitStack, metrics: Metrics, dsn: str, role: Role, name: str, size: int, *, wait_s: float = 30.0
) -> Pool:
    pool = make_pool(PoolSettings(dsn=dsn, role=role, name=name, max_size=size, timeout_s=wait_s))
    stack.push_async_callback(pool.close)
    try:
        await pool.open(wait=True, timeout=_DATABASE_START_S)
    except PoolTimeout as error:
        raise DependencyUnreachable(f"the {name} pool could not connect to the database: {error}") from error
    for gauge, statistic in (
        ("atlasco_pool_connections", "pool_size"),
        ("atlasco_pool_waiting", "requests_waiting"),
    ):
        metrics.gauge(gauge, lambda s=statistic: pool.get_stats().get(s, 0), pool=name)  # type: ignore[misc, arg-type]
    metrics.gauge(
        "atlasco_pool_connections_in_use",
        lambda: pool.get_stats().get("pool_size", 0) - pool.get_stats().get("pool_available", 0),
        pool=name,
    )
    return pool


def _listen(server: grpc.aio.Server, address: Address, certificates: ServerCertificates | None) -> Address:
    try:
        if certificates is None:
            port = server.add_insecure_port(str(address))
        else:
            port = server.add_secure_port(str(address), certificates.credentials())
    except RuntimeError as error:
        # gRPC gives no reason here; it writes the system's to its own log.
        raise ConfigError(
            [f"ATLASCO_LISTEN: cannot listen on {address}: the address is in use, or not of this machine"]
        ) from error
    return replace(address, port=port)
