"""Filling what is declared, and removing what was dropped: one bounded step at a time.

How far a back-fill is stands in its declaration, in the same transaction as the rows it made: it goes on where it was
after any end. Rollups are filled newest first, for that is what queries ask for; buckets that the outbox makes stale
meanwhile are computed by the rounds, in the same worker, so the two never meet.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Final, LiteralString

from storage.binary import Int4Array, Int8Array
from storage.database import Connection
from storage.model import ValueType
from storage.rollup.buckets import ROLLED_TYPES, ensure, fill
from storage.rollup.dirty import Declarations
from storage.rollup.isolation import Isolation, Kind, Part
from storage.rollup.projection import refresh
from storage.statements import statements
from storage.times import microseconds

_ROLLUP = statements("rollup.sql")
_PROJECTION = statements("projections.sql")
_WINDOW: Final = timedelta(hours=6)
_UNITS: Final[tuple[LiteralString, ...]] = ("minute", "hour")


@dataclass(frozen=True, slots=True)
class StepLimits:
    """How many devices one step of each kind takes; a step is one transaction."""

    rollup_devices: int = 100
    projection_devices: int = 2_000
    dropped_devices: int = 10


async def fill_rollup(connection: Connection, limits: StepLimits, isolation: Isolation) -> bool:
    """Fill the next stretch of a rollup; False: none is waiting."""
    resting = isolation.resting(Kind.ROLLUPS)
    row = await (await connection.execute(_ROLLUP["pending_rollup"], {"resting": resting})).fetchone()
    if row is None:
        return False
    tenant, name, _, complete_from, after, _, top, floor, *ids, oldest = row
    if complete_from is None:
        top = max(top, await _stored_ahead(connection, tenant) or top)
    start: datetime = max(top - _WINDOW, _whole_hour(floor)) if floor is not None else top
    entities: list[int] = []
    if start < top:
        entities = await _entities(connection, tenant, after, "", limits.rollup_devices)

    async def filled() -> None:
        window = microseconds(start), microseconds(top)
        await ensure(connection, *window)
        for value_type, attributes in zip(ROLLED_TYPES, ids, strict=True):
            if attributes:
                await fill(connection, tenant, value_type, entities, attributes, window)

    if entities and not await isolation.attempt(connection, Part(Kind.ROLLUPS, tenant), filled):
        return True
    position = {"tenant": tenant, "name": name, "state": "backfilling", "complete_from": complete_from or top}
    if entities:
        position["entity"] = entities[-1]
    else:
        position |= {"complete_from": start, "entity": 0}
        if floor is None or start <= _whole_hour(floor):
            # Done. What lies before is gone or not wanted, and not in the buckets; unless nothing was ever stored
            # there, for what comes later is computed by the rounds.
            position["state"] = "serving"
            if oldest is None or floor <= oldest:
                position["complete_from"] = None
    await connection.execute(_ROLLUP["move_rollup"], position)
    return True


async def fill_projection(
    connection: Connection, declarations: Declarations, limits: StepLimits, isolation: Isolation
) -> int | None:
    """Fill the next rows of a projection, and return how many devices they are of; None: none is waiting."""
    resting = isolation.resting(Kind.PROJECTION)
    row = await (await connection.execute(_PROJECTION["pending_projection"], {"resting": resting})).fetchone()
    if row is None:
        return None
    projection, after = row
    table = next((p for p in declarations.projections if p.projection_id == projection), None)
    if table is None:
        return None
    entities = await _entities(connection, table.tenant_id, after, table.entity_type, limits.projection_devices)
    part = Part(Kind.PROJECTION, projection)
    if not await isolation.attempt(connection, part, partial(refresh, connection, table, entities)):
        return 0
    done = len(entities) < limits.projection_devices
    position = {
        "projection": projection,
        "state": "serving" if done else "backfilling",
        "entity": entities[-1] if entities else after,
    }
    await connection.execute(_PROJECTION["move_projection"], position)
    return len(entities)


async def remove_dropped(connection: Connection, limits: StepLimits) -> bool:
    """Remove the next part of what was dropped; False: nothing is waiting."""
    row = await (await connection.execute(_ROLLUP["dropped_rollup"])).fetchone()
    if row is None:
        return False
    tenant, name, after, attributes = row
    entities = await _entities(connection, tenant, after, "", limits.dropped_devices) if attributes else []
    if not entities:
        await connection.execute(_ROLLUP["remove_rollup"], {"tenant": tenant, "name": name})
        return True
    keys = {"tenant": tenant, "entities": Int8Array(entities), "attributes": Int4Array(attributes)}
    for unit in _UNITS:
        for value_type in ROLLED_TYPES:
            await connection.execute(_of_unit("clear_entities", unit, value_type), keys)
    position = {"tenant": tenant, "name": name, "state": "dropping", "complete_from": None, "entity": entities[-1]}
    await connection.execute(_ROLLUP["move_rollup"], position)
    return True


async def dropped_projections(connection: Connection) -> list[int]:
    """The ids of projections that are out of use and still have a table."""
    return [number for (number,) in await (await connection.execute(_PROJECTION["dropped_projections"])).fetchall()]


async def remove_projection(connection: Connection, projection: int) -> None:
    """Remove a dropped projection and its table; nothing while it is read, which the next attempt may find over."""
    await connection.execute(_PROJECTION["remove_projection"], {"projection": projection})


def _of_unit(name: str, unit: LiteralString, value_type: ValueType) -> LiteralString:
    kind: LiteralString = "double" if value_type is ValueType.DOUBLE else "bigint"
    return _ROLLUP[name].replace("{unit}", unit).replace("{type}", kind)


async def _stored_ahead(connection: Connection, tenant: int) -> datetime | None:
    row = await (await connection.execute(_ROLLUP["stored_ahead"], {"tenant": tenant})).fetchone()
    return None if row is None else row[0]


async def _entities(connection: Connection, tenant: int, after: int, kind: str, limit: int) -> list[int]:
    parameters = {"tenant": tenant, "after": after, "type": kind, "limit": limit}
    return [row[0] for row in await (await connection.execute(_ROLLUP["next_entities"], parameters)).fetchall()]


def _whole_hour(moment: datetime) -> datetime:
    """The first whole hour at or after a time: an hour that begins before the floor lacks readings."""
    hour = moment.replace(minute=0, second=0, microsecond=0)
    return hour if hour == moment else hour + timedelta(hours=1)
