"""A real PostgreSQL for tests, and fresh databases in it with the schema in place."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

import psycopg
import pytest
from psycopg import sql

from embedded.cluster import SUPERUSER
from embedded.postgres import EmbeddedPostgres

TEMPLATE = "atlasco_template"
"""A database that holds just the schema; fresh ones are copied from it."""

INGEST_LOGIN = "test_ingest"
"""A login role that is a member of atlasco_ingest, as a gateway's is."""

QUERY_LOGIN = "test_query"
"""A login role that is a member of atlasco_query."""


@dataclass(frozen=True)
class Database:
    """A database of the test server. Called, it gives a connection string: `database(user=INGEST_LOGIN)`."""

    postgres: EmbeddedPostgres
    name: str

    def __call__(self, user: str = SUPERUSER, **parameters: str | int) -> str:
        return self.postgres.dsn(self.name, user, **parameters)


NewDatabase: TypeAlias = Callable[[str], AbstractContextManager[Database]]


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """One server for the whole run."""
    # Not in pytest's own temporary directory: each pytest that starts closes that one to other accounts, and as root
    # the server runs under another account. A second run would take the first one's server down.
    with (
        TemporaryDirectory(prefix="atlasco-test-") as directory,
        EmbeddedPostgres(Path(directory) / "postgres", settings={"max_locks_per_transaction": "256"}) as server,
    ):
        yield server


@pytest.fixture(scope="session")
def template(postgres: EmbeddedPostgres) -> str:
    """The name of a database that holds the schema and nothing else; also makes the login roles."""
    postgres.ensure_database(TEMPLATE)
    with psycopg.connect(postgres.dsn(TEMPLATE)) as connection:
        connection.execute(resources.files("storage").joinpath("sql", "schema.sql").read_bytes())
    for login, group in ((INGEST_LOGIN, "atlasco_ingest"), (QUERY_LOGIN, "atlasco_query")):
        postgres.ensure_login(login)
        with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
            connection.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(group), sql.Identifier(login)))
    return TEMPLATE


@pytest.fixture(scope="session")
def new_database(postgres: EmbeddedPostgres) -> NewDatabase:
    """Makes databases: `with new_database("template0") as database:` is a copy of that one, dropped at the end."""
    numbers = itertools.count(1)

    @contextmanager
    def new(template: str) -> Iterator[Database]:
        name = f"test_{next(numbers)}"
        with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
            connection.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template))
            )
        yield Database(postgres, name)
        with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
            # By force: what a failed test left connected must not fail the next one.
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    return new


@pytest.fixture
def database(new_database: NewDatabase, template: str) -> Iterator[Database]:
    """A fresh database with the schema, for one test."""
    with new_database(template) as made:
        yield made


@pytest.fixture(scope="module")
def module_database(new_database: NewDatabase, template: str) -> Iterator[Database]:
    """A fresh database with the schema, shared by the tests of a module."""
    with new_database(template) as made:
        yield made


@pytest.fixture
def empty_database(new_database: NewDatabase) -> Iterator[Database]:
    """A fresh database without the schema."""
    with new_database("template0") as made:
        yield made
