"""Pages of series from the warehouse: the same questions and answers as `storage.reads.series`, on either adapter."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from storage.errors import StorageError
from storage.model import ValueType
from storage.reads.model import MAX_TEXT_BYTES, EntityNotFound, Position, SeriesPage, SeriesPart, SeriesQuestion
from storage.reads.pages import end_of_page
from storage.reads.series import attributes_by_name, check_position, entity_ids
from storage.reads.session import ReadSession
from storage.times import microseconds, naive, naive_microseconds
from storage.warehouse.port import Completeness, Scope
from storage.warehouse.reader import WarehouseReader
from storage.warehouse.statements import statements

_LAST_US: Final = microseconds(datetime.max.replace(tzinfo=UTC))

# Text rows may be long; a page ends early rather than hold hundreds of megabytes of them.
_TEXT_ROWS: Final = 4_000

SQL_TYPES: Final[Mapping[ValueType, str]] = {
    ValueType.DOUBLE: "DOUBLE PRECISION",
    ValueType.BIGINT: "BIGINT",
    ValueType.BOOLEAN: "BOOLEAN",
    ValueType.TEXT: "VARCHAR",
}
"""The types of values in the SQL that both adapters take."""

_ARRAYS: Final[Mapping[ValueType, Any]] = {
    ValueType.DOUBLE: np.float64,
    ValueType.BIGINT: np.int64,
    ValueType.BOOLEAN: np.bool_,
    ValueType.TEXT: object,
}


class UnknownToWarehouse(StorageError):
    """The warehouse has never heard of a device or attribute: it does not exist, or nothing of it was loaded yet."""


@dataclass(frozen=True, slots=True)
class WarehouseNames:
    """What the warehouse calls what a question names. A name may stand for several ids, of which one is alive."""

    tenant_id: int
    entities: Mapping[int, str]
    attributes: Mapping[int, tuple[str, ValueType]]

    @property
    def newest(self) -> Mapping[str, int]:
        """The id of each device named: of several of one name only the newest has readings."""
        return {name: number for number, name in sorted(self.entities.items())}


def to_timestamp(time_us: int) -> datetime:
    """A time as the warehouse stores it: UTC without a zone. Times beyond the calendar become its ends."""
    return naive(min(max(time_us, 0), _LAST_US))


def warehouse_names(
    reader: WarehouseReader, tenant: str, entities: Sequence[str], attributes: Sequence[str]
) -> tuple[WarehouseNames, Completeness]:
    """The ids of what a question names, and the completeness that holds for them.

    Raises:
        UnknownToWarehouse: one of them is not there.
        StorageError: see `Warehouse.query`.
    """
    text = statements("analytics.sql")["names"].format(entities=marks(entities), attributes=marks(attributes))
    answer = reader.query(text, [tenant, tenant, *entities, tenant, *attributes])
    tenants: list[int] = []
    found_entities: dict[int, str] = {}
    found_attributes: dict[int, tuple[str, ValueType]] = {}
    for kind, name, number, value_type in answer.rows:
        match kind:
            case "t":
                tenants.append(number)
            case "e":
                found_entities[number] = name
            case _:
                found_attributes[number] = (name, ValueType(value_type))
    if not tenants:
        raise UnknownToWarehouse("nothing of this tenant is loaded")
    for missing in {*entities} - {*found_entities.values()}:
        raise UnknownToWarehouse(f"nothing of device {missing!r} is loaded")
    for missing in {*attributes} - {name for name, _ in found_attributes.values()}:
        raise UnknownToWarehouse(f"nothing of attribute {missing!r} is loaded")
    return WarehouseNames(max(tenants), found_entities, found_attributes), answer.completeness


async def names_in_database(session: ReadSession, entities: Sequence[str], attributes: Sequence[str]) -> WarehouseNames:
    """The same as a database knows it: also of devices and attributes of which nothing is loaded yet.

    Raises:
        EntityNotFound, AttributeNotFound: one of them does not exist.
    """
    found = await attributes_by_name(session, attributes)
    ids = await entity_ids(session, entities)
    for name in entities:
        if name not in ids:
            raise EntityNotFound(name)
    return WarehouseNames(
        session.tenant_id,
        {number: name for name, number in ids.items()},
        {a.attribute_id: (a.name, a.type) for a in found.values()},
    )


def read_warehouse_page(
    reader: WarehouseReader,
    tenant: str,
    question: SeriesQuestion,
    page_size: int,
    after: Position | None,
    *,
    names: WarehouseNames | None = None,
) -> tuple[SeriesPage, Completeness]:
    """The readings that follow `after`, at most `page_size`, with the completeness that holds for them. Blocks.

    `names`: as a database knows them; None: as the warehouse does.

    Raises:
        UnknownToWarehouse: the warehouse does not know a device or attribute of the question, or as another one.
        EntityReplaced: with `names`, of a device that was registered anew since.
        StorageError: see `Warehouse.query`.
    """
    known_by = None
    if names is None:
        names, known_by = warehouse_names(reader, tenant, question.entities, question.attributes)
    if after is not None:
        name = question.entities[after.entity]
        if known_by is not None and names.newest[name] != after.entity_id:
            # One of the two is not loaded yet, or is gone already: a database knows which device bears the name.
            raise UnknownToWarehouse(f"device {name!r} is another one here")
        check_position(name, names.newest[name], after)
    types = tuple(t for t in ValueType if any(kind is t for _, kind in names.attributes.values()))
    limit = min(page_size, _TEXT_ROWS) if ValueType.TEXT in types else page_size
    text, parameters = _page_statement(names, types, question, after)
    scope = Scope(names.tenant_id, question.start_us, question.end_us)
    # One more than fits tells whether there is more.
    answer = reader.query(text, [*parameters, limit + 1], scope=scope)
    rows, is_cut = _fitting(answer.rows, types, limit)
    parts = list(_parts(rows, names, types))
    last = end_of_page(question, parts, after) if is_cut and parts else None
    completeness = answer.completeness if known_by is None else of_both(known_by, answer.completeness)
    return SeriesPage(completeness.as_of_us or 0, parts, last), completeness


def _page_statement(
    names: WarehouseNames, types: Sequence[ValueType], question: SeriesQuestion, after: Position | None
) -> tuple[str, list[Any]]:
    """The statement of a page and its parameters, save for the last one, the number of rows."""
    text = statements("analytics.sql")
    direction, follows = ("DESC", "<") if question.descending else ("ASC", ">")
    branches = []
    parameters: list[Any] = []
    for own in types:
        attributes = [number for number, (_, kind) in names.attributes.items() if kind is own]
        branches.append(
            text["series_branch"].format(
                values=", ".join(
                    f"value AS {t}_value" if t is own else f"CAST(NULL AS {SQL_TYPES[t]}) AS {t}_value" for t in types
                ),
                table=f"entity_attributes_{own}",
                entities=marks(names.entities),
                attributes=marks(attributes),
            )
        )
        start, end = to_timestamp(question.start_us), to_timestamp(question.end_us)
        parameters += [names.tenant_id, *names.entities, *attributes, start, end]
    rows = " UNION ALL ".join(branches)
    limit = question.limit_per_series
    following, within = "true", f"place <= {limit:d}" if limit else "true"
    if after is not None:
        following = text["series_after"].format(follows=follows)
        entity = after.entity_id
        attribute = next(n for n, (name, _) in names.attributes.items() if name == question.attributes[after.attribute])
        parameters += [entity, entity, attribute, attribute, to_timestamp(after.time_us)]
        if limit:
            within = text["series_within"].format(
                entity=int(entity), attribute=int(attribute), left=max(0, limit - after.taken), limit=limit
            )
    if limit:
        rows = text["series_placed"].format(branches=rows, direction=direction, after=following)
        following = "true"
    columns = ", ".join(f"{t}_value" for t in types)
    statement = text["series_page"].format(
        columns=columns, rows=rows, after=following, within=within, direction=direction
    )
    return statement, parameters


def _fitting(
    rows: Sequence[tuple[Any, ...]], types: Sequence[ValueType], limit: int
) -> tuple[Sequence[tuple[Any, ...]], bool]:
    """The rows of a page, and whether there are more: at most `limit`, and up to the text that passes the bytes."""
    is_cut = len(rows) > limit
    rows = rows[:limit]
    if ValueType.TEXT in types:
        place = 3 + types.index(ValueType.TEXT)
        left = MAX_TEXT_BYTES
        for count, row in enumerate(rows, 1):
            left -= len((row[place] or "").encode())
            if left <= 0 and count < len(rows):
                return rows[:count], True
    return rows, is_cut


def _parts(rows: Sequence[tuple[Any, ...]], names: WarehouseNames, types: Sequence[ValueType]) -> Iterator[SeriesPart]:
    for (entity, attribute), group in groupby(rows, key=lambda row: (row[0], row[1])):
        run = list(group)
        name, value_type = names.attributes[attribute]
        place = 3 + types.index(value_type)
        values: NDArray[Any] = np.empty(len(run), _ARRAYS[value_type])
        values[:] = [row[place] for row in run]
        yield SeriesPart(
            entity=names.entities[entity],
            attribute=name,
            type=value_type,
            times_us=np.array([naive_microseconds(row[2]) for row in run], np.int64),
            values=values,
            revisions=np.array([row[-1] or 0 for row in run], np.int32),
            place=(entity, attribute),
        )


def of_both(first: Completeness, second: Completeness) -> Completeness:
    """What holds for an answer of two queries: the older state, and the second's gaps, which name its scope."""
    as_of = None
    if first.as_of_us is not None and second.as_of_us is not None:
        as_of = min(first.as_of_us, second.as_of_us)
    return Completeness(as_of, second.complete_from_us, second.incomplete, second.halted)


def marks(items: Sequence[Any] | Mapping[int, Any]) -> str:
    """A parameter for each item, for a list; NULL, which nothing is equal to, for none."""
    return ", ".join(["%s"] * len(items)) or "NULL"
