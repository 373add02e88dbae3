"""The questions of the query service, and how each kind of source answers them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

from router.plan import Shape, SourceKind
from router.tiers import Proof, Question, Unproven
from storage.aggregate.buckets import bucket_holding
from storage.aggregate.database import NotRolled, aggregate
from storage.aggregate.model import (
    AggregateAnswer,
    AggregateQuestion,
    AggregateSource,
    Function,
    SelectionTooLarge,
)
from storage.aggregate.series import joined, part_functions
from storage.aggregate.text_bound import TooMuchText
from storage.aggregate.warehouse import Resolved, aggregate_in_warehouse, resolve
from storage.filter.search import FindPage, FindQuestion, SearchSource, find_entities
from storage.reads.devices import read_attributes, read_entities, read_latest
from storage.reads.model import (
    AttributePage,
    EntityPage,
    LatestAnswer,
    Position,
    SeriesPage,
    SeriesQuestion,
)
from storage.reads.pages import join_pages
from storage.reads.series import read_page
from storage.reads.session import ReadSession
from storage.reads.warehouse import WarehouseNames, names_in_database, read_warehouse_page
from storage.warehouse.port import Completeness
from storage.warehouse.reader import WarehouseReader


@dataclass(frozen=True)
class LatestValues(Question[LatestAnswer]):
    """See `read_latest`."""

    entities: Sequence[str]
    attributes: Sequence[str]
    shape = Shape.LOOKUP

    async def from_database(self, session: ReadSession, needed_as_of_us: int | None) -> LatestAnswer:
        """See `Question`."""
        return await read_latest(session, self.entities, self.attributes)


@dataclass(frozen=True)
class EntityList(Question[EntityPage]):
    """See `read_entities`."""

    page_size: int
    entity_type: str
    labels: Mapping[str, str]
    only: str | None
    after: str
    shape = Shape.LIST

    async def from_database(self, session: ReadSession, needed_as_of_us: int | None) -> EntityPage:
        """See `Question`."""
        return await read_entities(
            session,
            page_size=self.page_size,
            entity_type=self.entity_type,
            labels=self.labels,
            only=self.only,
            after=self.after,
        )


@dataclass(frozen=True)
class AttributeList(Question[AttributePage]):
    """See `read_attributes`."""

    page_size: int
    after: str
    shape = Shape.LIST

    async def from_database(self, session: ReadSession, needed_as_of_us: int | None) -> AttributePage:
        """See `Question`."""
        return await read_attributes(session, page_size=self.page_size, after=self.after)


@dataclass(frozen=True)
class FindDevices(Question[FindPage]):
    """See `find_entities`."""

    find: FindQuestion
    page_size: int
    after: str
    shape = Shape.SEARCH

    async def from_database(self, session: ReadSession, needed_as_of_us: int | None) -> FindPage:
        """See `Question`."""
        return await find_entities(
            session, self.find, page_size=self.page_size, after=self.after, needed_as_of_us=needed_as_of_us
        )

    def proven(self, answer: FindPage, proof: Proof) -> Proof:
        """See `Question`."""
        if answer.source is not SearchSource.PROJECTION:
            return proof
        return replace(proof, kind=SourceKind.PROJECTION, name=answer.source_name, as_of_us=answer.as_of_us)


class Aggregates(Question[AggregateAnswer]):
    """See `aggregate`; `only` is the one device that the caller may see."""

    shape = Shape.AGGREGATE

    def __init__(
        self,
        question: AggregateQuestion,
        only: str | None,
        resolved: Resolved | None = None,
        *,
        is_part: bool = False,
    ) -> None:
        able = {SourceKind.PRIMARY, SourceKind.REPLICA, SourceKind.WAREHOUSE, SourceKind.SPLIT}
        if Function.PERCENTILE not in question.functions:
            able.add(SourceKind.ROLLUP)
        self.able = frozenset(able)
        self._question = question
        self._only = only
        self._resolved = resolved
        self._is_part = is_part
        self.start_us, self.end_us = question.start_us, question.end_us

    async def from_database(self, session: ReadSession, needed_as_of_us: int | None) -> AggregateAnswer:
        """See `Question`."""
        with self._whole_decides():
            return await aggregate(session, self._question, needed_as_of_us=needed_as_of_us, only=self._only)

    async def from_materialization(self, session: ReadSession, needed_as_of_us: int | None) -> AggregateAnswer:
        """See `Question`."""
        try:
            return await aggregate(
                session, self._question, needed_as_of_us=needed_as_of_us, only=self._only, only_rolled=True
            )
        except NotRolled as error:
            raise Unproven(str(error)) from error

    def proven(self, answer: AggregateAnswer, proof: Proof) -> Proof:
        """See `Question`."""
        if answer.source is not AggregateSource.ROLLUP:
            return proof
        return replace(proof, kind=SourceKind.ROLLUP, name="rollup", as_of_us=answer.as_of_us)

    @property
    def asks_database_first(self) -> bool:
        """See `Question`: the warehouse does not know the devices' types, labels and latest values."""
        return self._question.selection.by_condition and self._resolved is None

    async def resolved(self, session: ReadSession) -> Self:
        """See `Question`."""
        try:
            resolved = await resolve(session, self._question, self._only)
        except SelectionTooLarge as error:
            raise Unproven(f"the warehouse cannot be asked: {error}") from error
        return type(self)(self._question, self._only, resolved, is_part=self._is_part)

    def from_warehouse(self, reader: WarehouseReader, tenant: str) -> tuple[AggregateAnswer, Completeness]:
        """See `Question`."""
        with self._whole_decides():
            return aggregate_in_warehouse(reader, tenant, self._question, resolved=self._resolved, only=self._only)

    def part(self, start_us: int, end_us: int) -> Self:
        """See `Question`. Asks for more than the whole does: for all that `join` needs."""
        functions = part_functions(self._question.functions)
        part = replace(self._question, start_us=start_us, end_us=end_us, functions=functions)
        return type(self)(part, self._only, self._resolved, is_part=True)

    def seam(self, latest_us: int) -> int:
        """See `Question`. A percentile does not follow from those of two parts: they meet between buckets then."""
        question = self._question
        if Function.PERCENTILE not in question.functions or latest_us >= question.end_us:
            return latest_us
        if question.bucket is None or latest_us <= question.start_us:
            return question.start_us
        return bucket_holding(question.bucket, question.start_us, latest_us)

    def join(self, older: AggregateAnswer, newer: AggregateAnswer, cut_us: int) -> AggregateAnswer:
        """See `Question`."""
        return joined(self._question, older, newer, cut_us)

    @contextmanager
    def _whole_decides(self) -> Iterator[None]:
        """A part has texts that the whole leaves out, such as the last of a bucket that goes on in the other part."""
        try:
            yield
        except TooMuchText as error:
            if self._is_part:
                raise Unproven(f"it is too much in parts: {error}") from error
            raise


