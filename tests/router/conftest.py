"""A primary, a real streaming replica of it, and a gateway that knows both."""

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
import pytest

from embedded.ports import free_port
from embedded.postgres import EmbeddedPostgres
from embedded.replica import StreamingReplica
from tests.gateway.running_gateway import RunningGateway, running_gateway
from tests.router.router_support import Pair, prepared
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
