"""A real PostgreSQL and a real Kafka for the tests of the relay; each test has a database and a topic of its own."""

import itertools
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from importlib import resources
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from embedded.errors import JavaMissing, MavenMissing
from embedded.jars import find_java
from embedded.kafka import EmbeddedKafka
from embedded.postgres import EmbeddedPostgres
from storage.database import Pool
from storage.relay.service import relay_pool
from tests.relay.relay_support import RELAY_LOGIN, Bench

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    with tempfile.TemporaryDirectory(prefix="atlasco-") as name:
        server = EmbeddedPostgres(Path(name, "pg"))
        with server:
            server.ensure_database("relay_template")
            with psycopg.connect(server.dsn("relay_template")) as connection:
                connection.execute(resources.files("storage").joinpath("sql", "schema.sql").read_bytes())
            server.ensure_login(RELAY_LOGIN)
            with psycopg.connect(server.dsn(), autocommit=True) as connection:
                connection.execute(sql.SQL("GRANT atlasco_relay TO {}").format(sql.Identifier(RELAY_LOGIN)))
            yield server


@pytest.fixture(scope="session")
def kafka() -> Iterator[EmbeddedKafka]:
    try:
        find_java()
        with tempfile.TemporaryDirectory(prefix="atlasco-") as name:
            broker = EmbeddedKafka(Path(name, "kafka"))
            broker.start()
            yield broker
            broker.kill()
            broker.stop()
    except (JavaMissing, MavenMissing) as missing:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the relay is tested with a real Kafka, and that cannot run here: {missing}")


@pytest.fixture
def bench(postgres: EmbeddedPostgres, kafka: EmbeddedKafka) -> Iterator[Bench]:
    """A database with the schema, outbox partitions around now, and a topic that does not exist yet."""
    number = next(_numbers)
    name = f"relay_{number}"
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE relay_template").format(sql.Identifier(name)))
    made = Bench(postgres, kafka, name, f"changes-{number}-{os.getpid()}")
    try:
        yield made
    finally:
        made.close()
        with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
async def pool(bench: Bench) -> AsyncIterator[Pool]:
    """Connections to the test's database, with a relay's privileges."""
    made = relay_pool(bench.config.dsn)
    await made.open()
    yield made
    await made.close()
