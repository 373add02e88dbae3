"""One database with a fleet for the tests of search and aggregates, read as a gateway does."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import psycopg
import pytest

from storage.database import Pool, PoolSettings, Role, make_pool
from storage.reads.session import ReadSession, read_session
from storage.reads.tenants import TenantDirectory
from storage.rollup.service import rollup_pool
from tests.search.fleet import TENANT, Fleet, make_fleet
from tests.storage.conftest import QUERY_LOGIN, Database, NewDatabase, new_database, postgres, template

__all__ = ["new_database", "postgres", "template"]


class OpenSession(Protocol):
    def __call__(self) -> AbstractAsyncContextManager[ReadSession]: ...


@pytest.fixture(scope="module")
def fleet_database(new_database: NewDatabase, template: str) -> Iterator[Database]:
    with new_database(template) as made:
        yield made


@pytest.fixture(scope="module")
def owner(fleet_database: Database) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(fleet_database(), autocommit=True) as connection:
        connection.execute("SET timezone = 'UTC'")
        yield connection


@pytest.fixture(scope="module")
def fleet(owner: psycopg.Connection[Any]) -> Fleet:
    return make_fleet(owner, devices=90)


@pytest.fixture(scope="module")
async def reading(fleet_database: Database) -> AsyncIterator[OpenSession]:
    """`async with reading() as session`: a snapshot of the fleet's tenant, with a query login's rights."""
    async with make_pool(PoolSettings(fleet_database(user=QUERY_LOGIN), Role.QUERY, max_size=2)) as pool:
        directory = TenantDirectory()
        yield lambda: read_session(pool, directory, TENANT, 60.0)


@pytest.fixture(scope="module")
async def worker_pool(fleet_database: Database) -> AsyncIterator[Pool]:
    pool = rollup_pool(fleet_database())
    await pool.open()
    yield pool
    await pool.close()
