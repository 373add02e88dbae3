"""Pages of series: the statements, composed once per combination of types, and the loop that fills a page."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, LiteralString

from psycopg import sql

from storage.binary import Int4Array, Int8Array, decode_array
from storage.model import Attribute, ValueType
from storage.reads.model import (
    ENTITIES_PER_STATEMENT,
    MAX_TEXT_BYTES,
    AttributeNotFound,
    Cursor,
    EntityNotFound,
    EntityReplaced,
    Position,
    SeriesPage,
    SeriesPart,
    SeriesQuestion,
    Span,
    spans,
)
from storage.reads.pages import concatenated, end_of_page, head, text_bytes
from storage.reads.session import ReadSession
from storage.reads.wire import Timestamp, times_of, values_of
from storage.statements import statements

# Text is read in steps that grow from here: a few thousand long texts end a page by bytes, and the database should
# not read fifty thousand of them to find that out.
_FIRST_TEXT_ROWS = 4_000
_TEXT_GROWTH = 4

_SQL_TYPES: Mapping[ValueType, LiteralString] = {
    ValueType.DOUBLE: "double precision",
    ValueType.BIGINT: "bigint",
    ValueType.BOOLEAN: "boolean",
    ValueType.TEXT: "text",
}


async def read_page(
    session: ReadSession, question: SeriesQuestion, page_size: int, after: Position | None
) -> SeriesPage:
    """The readings of a question that follow `after`, from the first on when None; at most `page_size` of them.

    They come series by series, by the ids of device and attribute, and by time within a series; where the question is
    descending, all of that the other way round. A series may go on in the next page. With `limit_per_series` each
    series ends after so many readings, counted over all of its pages: `after` says how many there were, so it is of use
    for its own question only. A page ends early with the text that passes MAX_TEXT_BYTES.

    What lies before the tenant's retention is left out, even while it is still stored. Each page is of its session's
    snapshot: a reading that is written meanwhile before the place that paging has come to is in no page.

    Raises:
        EntityNotFound, AttributeNotFound: the tenant does not have one of them.
        EntityReplaced: the device of `after` was deleted, and another one has its name.
    """
    entities = await entity_ids(session, question.entities)
    for name in question.entities:
        if name not in entities:
            raise EntityNotFound(name)
    attributes = await attributes_by_name(session, question.attributes)
    start_us = max(question.start_us, session.oldest_us)
    if start_us >= question.end_us:
        return SeriesPage(session.as_of_us, [], None)
    await session.run("plan_series")
    names = {entity_id: name for name, entity_id in entities.items()}
    page = _Page(
        session,
        names,
        attributes.values(),
        page_size,
        descending=question.descending,
        limit_per_series=question.limit_per_series,
    )
    cursor = None
    step = ENTITIES_PER_STATEMENT
    if question.limit_per_series:
        # With a limit for each series a statement reads all that its devices may give before it sorts: no more
        # devices at once than fill a page.
        step = max(1, min(step, page_size // (question.limit_per_series * len(attributes)) + 1))
    if after is not None:
        entity, attribute = question.entities[after.entity], question.attributes[after.attribute]
        check_position(entity, entities[entity], after)
        cursor = Cursor(after.entity_id, attributes[attribute].attribute_id, after.time_us, after.taken)
        page.begin((entity, attribute), after.taken)
    for span in spans(
        sorted(names, reverse=question.descending),
        sorted(attributes.values(), key=lambda a: a.attribute_id, reverse=question.descending),
        start_us,
        question.end_us,
        after=cursor,
        descending=question.descending,
        limit_per_series=question.limit_per_series,
        step=step,
    ):
        if not await page.fill(span):
            break
    return SeriesPage(session.as_of_us, page.parts, end_of_page(question, page.parts, after) if page.is_cut else None)


def check_position(name: str, entity_id: int, after: Position) -> None:
    """Raises EntityReplaced unless the device called `name` is the one of the position.

    Ids tell nothing of which of two came first: each connection takes them in advance.
    """
    if entity_id != after.entity_id:
        raise EntityReplaced(name)


async def entity_ids(session: ReadSession, names: Sequence[str]) -> dict[str, int]:
    """The ids of the devices that exist, by name."""
    cursor = await session.run("find_entities", {"names": list(names)})
    return dict(await cursor.fetchall())


async def attributes_by_name(session: ReadSession, names: Sequence[str]) -> dict[str, Attribute]:
    """The attributes, by name.

    Raises:
        AttributeNotFound: the tenant does not have one of them.
    """
    cursor = await session.run("find_attributes", {"names": list(names)})
    found = {
        name: Attribute(attribute_id, name, ValueType(type_name), keeps_latest)
        for name, attribute_id, type_name, keeps_latest in await cursor.fetchall()
    }
    for name in names:
        if name not in found:
            raise AttributeNotFound(name)
    return found


class _Page:
    """A page being filled."""

    def __init__(
        self,
        session: ReadSession,
        entities: Mapping[int, str],
        attributes: Iterable[Attribute],
        page_size: int,
        *,
        descending: bool,
        limit_per_series: int,
    ) -> None:
        self._session = session
        self._entities = entities
        self._attributes = {a.attribute_id: a for a in attributes}
        self._descending = descending
        self._limit_per_series = limit_per_series
        self._series = ("", "")
        self._rows_left = page_size
        self._bytes_left = MAX_TEXT_BYTES
        self._text_rows = _FIRST_TEXT_ROWS
        self.parts: list[SeriesPart] = []
        # There is more than the page holds.
        self.is_cut = False
        # Readings of the last series, earlier pages included.
        self.taken = 0

    def begin(self, series: tuple[str, str], taken: int) -> None:
        """The page goes on within a series of which earlier pages had `taken` readings."""
        self._series, self.taken = series, taken

    async def fill(self, span: Span) -> bool:
        """Add the readings of a box; False when the page is full and others must wait for the next page."""
        boxes = [span]
        while boxes:
            box = boxes.pop(0)
            has_text = any(a.type is ValueType.TEXT for a in box.attributes)
            # One more than fits tells whether there is more.
            limit = self._rows_left + 1
            if has_text:
                limit = min(limit, self._text_rows)
                self._text_rows *= _TEXT_GROWTH
            parts = await self._read(box, limit)
            count = sum(len(part.times_us) for part in parts)
            self._add(parts)
            if self.is_cut:
                return False
            if count == limit:
                # The statement's own limit, not the box's end.
                rest = self.parts[-1]
                boxes = [*self._after(rest, box), *boxes]
        return True

    def _after(self, part: SeriesPart, box: Span) -> list[Span]:
        entity = next(i for i in box.entities if self._entities[i] == part.entity)
        attribute = next(a for a in box.attributes if a.name == part.attribute)
        cursor = Cursor(entity, attribute.attribute_id, int(part.times_us[-1]), self.taken)
        return list(
            spans(
                box.entities,
                box.attributes,
                box.start_us,
                box.end_us,
                after=cursor,
                descending=self._descending,
                limit_per_series=self._limit_per_series,
            )
        )

    def _add(self, parts: Sequence[SeriesPart]) -> None:
        for found in parts:
            if self._rows_left == 0 or self._bytes_left <= 0:
                self.is_cut = True
                return
            part = found
            if len(part.times_us) > self._rows_left:
                part = head(part, self._rows_left)
                self.is_cut = True
            self._rows_left -= len(part.times_us)
            if (part.entity, part.attribute) != self._series:
                self.begin((part.entity, part.attribute), 0)
            self.taken += len(part.times_us)
            self._bytes_left -= text_bytes(part)
            before = self.parts[-1] if self.parts else None
            if before is not None and (before.entity, before.attribute) == (part.entity, part.attribute):
                self.parts[-1] = concatenated([before, part])
            else:
                self.parts.append(part)
        # The statement stops by itself at the byte that passes the budget; whether something follows is not known.
        if self._bytes_left <= 0:
            self.is_cut = True

    async def _read(self, box: Span, limit: int) -> list[SeriesPart]:
        types = tuple(t for t in ValueType if any(a.type is t for a in box.attributes))
        parameters: dict[str, Any] = {
            f"{t}_attributes": Int4Array([a.attribute_id for a in box.attributes if a.type is t]) for t in types
        }
        cursor = await self._session.run_text(
            page_statement(types, descending=self._descending, limited=box.limit_per_series > 0),
            parameters
            | {
                "entities": Int8Array(box.entities),
                "start": Timestamp(box.start_us),
                "end": Timestamp(box.end_us),
                "limit": limit,
                "limit_per_series": min(box.limit_per_series, limit),
                "bytes": self._bytes_left,
            },
        )
        result = cursor.pgresult
        assert result is not None
        parts = []
        for row in range(result.ntuples):
            entity = int.from_bytes(result.get_value(row, 0) or b"", "big", signed=True)
            attribute = self._attributes[int.from_bytes(result.get_value(row, 1) or b"", "big", signed=True)]
            parts.append(
                SeriesPart(
                    entity=self._entities[entity],
                    attribute=attribute.name,
                    type=attribute.type,
                    times_us=times_of(result.get_value(row, 2)),
                    revisions=decode_array(result.get_value(row, 3), ">i4"),
                    values=values_of(attribute.type, result.get_value(row, 4 + types.index(attribute.type))),
                    place=(entity, attribute.attribute_id),
                )
            )
        return parts


@cache
def page_statement(types: tuple[ValueType, ...], *, descending: bool, limited: bool = False) -> sql.Composed:
    """The statement that reads the next readings of attributes of the given types in key order; `limited`: at most so
    many of each series.

    Its columns: entity id, attribute id, times, revisions, then the values by type in the order of `types`.
    """
    text = statements("reads.sql")
    direction = sql.SQL("DESC" if descending else "ASC")
    branches = [
        sql.SQL(text["series_branch_limited" if limited else "series_branch"]).format(
            # Every branch has the columns of all types; a UNION takes its types from the first one.
            values=sql.SQL(", ").join(
                sql.SQL("value AS {0}" if t is own else "NULL::{1} AS {0}").format(
                    _value_column(t), sql.SQL(_SQL_TYPES[t])
                )
                for t in types
            ),
            table=sql.Identifier(f"entity_attributes_{own}"),
            attributes=sql.Placeholder(f"{own}_attributes"),
            direction=direction,
        )
        for own in types
    ]
    rows = sql.SQL(text["series_merged"]).format(branches=sql.SQL("\nUNION ALL\n").join(branches), direction=direction)
    if ValueType.TEXT in types:
        rows = sql.SQL(text["series_within_bytes"]).format(merged=rows, direction=direction)
    return sql.SQL(text["series_page"]).format(
        rows=rows,
        direction=direction,
        arrays=sql.SQL(", ").join(
            # A value is never NULL, so NULL is another type's row. One type has no such rows to leave out.
            sql.SQL("array_agg({0})" if len(types) == 1 else "array_agg({0}) FILTER (WHERE {0} IS NOT NULL)").format(
                _value_column(t)
            )
            for t in types
        ),
    )


def _value_column(value_type: ValueType) -> sql.Identifier:
    return sql.Identifier(f"{value_type}_value")
