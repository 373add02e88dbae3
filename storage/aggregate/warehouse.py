"""Aggregates in the warehouse: the same questions and answers as `storage.aggregate.database`, on either adapter.

What the warehouse does not know, types, labels and latest values of devices, is looked up in a database first
(`resolve`); a selection by names, or of everything, needs that only where nothing of a device is loaded yet.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, LiteralString

from storage.aggregate import text_bound
from storage.aggregate.buckets import AHEAD_US, MAX_POINTS, TooManyPoints, bucket_edges, runs
from storage.aggregate.database import devices_being_deleted, selected_devices
from storage.aggregate.doubles import is_huge_in_warehouse, is_tame_in_warehouse, quotient
from storage.aggregate.model import (
    AggregateAnswer,
    AggregateQuestion,
    AggregateSource,
    Function,
    selected_names,
)
from storage.aggregate.series import AggregateRow, by_result_type, check_types, series_of
from storage.model import Attribute, ValueType
from storage.reads.session import ReadSession
from storage.reads.warehouse import (
    SQL_TYPES,
    WarehouseNames,
    marks,
    names_in_database,
    of_both,
    to_timestamp,
    warehouse_names,
)
from storage.times import DAY_US
from storage.warehouse.port import Completeness, Scope
from storage.warehouse.reader import WarehouseReader
from storage.warehouse.statements import statements

MAX_WAREHOUSE_DEVICES: Final = 20_000
"""The most devices that a statement names one by one; a selection of everything need not name any."""

# A range that goes further back is asked first where its readings begin, before its buckets are counted.
_LONG_US: Final = 400 * DAY_US

_HUGE: Final[LiteralString] = is_huge_in_warehouse("value")
_TAME: Final[LiteralString] = is_tame_in_warehouse("value")
_NAN: Final = "CAST('NaN' AS DOUBLE PRECISION)"
_SUM: Final[LiteralString] = f"CAST(sum(CASE WHEN {_HUGE} THEN NULL ELSE value END) AS DOUBLE PRECISION)"
_ANY_HUGE: Final[LiteralString] = f"sum(CASE WHEN {_HUGE} THEN 1 ELSE 0 END) > 0"

# As storage.aggregate.database computes them. Conditions are such that they are false for NaN whether a dialect orders
# it above all numbers or not at all; sums and deviations leave out what would make some dialects fail.
_RESULTS: Final[Mapping[Function, str]] = {
    Function.COUNT: "count(*)",
    Function.MIN: "min(value)",
    Function.MAX: "max(value)",
    Function.SUM: f"CASE WHEN {_ANY_HUGE} THEN {_NAN} ELSE {_SUM} END",
    Function.MEAN: f"CASE WHEN {_ANY_HUGE} THEN {_NAN} ELSE {quotient(_SUM, 'count(*)')} END",
    Function.FIRST: "arg_min(value, (ts, entity_id, attribute_id))",
    Function.LAST: "arg_max(value, (ts, entity_id, attribute_id))",
    Function.STDDEV: f"CASE WHEN count(*) = 1 OR sum(CASE WHEN {_TAME} THEN 0 ELSE 1 END) > 0 THEN {_NAN} "
    f"ELSE stddev_samp(CASE WHEN {_TAME} THEN CAST(value AS DOUBLE PRECISION) END) END",
}
# By window functions, where there is no arg_min. `any`: max, which not every type has.
_BY_PLACE: Final[Mapping[Function, str]] = {
    Function.FIRST: "{any}(CASE WHEN first_place = 1 THEN value END)",
    Function.LAST: "{any}(CASE WHEN last_place = 1 THEN value END)",
}
_PERCENTILE: Final = "percentile_cont({fraction!r}) WITHIN GROUP (ORDER BY CAST(value AS DOUBLE PRECISION))"

_TEXTS = statements("analytics.sql")


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a database knows of a question."""

    # The devices selected, none where it is everything, and the attributes.
    names: WarehouseNames
    everything: bool
    # Of everything: devices that are being deleted. They are gone from the database, and not yet from the warehouse.
    deleted: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class _Plan:
    """A question with everything looked up."""

    question: AggregateQuestion
    tenant_id: int
    # None: every device of the tenant, save those deleted.
    entities: Sequence[int] | None
    deleted: Sequence[int]
    attributes: Sequence[Attribute]
    # [start, end), clipped to what there can be.
    start_us: int
    end_us: int
    # Empty: one bucket.
    edges: Sequence[int] = ()

    @property
    def scope(self) -> Scope:
        """What its statements touch."""
        return Scope(self.tenant_id, self.start_us, self.end_us)


async def resolve(session: ReadSession, question: AggregateQuestion, only: str | None) -> Resolved:
    """What a database knows of a question.

    Raises:
        EntityNotFound, AttributeNotFound, FilterInvalid, LatestNotKept: of the question.
        SelectionTooLarge: it selects more devices than the warehouse can be told.
    """
    names = await names_in_database(session, [], question.attributes)
    selection = question.selection
    if selected_names(selection, only) is None and not selection.by_condition:
        return Resolved(names, everything=True, deleted=await devices_being_deleted(session))
    devices = await selected_devices(session, selection, only, limit=MAX_WAREHOUSE_DEVICES)
    return Resolved(replace(names, entities=dict(devices)), everything=False)


