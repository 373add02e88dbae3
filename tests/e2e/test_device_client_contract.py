"""The device client's contract, kept with the real gateway as it is with the reference server."""

import itertools
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from device.client import DeviceClient
from device.connection import DevelopmentIdentity
from tests.device import test_device_contract as contract
from tests.device.conftest import QUICK
from tests.gateway.running_gateway import RunningGateway, running_gateway
from tests.gateway.stored import values
from tests.storage.conftest import Database

_tenants = itertools.count(1)


class RealGateway:
    """What the contract asks of a server: `target`, `readings(device_id)` and `interrupt()`; of one tenant."""

    def __init__(self, gateway: RunningGateway, database: Database) -> None:
        self.target = gateway.target
        self.tenant = f"contract-{next(_tenants)}"
        self.clients: list[DeviceClient] = []
        self._database = database

    async def readings(self, device_id: str) -> dict[tuple[str, int], Any]:
        return values(self._database, self.tenant, device_id)

    async def interrupt(self) -> None:
        for client in self.clients:
            client.disconnect()


@pytest.fixture(scope="module")
async def gateway(module_database: Database) -> AsyncIterator[RunningGateway]:
    async with running_gateway(module_database, max_string_bytes=100) as running:
        yield running


@pytest.fixture
def server(gateway: RunningGateway, module_database: Database) -> RealGateway:
    return RealGateway(gateway, module_database)


@pytest.fixture
def connect(server: RealGateway) -> Callable[..., DeviceClient]:
    """Makes a client of `server` that reconnects within milliseconds."""

    def make(device_id: str = "device-1", **arguments: Any) -> DeviceClient:
        changes = arguments.pop("settings", {})
        client = DeviceClient(
            server.target,
            device_id=device_id,
            identity=DevelopmentIdentity(tenant=server.tenant, device=device_id),
            settings=replace(QUICK, **changes),
            rng=random.Random(7),
            **arguments,
        )
        server.clients.append(client)
        return client

    return make


t0 = contract.t0

# Each test of the suite, under its own name, so that pytest collects it here with the fixtures above.
globals().update({name: test for name, test in vars(contract).items() if name.startswith("test_")})
