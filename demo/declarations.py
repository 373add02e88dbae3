"""What the demo's tenants declare: a rollup and a projection of the freezers, and a rollup of the probe's stamps."""

import asyncio
from collections.abc import Callable
from typing import Any

from atlasco.telemetry.v1 import admin_pb2

from demo.calls import Calls, Refused
from device.kinds import KINDS

FREEZER = KINDS[0].name
"""The kind of device that is there however small the fleet is."""

ROLLUP = admin_pb2.Rollup(name="climate", attributes=["temperature", "room_temperature"])
PROJECTION = admin_pb2.Projection(
    name="cold_chain", entity_type=FREEZER, attributes=["temperature", "status", "door_open", "firmware"]
)
_AGAIN_S = 0.2


async def declare_for_fleet(call: Calls, progress: Callable[[str], None]) -> None:
    """Declare for the tenant of the devices as soon as they have registered the attributes; may be repeated.

    Raises:
        Refused: for another reason than that the attributes are not there yet.
    """
    await _declare(call, admin_pb2.CreateRollupRequest(rollup=ROLLUP))
    await _declare(call, admin_pb2.CreateProjectionRequest(projection=PROJECTION))
    progress(f"declared: rollup {ROLLUP.name}, projection {PROJECTION.name}")


async def declare_for_stamps(call: Calls, attribute: str) -> None:
    """Declare for the tenant of the probe. Raises Refused as above."""
    await _declare(call, admin_pb2.CreateRollupRequest(rollup=admin_pb2.Rollup(name="stamps", attributes=[attribute])))


async def _declare(call: Calls, request: Any) -> None:
    # The same declaration again returns what is there: a restart, or an answer that was lost, changes nothing.
    while True:
        try:
            await call(request)
        except Refused as refused:
            if refused.reason not in ("ATTRIBUTE_NOT_FOUND", "STORAGE_UNAVAILABLE"):
                raise
            await asyncio.sleep(_AGAIN_S)
        else:
            return