def aggregate_in_warehouse(
    reader: WarehouseReader,
    tenant: str,
    question: AggregateQuestion,
    *,
    resolved: Resolved | None = None,
    only: str | None = None,
) -> tuple[AggregateAnswer, Completeness]:
    """Compute an aggregate, with the completeness that holds for it. Blocks.

    `resolved` is needed where the selection goes by more than names. `only`: the one device that the caller may see;
    None: all of its tenant.

    Raises:
        UnknownToWarehouse: the warehouse does not know a device or attribute of the question; not with `resolved`.
        AggregateTypeMismatch, TimeZoneUnknown, TooManyPoints, TooMuchText: as `storage.aggregate.database.aggregate`.
        StorageError: see `Warehouse.query`.
    """
    known_by = None
    if resolved is None:
        named = selected_names(question.selection, only)
        names, known_by = warehouse_names(reader, tenant, named or [], question.attributes)
        resolved = Resolved(names, everything=named is None)
    names = resolved.names
    attributes = [Attribute(number, name, kind, True) for number, (name, kind) in names.attributes.items()]
    check_types(question, attributes)
    # Of this tenant and range: how far another's readings are kept is of no concern here.
    completeness = reader.completeness(Scope(names.tenant_id, question.start_us, question.end_us))
    if known_by is not None:
        # The device may have got another id in between, and what is loaded since is that one's.
        completeness = of_both(known_by, completeness)
    if completeness.as_of_us is None:
        # Nothing can be said of an answer, so none is computed.
        return _answer(question, attributes, [], completeness), completeness
    plan = _Plan(
        question,
        names.tenant_id,
        None if resolved.everything else list(names.newest.values()),
        resolved.deleted,
        attributes,
        max(question.start_us, completeness.complete_from_us or 0),
        min(question.end_us, completeness.as_of_us + AHEAD_US),
    )
    rows: list[tuple[Any, ...]] = []
    if plan.start_us < plan.end_us and plan.entities != []:
        plan = _bucketed(reader, plan)
        for value_type, group in by_result_type(question, attributes):
            found, state = _compute(reader, plan, value_type, group)
            completeness = of_both(completeness, state)
            rows += found
            if len(rows) > MAX_POINTS:
                raise TooManyPoints(len(rows))
    # The statement stopped at as much text as it had itself, whatever of it is left out below.
    text_bound.check_text(value for row in rows for value in row[3])
    by_id = {0: "", **names.entities}
    if question.by_entity and resolved.everything and rows:
        by_id |= _device_names(reader, plan, sorted({row[1] for row in rows}))
    # A device without a name is one that was deleted since.
    points = [AggregateRow(by_id[row[1]], row[2], row[0], row[3]) for row in rows if row[1] in by_id]
    return _answer(question, attributes, points, completeness), completeness


def _answer(
    question: AggregateQuestion, attributes: Sequence[Attribute], rows: Sequence[AggregateRow], state: Completeness
) -> AggregateAnswer:
    return AggregateAnswer(
        state.as_of_us or 0,
        state.complete_from_us or 0,
        AggregateSource.READINGS,
        series_of(question, attributes, rows),
    )


def _bucketed(reader: WarehouseReader, plan: _Plan) -> _Plan:
    """The plan with the edges of its buckets."""
    bucket, start_us = plan.question.bucket, plan.start_us
    if bucket is None:
        return plan
    if plan.end_us - start_us > _LONG_US:
        branches, parameters = _branches(reader, plan, plan.attributes, None)
        text = _TEXTS["oldest_reading"].format(us=reader.dialect.microseconds.format("ts"), branches=branches)
        ((oldest_us,),) = reader.query(text, parameters, scope=plan.scope).rows
        start_us = plan.end_us - 1 if oldest_us is None else max(start_us, oldest_us)
    return replace(plan, start_us=start_us, edges=bucket_edges(bucket, start_us, plan.end_us))


def _compute(
    reader: WarehouseReader, plan: _Plan, value_type: ValueType, attributes: Sequence[Attribute]
) -> tuple[list[tuple[Any, ...]], Completeness]:
    """Rows of (bucket's beginning, entity id or 0, attribute id or 0, results)."""
    question = plan.question
    branches, parameters = _branches(reader, plan, attributes, value_type)
    by_place = [f for f in question.functions if f in _BY_PLACE and not reader.dialect.has_arg_min]
    results = {**_RESULTS, **{function: _BY_PLACE[function] for function in by_place}}
    columns = [
        text.format(any="bool_or" if value_type is ValueType.BOOLEAN else "max")
        for function in question.functions
        for text in (
            [_PERCENTILE.format(fraction=p / 100) for p in question.percentiles]
            if function is Function.PERCENTILE
            else [results[function]]
        )
    ]
    statement = _TEXTS["aggregate"].format(
        results=", ".join(f"{column} AS result_{place}" for place, column in enumerate(columns)),
        places="".join(_place(plan, function) for function in by_place),
        bucket=_bucket(plan),
        entity="entity_id" if question.by_entity else "CAST(0 AS BIGINT)",
        attribute="attribute_id" if question.by_attribute else "0",
        branches=branches,
    )
    if value_type is ValueType.TEXT:
        statement = _within_text(plan, statement)
    answer = reader.query(statement, [*parameters, MAX_POINTS + 1], scope=plan.scope)
    rows = [
        (question.start_us if not plan.edges else at_us, entity, attribute, _results(question, found))
        for at_us, entity, attribute, *found in answer.rows
    ]
    return rows, answer.completeness