class SeriesRange(Question[SeriesPage]):
    """A page of series; see `read_page`. `within` is the part of the range that is asked, all of it when None."""

    shape = Shape.SCAN
    able = frozenset({SourceKind.PRIMARY, SourceKind.REPLICA, SourceKind.WAREHOUSE, SourceKind.SPLIT})

    def __init__(
        self,
        series: SeriesQuestion,
        page_size: int,
        after: Position | None,
        *,
        within: tuple[int, int] | None = None,
        names: WarehouseNames | None = None,
    ) -> None:
        self._series = series
        self._names = names
        self._page_size = page_size
        self._after = after
        self.start_us, self.end_us = within or (series.start_us, series.end_us)

    @property
    def is_first(self) -> bool:
        """Whether no page comes before this one."""
        return self._after is None

    async def from_database(self, session: ReadSession, needed_as_of_us: int | None) -> SeriesPage:
        """See `Question`."""
        return await read_page(session, self._part(), self._page_size, self._after)

    def from_warehouse(self, reader: WarehouseReader, tenant: str) -> tuple[SeriesPage, Completeness]:
        """See `Question`."""
        return read_warehouse_page(reader, tenant, self._part(), self._page_size, self._after, names=self._names)

    async def resolved(self, session: ReadSession) -> Self:
        """See `Question`."""
        names = await names_in_database(session, self._series.entities, self._series.attributes)
        return self._within((self.start_us or 0, self.end_us or 0), names)

    def part(self, start_us: int, end_us: int) -> Self:
        """See `Question`."""
        return self._within((start_us, end_us), self._names)

    def _within(self, within: tuple[int, int], names: WarehouseNames | None) -> Self:
        return type(self)(self._series, self._page_size, self._after, within=within, names=names)

    def join(self, older: SeriesPage, newer: SeriesPage, cut_us: int) -> SeriesPage:
        """See `Question`. The first page_size readings of both, in the order of pages."""
        return join_pages(self._series, older, newer, self._page_size, self._after)

    def _part(self) -> SeriesQuestion:
        assert self.start_us is not None
        assert self.end_us is not None
        return replace(self._series, start_us=self.start_us, end_us=self.end_us)
