"""Finding devices by conditions on their latest values, type, name and labels.

Two ways give the same answer: from the latest values themselves, device by device in the order of names, or from a
wide projection, whose columns are indexed. A projection serves when it has every attribute that the conditions
compare, when the conditions cannot hold for a device that has none of them (such devices need not have a row), and
when its watermark, read in the same snapshot, is as fresh as the answer must be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from psycopg import sql

from storage.binary import Int4Array, Int8Array
from storage.filter.bind import Bound, compared_attributes, needs_a_value, required_type
from storage.filter.compile import compile_filter
from storage.filter.latest import bound_filter, latest_condition
from storage.model import Attribute
from storage.reads.model import (
    MAX_LATEST_VALUES,
    MAX_TEXT_BYTES,
    AnswerTooLarge,
    Entity,
    LatestNotKept,
    Reading,
    Scalar,
)
from storage.reads.series import attributes_by_name
from storage.reads.session import ReadSession
from storage.reads.watermark import Watermark
from storage.reads.wire import Timestamp
from storage.statements import statements

_SQL = statements("search.sql")


class SearchSource(StrEnum):
    """What an answer was read from."""

    LATEST = "latest"
    PROJECTION = "projection"


@dataclass(frozen=True, slots=True)
class FindQuestion:
    """Which devices, and which of their latest values to return. Attribute names are distinct."""

    # See query.proto; empty: every device.
    filter: str
    attributes: Sequence[str] = ()
    # At most the device of this name.
    only: str | None = None


@dataclass(frozen=True, slots=True)
class FoundDevice:
    """A device that meets the conditions; its values by attribute name, as far as it has them."""

    entity_id: int
    entity: Entity
    values: Sequence[Reading]


@dataclass(frozen=True, slots=True)
class FindPage:
    """Devices by name; `last` is the name to go on after, None at the end.

    Everything committed before `as_of_us` is in the answer.
    """

    as_of_us: int
    source: SearchSource
    # Of the projection; else empty.
    source_name: str
    devices: Sequence[FoundDevice]
    last: str | None


@dataclass(frozen=True, slots=True)
class Projection:
    """A projection that serves, as the planner needs it."""

    projection_id: int
    name: str
    # Empty: every type.
    entity_type: str
    attribute_ids: frozenset[int]
    watermark: Watermark


async def find_entities(
    session: ReadSession, question: FindQuestion, *, page_size: int, after: str, needed_as_of_us: int | None
) -> FindPage:
    """The devices behind the name `after`, at most `page_size`.

    A projection that is complete up to `needed_as_of_us` (microseconds, the primary's clock) may serve; None: only
    the latest values themselves.

    Raises:
        FilterInvalid: the filter is no filter, or compares what cannot be compared.
        AttributeNotFound: the tenant does not have one of the attributes.
        LatestNotKept: one of them opted out of latest values.
        AnswerTooLarge: more than MAX_LATEST_VALUES values, or more than MAX_TEXT_BYTES of text.
    """
    returned = await _returned(session, question.attributes)
    bound = await bound_filter(session, question.filter)
    projection = None
    if needed_as_of_us is not None:
        able = [p for p in await serving_projections(session) if p.watermark.proves(needed_as_of_us, session.as_of_us)]
        projection = choose_projection(bound, able)
    parameters: dict[str, Any] = {
        "after": after,
        "only": question.only,
        "oldest": Timestamp(session.oldest_us),
        "limit": page_size + 1,
    }
    covered: list[Attribute] = []
    if projection is None:
        rows = await _from_latest(session, bound, parameters)
    else:
        covered = [a for a in returned if a.attribute_id in projection.attribute_ids]
        rows = await _from_projection(session, bound, projection, covered, parameters)
    shown = rows[:page_size]
    values = {row[0]: _projected(covered, row[5:], session.oldest_us) for row in shown}
    rest = [a for a in returned if a not in covered]
    if rest and shown:
        for entity_id, readings in (await _latest(session, list(values), rest)).items():
            values[entity_id] += readings
    _bound_size(values)
    devices = [
        FoundDevice(row[0], _entity(row[1:5]), sorted(values[row[0]], key=lambda reading: reading.attribute))
        for row in shown
    ]
    as_of_us = session.as_of_us if projection is None else min(session.as_of_us, projection.watermark.as_of_us)
    return FindPage(
        as_of_us=as_of_us,
        source=SearchSource.LATEST if projection is None else SearchSource.PROJECTION,
        source_name="" if projection is None else projection.name,
        devices=devices,
        last=devices[-1].entity.name if len(rows) > page_size else None,
    )


async def serving_projections(session: ReadSession) -> list[Projection]:
    """The tenant's projections that are complete up to a known time."""
    rows = await (await session.run_text(_SQL["serving_projections"])).fetchall()
    return [Projection(number, name, kind, frozenset(ids), Watermark(*mark)) for number, name, kind, ids, *mark in rows]


def choose_projection(bound: Bound, projections: Sequence[Projection]) -> Projection | None:
    """The narrowest projection that can answer, of those that are fresh enough; None: none can."""
    wanted = {attribute.attribute_id for attribute in compared_attributes(bound)}
    if not needs_a_value(bound):
        return None
    kind = required_type(bound)
    able = [p for p in projections if wanted <= p.attribute_ids and p.entity_type in ("", kind)]
    return min(able, key=lambda p: (not p.entity_type, len(p.attribute_ids), p.projection_id), default=None)


async def _returned(session: ReadSession, names: Sequence[str]) -> list[Attribute]:
    if not names:
        return []
    found = await attributes_by_name(session, names)
    for attribute in found.values():
        if not attribute.keeps_latest:
            raise LatestNotKept(attribute.name)
    return list(found.values())


class _ProjectionColumns:
    """The fields of a filter in find_by_projection; see `Columns`."""

    name: sql.Composable = sql.SQL("p.external_id")
    entity_type: sql.Composable = sql.SQL("p.entity_type")
    labels: sql.Composable = sql.SQL("p.labels")
    prefix_indexed: bool = True

    def value(self, attribute: Attribute) -> sql.Composable:
        return sql.Identifier("p", f"v{attribute.attribute_id}")

    def shown(self, attribute: Attribute) -> sql.Composable | None:
        return sql.SQL("{} >= {}").format(sql.Identifier("p", f"t{attribute.attribute_id}"), sql.Placeholder("oldest"))


async def _from_latest(session: ReadSession, bound: Bound, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    joins, condition, found = latest_condition(bound)
    await session.run_text(_SQL["plan_by_latest"])
    statement = sql.SQL(_SQL["find_by_latest"]).format(values=joins, condition=condition)
    return await (await session.run_text(statement, {**parameters, **found})).fetchall()


async def _from_projection(
    session: ReadSession,
    bound: Bound,
    projection: Projection,
    covered: Sequence[Attribute],
    parameters: Mapping[str, Any],
) -> list[tuple[Any, ...]]:
    compiled = compile_filter(bound, _ProjectionColumns())
    condition = compiled.condition
    planned = await (await session.run_text(_SQL["plan_by_projection"])).fetchone()
    deleted: list[int] = planned[-1] if planned is not None else []
    if deleted:
        condition = sql.SQL("{} AND p.entity_id <> ALL (%(deleted)s)").format(condition)
    statement = sql.SQL(_SQL["find_by_projection"]).format(
        projection=sql.Identifier(f"projection_{projection.projection_id}"),
        values=sql.SQL("").join(
            sql.SQL(", {}, {}").format(
                sql.Identifier("p", f"t{a.attribute_id}"), sql.Identifier("p", f"v{a.attribute_id}")
            )
            for a in covered
        ),
        condition=condition,
    )
    given = {**parameters, **compiled.parameters, "deleted": Int8Array(deleted)}
    return await (await session.run_text(statement, given)).fetchall()


def _projected(attributes: Sequence[Attribute], columns: Sequence[Any], oldest_us: int) -> list[Reading]:
    """Readings from pairs of columns (time, value)."""
    return [
        Reading(attribute.name, time_us, value)
        for attribute, time_us, value in zip(attributes, columns[::2], columns[1::2], strict=True)
        if value is not None and time_us >= oldest_us
    ]


async def _latest(
    session: ReadSession, entities: Sequence[int], attributes: Sequence[Attribute]
) -> dict[int, list[Reading]]:
    parameters = {
        "entities": Int8Array(list(entities)),
        "attributes": Int4Array([a.attribute_id for a in attributes]),
        "limit": MAX_LATEST_VALUES + 1,
    }
    found: dict[int, list[Reading]] = {}
    for entity_id, name, time_us, *values in await (await session.run("latest_of_attributes", parameters)).fetchall():
        value: Scalar = next(v for v in values if v is not None)
        found.setdefault(entity_id, []).append(Reading(name, time_us, value))
    return found


def _bound_size(values: Mapping[int, Sequence[Reading]]) -> None:
    if sum(map(len, values.values())) > MAX_LATEST_VALUES:
        raise AnswerTooLarge(f"more than {MAX_LATEST_VALUES} values; ask for fewer devices or attributes")
    texts = (reading.value for readings in values.values() for reading in readings)
    if sum(len(text.encode()) for text in texts if isinstance(text, str)) > MAX_TEXT_BYTES:
        raise AnswerTooLarge(f"more than {MAX_TEXT_BYTES} bytes of text; ask for fewer devices or attributes")


def _entity(row: Sequence[Any]) -> Entity:
    name, kind, labels, created_us = row
    # Labels are text by contract; a number that an operator's SQL put there must not fail every list.
    return Entity(name, kind, {str(k): str(v) for k, v in labels.items()}, created_us)
