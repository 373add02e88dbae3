"""Reads of telemetry for services: latest values, devices, attributes; series are in `storage.reads.series`.

Each takes a session (`storage.reads.session`), which bounds its time and says what else may go wrong. Every answer
comes from one snapshot and says as of when it is. What lies before the tenant's retention is not shown, even while it
is still stored. A tenant that never wrote has no devices and no attributes.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from operator import attrgetter
from typing import Any, Final

from psycopg import sql
from psycopg.types.json import Jsonb

from storage.binary import Int4Array
from storage.model import ValueType
from storage.reads.model import (
    MAX_LATEST_VALUES,
    MAX_TEXT_BYTES,
    AnswerTooLarge,
    AttributeEntry,
    AttributePage,
    Entity,
    EntityPage,
    LatestAnswer,
    LatestNotKept,
    Reading,
    Scalar,
)
from storage.reads.series import attributes_by_name
from storage.reads.session import ReadSession
from storage.statements import statements

_ATTRIBUTE: Final = attrgetter("attribute")


async def read_latest(session: ReadSession, entities: Sequence[str], attributes: Sequence[str]) -> LatestAnswer:
    """The newest values of devices; of all attributes that keep one when `attributes` is empty.

    Names are distinct. An attribute that a device never sent is left out of its values.

    Raises:
        AttributeNotFound: the tenant does not have one of the attributes.
        LatestNotKept: one of the attributes opted out of latest values.
        AnswerTooLarge: more than MAX_LATEST_VALUES values, or more than MAX_TEXT_BYTES of text.
    """
    parameters: dict[str, Any] = {"names": list(entities), "limit": MAX_LATEST_VALUES + len(entities) + 1}
    if attributes:
        named = await attributes_by_name(session, attributes)
        for attribute in named.values():
            if not attribute.keeps_latest:
                raise LatestNotKept(attribute.name)
        parameters["attributes"] = Int4Array([a.attribute_id for a in named.values()])
    cursor = await session.run_text(_latest_statement(some=bool(attributes)), parameters)
    found = _readings_by_device(await cursor.fetchall())
    return LatestAnswer(
        as_of_us=session.as_of_us,
        entities={name: found[name] for name in entities if name in found},
        missing=[name for name in entities if name not in found],
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


@cache
def _latest_statement(*, some: bool) -> sql.Composed:
    text = statements("reads.sql")
    return sql.SQL(text["latest_of_devices"]).format(condition=sql.SQL(text["latest_some" if some else "latest_all"]))


def _readings_by_device(rows: Sequence[tuple[Any, ...]]) -> dict[str, list[Reading]]:
    """The devices of `latest_of_devices`, each with its readings by attribute name; raises AnswerTooLarge."""
    found: dict[str, list[Reading]] = {}
    count = text_bytes = 0
    for device, attribute, time_us, double, bigint, boolean, text in rows:
        readings = found.setdefault(device, [])
        if attribute is None:
            continue
        if double is not None:
            value: Scalar = double
        elif text is not None:
            value = text
            text_bytes += len(text.encode())
        else:
            value = bigint if bigint is not None else boolean
        readings.append(Reading(attribute, time_us, value))
        count += 1
    if count > MAX_LATEST_VALUES:
        raise AnswerTooLarge(f"more than {MAX_LATEST_VALUES} values; ask for fewer devices or attributes")
    if text_bytes > MAX_TEXT_BYTES:
        raise AnswerTooLarge(f"more than {MAX_TEXT_BYTES} bytes of text; ask for fewer devices or attributes")
    # In Python, not in SQL: a few values each, and an ORDER BY would keep the plan from streaming.
    for readings in found.values():
        readings.sort(key=_ATTRIBUTE)
    return found
