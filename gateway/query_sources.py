"""The sources of the query service, from the gateway's settings."""

from contextlib import AsyncExitStack
from dataclasses import dataclass

from gateway.config import GatewayConfig
from gateway.query import QueryLimits
from gateway.query_freshness import TierBounds
from router.clock import PrimaryClock
from router.database import DatabaseSource
from router.execute import Router
from router.plan import Policy, SourceKind
from router.warehouse import WarehouseSource
from router.watch import Watch, WatchSettings
from storage.database import Pool, PoolSettings, Role, make_pool
from storage.reads.tenants import TenantDirectory
from storage.warehouse.port import Warehouse


@dataclass(frozen=True, slots=True)
class Sources:
    """The router, its clock, and the watch that keeps both up to date while `watch.run()` runs."""

    router: Router
    clock: PrimaryClock
    watch: Watch


def query_limits(config: GatewayConfig) -> QueryLimits:
    """The bounds of the query service."""
    return QueryLimits(
        concurrency=config.max_concurrent_queries,
        tenant_concurrency=config.max_tenant_queries,
        tenant_exports=config.max_tenant_exports,
        export_patience_s=config.export_patience,
        tiers=TierBounds(
            config.critical_staleness, config.dashboard_staleness, config.report_staleness, config.analytics_staleness
        ),
    )


async def open_sources(
    stack: AsyncExitStack, config: GatewayConfig, query_pool: Pool, warehouse: Warehouse | None
) -> Sources:
    """Open what the settings name; everything but `query_pool` and `warehouse` is closed with the stack.

    A replica that is down does not keep a gateway from starting: it is used once it is up.
    """
    clock = PrimaryClock()
    tenants = TenantDirectory()
    primary = DatabaseSource(query_pool, tenants, clock)
    beats = await _open(stack, PoolSettings(config.dsn, Role.INGEST, "heartbeat", max_size=1))
    replicas = []
    for number, dsn in enumerate(config.replicas, 1):
        name = f"replica-{number}"
        pool = await _open(stack, PoolSettings(dsn, Role.QUERY, name, max_size=config.replica_connections))
        probes = await _open(stack, PoolSettings(dsn, Role.QUERY, f"{name}-probe", max_size=1))
        source = DatabaseSource(pool, tenants, clock, kind=SourceKind.REPLICA, name=name)
        stack.push_async_callback(source.close)
        replicas.append((source, probes))
    behind = None
    if warehouse is not None:
        behind = WarehouseSource(warehouse, concurrency=config.warehouse_queries)
        stack.callback(behind.close)
    router = Router(
        primary,
        clock,
        replicas=[source for source, _ in replicas],
        warehouse=behind,
        policy=Policy(
            analytical_us=int(config.analytics_staleness * 1e6), report_us=int(config.report_staleness * 1e6)
        ),
        fallback_limit=config.max_fallback_queries,
    )
    settings = WatchSettings(beat_s=config.beat_interval)
    watch = Watch(clock, primary, beats, replicas=replicas, warehouse=behind, settings=settings)
    return Sources(router, clock, watch)


async def _open(stack: AsyncExitStack, settings: PoolSettings) -> Pool:
    pool = make_pool(settings)
    stack.push_async_callback(pool.close)
    await pool.open(wait=False)
    return pool
