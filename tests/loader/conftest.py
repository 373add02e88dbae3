import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from embedded.errors import JavaMissing, MavenMissing
from embedded.kafka import EmbeddedKafka
from embedded.postgres import EmbeddedPostgres
from storage.warehouse.local import LocalWarehouse
from storage.warehouse.local_limits import LocalLimits
from tests.loader.loader_support import Log, Running, make_log
from tests.warehouse_fixtures import TestDatabase, database_server, fresh_database


@pytest.fixture(scope="session")
def kafka() -> Iterator[EmbeddedKafka]:
    """One broker for all tests of the loader."""
    with tempfile.TemporaryDirectory(prefix="atlasco-") as name:
        # Tests kill loaders; the group is to notice soon.
        broker = EmbeddedKafka(Path(name, "kafka"), properties={"group.min.session.timeout.ms": "1000"})
        try:
            broker.start()
        except (JavaMissing, MavenMissing) as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"these tests need a real Kafka: {error}")
        yield broker
        broker.kill()
        broker.stop()


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    with database_server() as server:
        yield server


@pytest.fixture(scope="session")
def shared_database(postgres: EmbeddedPostgres) -> Iterator[TestDatabase]:
    with fresh_database(postgres) as made:
        yield made


@pytest.fixture
def database(shared_database: TestDatabase) -> TestDatabase:
    """A database with an empty catalog and no tenants: emptied, for a new one takes longer than most tests."""
    with psycopg.connect(shared_database.dsn, autocommit=True) as connection:
        connection.execute("DROP SCHEMA IF EXISTS warehouse CASCADE")
        connection.execute("DELETE FROM loaded_lanes")
    return shared_database


@pytest.fixture
def warehouse(database: TestDatabase, tmp_path: Path) -> Iterator[LocalWarehouse]:
    """The warehouse, for looking at; loaders have adapters of their own."""
    made = LocalWarehouse(tmp_path / "warehouse", database.dsn, limits=LocalLimits(grace_s=0.0))
    made.init()
    yield made
    made.close()


@pytest.fixture
def new_log(kafka: EmbeddedKafka) -> Callable[..., Log]:
    """Make a topic and something that writes to it."""
    return lambda partitions=1, **config: make_log(kafka, partitions, config)


@pytest.fixture
def log(new_log: Callable[..., Log]) -> Log:
    return new_log()


@pytest.fixture
def running() -> Iterator[Running]:
    """Starts loaders; none is left."""
    loaders = Running()
    yield loaders
    loaders.close()