def _place(plan: _Plan, function: Function) -> str:
    """The column of each reading's place in its group's bucket, counted from the end that `function` asks for."""
    keys = _varying(plan)
    direction, place = ("ASC", "first_place") if function is Function.FIRST else ("DESC", "last_place")
    partition = f"PARTITION BY {', '.join(keys)}" if keys else ""
    return _TEXTS["aggregate_place"].format(partition=partition, direction=direction, place=place)


def _varying(plan: _Plan) -> list[str]:
    """The keys of an answer's rows that are not the same for all: Redshift takes no constant in a window."""
    return [
        *(["in_bucket"] if plan.edges else []),
        *(["of_entity"] if plan.question.by_entity else []),
        *(["of_attribute"] if plan.question.by_attribute else []),
    ]


def _within_text(plan: _Plan, statement: str) -> str:
    """The statement that ends with the row whose texts pass what an answer may hold: characters, which every dialect
    counts alike, and of which no text has more than bytes.
    """
    texts, keys = text_bound.text_results(plan.question), _varying(plan)
    if not texts or not keys:
        return statement
    results = [f"result_{place}" for place in range(len(plan.question.functions))]
    return _TEXTS["aggregate_within_text"].format(
        columns=", ".join(["in_bucket", "of_entity", "of_attribute", *results]),
        length=" + ".join(f"length(result_{place})" for place in texts),
        keys=", ".join(keys),
        answer=statement,
        most=text_bound.MAX_AGGREGATE_TEXT_BYTES,
    )


def _results(question: AggregateQuestion, columns: Sequence[Any]) -> tuple[Any, ...]:
    """One result per function, of columns of which PERCENTILE has several."""
    found: list[Any] = []
    at = 0
    for function in question.functions:
        width = len(question.percentiles) if function is Function.PERCENTILE else 1
        part = columns[at : at + width]
        found.append(part if function is Function.PERCENTILE else part[0])
        at += width
    return tuple(found)


def _branches(
    reader: WarehouseReader, plan: _Plan, attributes: Sequence[Attribute], wanted: ValueType | None
) -> tuple[str, list[Any]]:
    """The readings of the question as one SELECT, their values as `wanted` (None: left out), and its parameters."""
    if plan.entities is not None:
        entities = _among(plan.entities)
    else:
        entities = f"NOT ({_among(plan.deleted)})" if plan.deleted else "true"
    texts, parameters = [], []
    for own in sorted({attribute.type for attribute in attributes}):
        ids = [attribute.attribute_id for attribute in attributes if attribute.type is own]
        value = "NULL" if wanted is None else "value" if own is wanted else f"CAST(value AS {SQL_TYPES[wanted]})"
        texts.append(
            _TEXTS["aggregate_branch"].format(
                us=reader.dialect.microseconds.format("ts") if plan.edges else "NULL",
                value=value,
                table=f"entity_attributes_{own}",
                entities=entities,
                attributes=marks(ids),
            )
        )
        parameters += [plan.tenant_id, *ids, to_timestamp(plan.start_us), to_timestamp(plan.end_us)]
    return " UNION ALL ".join(texts), parameters


def _among(entities: Sequence[int]) -> str:
    # Numbers that a database gave us, and too many for parameters.
    return f"entity_id IN ({', '.join(str(int(number)) for number in entities)})"


def _bucket(plan: _Plan) -> str:
    """The beginning of a reading's bucket, by its time `us`: counted from where equally wide buckets begin to run."""
    if not plan.edges:
        return "CAST(0 AS BIGINT)"
    cases = [
        f"WHEN us >= {run.start_us} THEN us - mod(us - {run.start_us}, {run.width_us})"
        for run in reversed(runs(plan.edges, plan.end_us))
    ]
    return f"CASE {' '.join(cases)} END"


def _device_names(reader: WarehouseReader, plan: _Plan, ids: Sequence[int]) -> dict[int, str]:
    names: dict[int, str] = {}
    for at in range(0, len(ids), MAX_WAREHOUSE_DEVICES):
        text = _TEXTS["device_names"].format(entities=_among(ids[at : at + MAX_WAREHOUSE_DEVICES]))
        names |= dict(reader.query(text, [plan.tenant_id], scope=Scope(plan.tenant_id)).rows)
    return names
