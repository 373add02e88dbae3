"""Reads of telemetry for services: latest values, series, devices, attributes.

Every answer comes from one snapshot and says as of when it is. What lies before the tenant's retention is not shown,
even while it is still stored. A tenant that never wrote has no devices and no attributes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from psycopg.types.json import Jsonb

from storage.binary import Int4Array, Int8Array
from storage.database import Pool
from storage.model import ValueType
from storage.read_model import (
    MAX_LATEST_VALUES,
    MAX_TEXT_BYTES,
    AnswerTooLarge,
    AttributeEntry,
    AttributePage,
    Entity,
    EntityPage,
    LatestAnswer,
    LatestNotKept,
    Position,
    Reading,
    SeriesPage,
    SeriesQuestion,
)
from storage.read_series import attributes_by_name, entity_ids, read_page
from storage.read_session import ReadSession, read_session
from storage.read_tenants import TenantDirectory


class TelemetryReads:
    """Reads on a pool of the query role. Safe to share between tasks; holds nothing between calls.

    Every method takes the tenant's name and `timeout_s`, the seconds it may take in all, the wait for a connection
    included. Common errors: QueryCanceled when the time is over (the statement is then cancelled in the database
    too), StorageUnavailable when the database cannot be reached, StorageBusy when no connection became free. When the
    caller is cancelled, so is the statement, before the connection goes back to the pool.

    The functions of this module do the same within a session that is open already.
    """

    def __init__(self, pool: Pool, tenants: TenantDirectory) -> None:
        self._pool = pool
        self._tenants = tenants

    async def latest(
        self, tenant: str, entities: Sequence[str], attributes: Sequence[str], *, timeout_s: float
    ) -> LatestAnswer:
        """See `read_latest`."""
        async with read_session(self._pool, self._tenants, tenant, timeout_s) as session:
            return await read_latest(session, entities, attributes)

    async def series(
        self, tenant: str, question: SeriesQuestion, *, page_size: int, after: Position | None, timeout_s: float
    ) -> SeriesPage:
        """See `storage.read_series.read_page`."""
        async with read_session(self._pool, self._tenants, tenant, timeout_s) as session:
            return await read_page(session, question, page_size, after)

    async def entities(
        self,
        tenant: str,
        *,
        page_size: int,
        timeout_s: float,
        entity_type: str = "",
        labels: Mapping[str, str] | None = None,
        only: str | None = None,
        after: str = "",
    ) -> EntityPage:
        """See `read_entities`."""
        async with read_session(self._pool, self._tenants, tenant, timeout_s) as session:
            return await read_entities(
                session, page_size=page_size, entity_type=entity_type, labels=labels, only=only, after=after
            )

    async def attributes(self, tenant: str, *, page_size: int, timeout_s: float, after: str = "") -> AttributePage:
        """See `read_attributes`."""
        async with read_session(self._pool, self._tenants, tenant, timeout_s) as session:
            return await read_attributes(session, page_size=page_size, after=after)


async def read_latest(session: ReadSession, entities: Sequence[str], attributes: Sequence[str]) -> LatestAnswer:
    """The newest values of devices; of all attributes that keep one when `attributes` is empty.

    Names are distinct. An attribute that a device never sent is left out of its values.

    Raises:
        AttributeNotFound: the tenant does not have one of the attributes.
        LatestNotKept: one of the attributes opted out of latest values.
        AnswerTooLarge: more than MAX_LATEST_VALUES values, or more than MAX_TEXT_BYTES of text.
    """
    ids = await entity_ids(session, entities)
    parameters: dict[str, Any] = {}
    if attributes:
        named = await attributes_by_name(session, attributes)
        for attribute in named.values():
            if not attribute.keeps_latest:
                raise LatestNotKept(attribute.name)
        parameters["attributes"] = Int4Array([a.attribute_id for a in named.values()])
    readings = await _latest_readings(session, ids, parameters) if ids else {}
    return LatestAnswer(
        as_of_us=session.as_of_us,
        entities={name: readings.get(ids[name], []) for name in entities if name in ids},
        missing=[name for name in entities if name not in ids],
    )


async def read_entities(
    session: ReadSession,
    *,
    page_size: int,
    entity_type: str = "",
    labels: Mapping[str, str] | None = None,
    only: str | None = None,
    after: str = "",
) -> EntityPage:
    """Devices by name, from the first one after `after`.

    Those of `entity_type` (empty: any) that have all of `labels`; with `only`, at most the device of that name.
    """
    parameters = {
        "after": after,
        "only": only,
        "type": entity_type,
        "labels": Jsonb(dict(labels or {})),
        "limit": page_size + 1,
    }
    await session.run("plan_for_constants")
    rows = await (await session.run("list_entities", parameters)).fetchall()
    # Labels are text by contract; a number that an operator's SQL put there must not fail every list.
    found = [
        Entity(name, kind, {str(k): str(v) for k, v in given.items()}, at) for name, kind, given, at in rows[:page_size]
    ]
    return EntityPage(session.as_of_us, found, found[-1].name if len(rows) > page_size else None)


async def read_attributes(session: ReadSession, *, page_size: int, after: str = "") -> AttributePage:
    """Attributes by name, from the first one after `after`."""
    cursor = await session.run("list_attributes", {"after": after, "limit": page_size + 1})
    rows = await cursor.fetchall()
    found = [
        AttributeEntry(name, ValueType(kind), unit, keeps_latest, at)
        for name, kind, unit, keeps_latest, at in rows[:page_size]
    ]
    return AttributePage(session.as_of_us, found, found[-1].name if len(rows) > page_size else None)


async def _latest_readings(
    session: ReadSession, ids: Mapping[str, int], parameters: dict[str, Any]
) -> dict[int, list[Reading]]:
    name = "latest_of_attributes" if "attributes" in parameters else "latest_of_all_attributes"
    cursor = await session.run(
        name, {**parameters, "entities": Int8Array(list(ids.values())), "limit": MAX_LATEST_VALUES + 1}
    )
    rows = await cursor.fetchall()
    if len(rows) > MAX_LATEST_VALUES:
        raise AnswerTooLarge(f"more than {MAX_LATEST_VALUES} values; ask for fewer devices or attributes")
    found: dict[int, list[Reading]] = {}
    text_bytes = 0
    # In Python, not in SQL: a few values each, and an ORDER BY would keep the plan from streaming.
    for entity_id, attribute, time_us, *values in sorted(rows, key=lambda row: (row[0], row[1])):
        value = next(v for v in values if v is not None)
        if isinstance(value, str):
            text_bytes += len(value.encode())
        found.setdefault(entity_id, []).append(Reading(attribute, time_us, value))
    if text_bytes > MAX_TEXT_BYTES:
        raise AnswerTooLarge(f"more than {MAX_TEXT_BYTES} bytes of text; ask for fewer devices or attributes")
    return found
