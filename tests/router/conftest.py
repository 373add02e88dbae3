"""A primary, a real streaming replica of it, and a gateway that knows both."""

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
import pytest

from embedded.ports import free_port
from embedded.postgres import EmbeddedPostgres
from embedded.replica import StreamingReplica
from router.clock import PrimaryClock
from router.database import DatabaseSource
from router.execute import Router
from router.plan import Policy
from router.warehouse import WarehouseSource
from storage.database import Pool, PoolSettings, Role, make_pool
from storage.heartbeat import beat
from storage.reads.tenants import TenantDirectory
from tests.gateway.running_gateway import RunningGateway, running_gateway
from tests.router.platform import Platform
from tests.router.router_support import DATABASE, Pair, prepared
from tests.storage.conftest import Database
from tests.warehouse.conftest import (
    catalog_database,
    certificate,
    database,
    local,
    postgres,
    redshift,
    s3,
    stand_in,
    warehouse,
)

__all__ = [
    "catalog_database",
    "certificate",
    "database",
    "local",
    "postgres",
    "redshift",
    "s3",
    "stand_in",
    "warehouse",
]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """Shared by the tests of a module; each leaves the replica running and caught up."""
    with tempfile.TemporaryDirectory(prefix="atlasco-router-") as name:
        directory = Path(name)
        with EmbeddedPostgres(directory / "primary") as primary:
            prepared(primary)
            replica = StreamingReplica(primary, directory / "replica", port=free_port())
            replica.start()
            try:
                yield Pair(primary, replica)
            finally:
                replica.kill()
                replica.stop()
                with psycopg.connect(primary.dsn(), autocommit=True) as connection:
                    connection.execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")


@pytest.fixture(scope="module")
async def gateway(pair: Pair) -> AsyncIterator[RunningGateway]:
    database = Database(pair.primary, pair.name)
    async with running_gateway(database, replica_dsns=pair.replica_dsn, max_fallback_queries=4) as running:
        yield running


@pytest.fixture
def tenant(request: pytest.FixtureRequest) -> str:
    """A tenant of the test's own."""
    return str(request.node.name)[:128]


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedPostgres]:
    with tempfile.TemporaryDirectory(prefix="atlasco-seam-") as name, EmbeddedPostgres(Path(name) / "pg") as made:
        prepared(made)
        yield made


@pytest.fixture(scope="module")
def platform(server: EmbeddedPostgres) -> Iterator[Platform]:
    with tempfile.TemporaryDirectory(prefix="atlasco-seam-warehouse-") as name:
        made = Platform(server, Path(name))
        yield made
        made.warehouse.close()
        made.owner.close()


@pytest.fixture(scope="module")
async def pool(server: EmbeddedPostgres) -> AsyncIterator[Pool]:
    async with make_pool(PoolSettings(server.dsn(DATABASE, "test_query"), Role.QUERY, max_size=3)) as opened:
        yield opened


@pytest.fixture
async def router(platform: Platform, pool: Pool) -> AsyncIterator[tuple[Router, WarehouseSource]]:
    """Long ranges go to the warehouse and the split at any bound that is not 0."""
    clock = PrimaryClock()
    async with await psycopg.AsyncConnection.connect(platform.server.dsn(DATABASE), autocommit=True) as connection:
        asked = clock.own_us()
        clock.observe(asked, (await beat(connection, 1.0)).clock_us, clock.own_us())
    source = WarehouseSource(platform.warehouse)
    primary = DatabaseSource(pool, TenantDirectory(), clock)
    yield Router(primary, clock, warehouse=source, policy=Policy(analytical_us=1, report_us=1)), source
    source.close()
