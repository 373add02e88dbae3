import random
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from device.client import DeviceClient
from device.connection import DevelopmentIdentity
from device.settings import ClientSettings
from tests.device.reference_server import ReferenceServer
from tests.waiting import PATIENCE_S

# Quick to come back, slow to give up: a stream given up because the machine stood still would be one hello too many.
QUICK = ClientSettings(
    backoff_base_s=0.01,
    backoff_cap_s=0.05,
    welcome_timeout_s=PATIENCE_S,
    ack_timeout_s=PATIENCE_S,
    close_deadline_s=PATIENCE_S,
)

ClientFactory = Callable[..., DeviceClient]


@pytest.fixture
async def server() -> AsyncIterator[ReferenceServer]:
    """The server that contract tests run against.

    They use only `target`, `readings(device_id)` and `interrupt()`; a suite for another implementation overrides
    this fixture with an object that offers the same.
    """
    async with ReferenceServer() as running:
        yield running


@pytest.fixture
def connect(server: ReferenceServer) -> ClientFactory:
    """Makes a client of `server` that reconnects within milliseconds."""

    def make(device_id: str = "device-1", **arguments: object) -> DeviceClient:
        changes = arguments.pop("settings", {})
        return DeviceClient(
            server.target,
            device_id=device_id,
            identity=DevelopmentIdentity(tenant="acme", device=device_id),
            settings=replace(QUICK, **changes),
            rng=random.Random(7),
            **arguments,
        )

    return make
