from collections.abc import AsyncIterator

import pytest

from tests.gateway.patience_clock import patience_clock
from tests.gateway.running_gateway import RunningGateway, running_gateway
from tests.storage.conftest import (
    Database,
    database,
    module_database,
    new_database,
    postgres,
    template,
)

__all__ = ["database", "module_database", "new_database", "patience_clock", "postgres", "template"]


@pytest.fixture(scope="module")
async def gateway(module_database: Database) -> AsyncIterator[RunningGateway]:
    """A gateway with default limits, shared by the tests of a module; each test takes a tenant of its own."""
    async with running_gateway(module_database) as running:
        yield running


@pytest.fixture
def tenant(request: pytest.FixtureRequest) -> str:
    """A tenant of the test's own."""
    return str(request.node.name)[:128]
