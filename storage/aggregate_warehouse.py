"""Aggregates in the warehouse: the same questions and answers as `storage.aggregate`, on either adapter.

What the warehouse does not know, types, labels and latest values of devices, is looked up in a database first
(`selected_devices`); a selection by names, or of everything, needs none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from storage.aggregate_buckets import AHEAD_US, HOUR_US, MAX_POINTS, TooManyPoints, bucket_edges, runs
from storage.aggregate_model import (
    AggregateAnswer,
    AggregateQuestion,
    AggregateSource,
    Function,
    selected_names,
)
from storage.aggregate_series import AggregateRow, by_result_type, check_types, series_of
from storage.model import Attribute, ValueType
from storage.read_warehouse import SQL_TYPES, WarehouseNames, marks, of_both, to_timestamp, warehouse_names
from storage.warehouse.port import Completeness, Scope
from storage.warehouse.reader import WarehouseReader
from storage.warehouse.statements import statements

MAX_WAREHOUSE_DEVICES: Final = 20_000
"""The most devices that a statement names one by one; a selection of everything names none."""

# A range that goes further back is asked first where its readings begin, before its buckets are counted.
_LONG_US: Final = 400 * 24 * HOUR_US

_HUGE: Final = "abs(CAST(value AS DOUBLE PRECISION)) BETWEEN 1e140 AND 1.7976931348623157e308"
_TAME: Final = "abs(CAST(value AS DOUBLE PRECISION)) < 1e140"
_NAN: Final = "CAST('NaN' AS DOUBLE PRECISION)"
_SUM: Final = f"CAST(sum(CASE WHEN {_HUGE} THEN NULL ELSE value END) AS DOUBLE PRECISION)"
_ANY_HUGE: Final = f"sum(CASE WHEN {_HUGE} THEN 1 ELSE 0 END) > 0"

# As storage.aggregate computes them. Conditions are such that they are false for NaN whether a dialect orders it above
# all numbers or not at all; sums and deviations leave out what would make some dialects fail.
_RESULTS: Final[Mapping[Function, str]] = {
    Function.COUNT: "count(*)",
    Function.MIN: "min(value)",
    Function.MAX: "max(value)",
    Function.SUM: f"CASE WHEN {_ANY_HUGE} THEN {_NAN} ELSE {_SUM} END",
    Function.MEAN: f"CASE WHEN {_ANY_HUGE} THEN {_NAN} ELSE {_SUM} / count(*) END",
    Function.FIRST: "{any}(CASE WHEN first_place = 1 THEN value END)",
    Function.LAST: "{any}(CASE WHEN last_place = 1 THEN value END)",
    Function.STDDEV: f"CASE WHEN count(*) = 1 OR sum(CASE WHEN {_TAME} THEN 0 ELSE 1 END) > 0 THEN {_NAN} "
    f"ELSE stddev_samp(CASE WHEN {_TAME} THEN CAST(value AS DOUBLE PRECISION) END) END",
}
_PERCENTILE: Final = "percentile_cont({fraction!r}) WITHIN GROUP (ORDER BY CAST(value AS DOUBLE PRECISION))"

_TEXTS = statements("analytics.sql")


@dataclass(frozen=True, slots=True)
class _Plan:
    """A question with everything looked up."""

    question: AggregateQuestion
    names: WarehouseNames
    # None: every device of the tenant.
    entities: Sequence[int] | None
    attributes: Sequence[Attribute]
    # [start, end), clipped to what there can be.
    start_us: int
    end_us: int
    # Empty: one bucket.
    edges: Sequence[int] = ()


def aggregate_in_warehouse(
    reader: WarehouseReader,
    tenant: str,
    question: AggregateQuestion,
    *,
    devices: Sequence[tuple[int, str]] | None = None,
    only: str | None = None,
) -> tuple[AggregateAnswer, Completeness]:
    """Compute an aggregate, with the completeness that holds for it. Blocks.

    `devices`: ids and names of the selected ones, needed where the selection goes by more than names. `only`: the one
    device that the caller may see; None: all of its tenant.

    Raises:
        UnknownToWarehouse: the warehouse does not know a device or attribute of the question.
        AggregateTypeMismatch, TimeZoneUnknown, TooManyPoints: as `storage.aggregate.aggregate`.
        StorageError: see `Warehouse.query`.
    """
    named = None if devices is not None else selected_names(question.selection, only)
    names, known = warehouse_names(reader, tenant, named or [], question.attributes)
    attributes = [Attribute(number, name, kind, True) for number, (name, kind) in names.attributes.items()]
    check_types(question, attributes)
    if known.as_of_us is None:
        # Nothing can be said of an answer, so none is computed.
        return _answer(question, attributes, [], known), known
    if devices is not None:
        entities: Sequence[int] | None = [number for number, _ in devices]
    else:
        entities = None if named is None else list(names.newest.values())
    plan = _Plan(
        question,
        names,
        entities,
        attributes,
        max(question.start_us, known.complete_from_us or 0),
        min(question.end_us, known.as_of_us + AHEAD_US),
    )
    completeness = known
    rows: list[tuple[Any, ...]] = []
    if plan.start_us < plan.end_us and entities != []:
        plan = _bucketed(reader, plan)
        for value_type, group in by_result_type(question, attributes):
            found, state = _compute(reader, plan, value_type, group)
            completeness = of_both(completeness, state)
            rows += found
            if len(rows) > MAX_POINTS:
                raise TooManyPoints(len(rows))
    by_id = {0: "", **(dict(devices) if devices is not None else names.entities)}
    if question.by_entity and entities is None and rows:
        found_names, state = _device_names(reader, names.tenant_id, {row[1] for row in rows})
        by_id |= found_names
        completeness = of_both(completeness, state)
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
        text = _TEXTS["oldest_reading"].format(us=reader.microseconds("ts"), branches=branches)
        scope = Scope(plan.names.tenant_id, start_us, plan.end_us)
        ((oldest_us,),) = reader.query(text, parameters, scope=scope).rows
        start_us = plan.end_us - 1 if oldest_us is None else max(start_us, oldest_us)
    return replace(plan, start_us=start_us, edges=bucket_edges(bucket, start_us, plan.end_us))


def _compute(
    reader: WarehouseReader, plan: _Plan, value_type: ValueType, attributes: Sequence[Attribute]
) -> tuple[list[tuple[Any, ...]], Completeness]:
    """Rows of (bucket's beginning, entity id or 0, attribute id or 0, results)."""
    question = plan.question
    branches, parameters = _branches(reader, plan, attributes, value_type)
    columns = [
        text.format(any="bool_or" if value_type is ValueType.BOOLEAN else "max")
        for function in question.functions
        for text in (
            [_PERCENTILE.format(fraction=p / 100) for p in question.percentiles]
            if function is Function.PERCENTILE
            else [_RESULTS[function]]
        )
    ]
    places = [
        _TEXTS["aggregate_place"].format(direction=direction, place=place)
        for function, direction, place in (
            (Function.FIRST, "ASC", "first_place"),
            (Function.LAST, "DESC", "last_place"),
        )
        if function in question.functions
    ]
    statement = _TEXTS["aggregate"].format(
        results=", ".join(columns),
        places="".join(places),
        bucket=_bucket(plan),
        entity="entity_id" if question.by_entity else "CAST(0 AS BIGINT)",
        attribute="attribute_id" if question.by_attribute else "0",
        branches=branches,
    )
    scope = Scope(plan.names.tenant_id, plan.start_us, plan.end_us)
    answer = reader.query(statement, [*parameters, MAX_POINTS + 1], scope=scope)
    rows = [
        (question.start_us if not plan.edges else at_us, entity, attribute, _results(question, results))
        for at_us, entity, attribute, *results in answer.rows
    ]
    return rows, answer.completeness


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
    texts, parameters = [], []
    for own in sorted({attribute.type for attribute in attributes}):
        ids = [attribute.attribute_id for attribute in attributes if attribute.type is own]
        value = "NULL" if wanted is None else "value" if own is wanted else f"CAST(value AS {SQL_TYPES[wanted]})"
        texts.append(
            _TEXTS["aggregate_branch"].format(
                us=reader.microseconds("ts") if plan.edges else "NULL",
                value=value,
                table=f"entity_attributes_{own}",
                entities=_among(plan.entities),
                attributes=marks(ids),
            )
        )
        parameters += [plan.names.tenant_id, *ids, to_timestamp(plan.start_us), to_timestamp(plan.end_us)]
    return " UNION ALL ".join(texts), parameters


def _among(entities: Sequence[int] | None) -> str:
    # Numbers that a database gave us, and too many for parameters.
    return "true" if entities is None else f"entity_id IN ({', '.join(str(int(number)) for number in entities)})"


def _bucket(plan: _Plan) -> str:
    """The beginning of a reading's bucket, by its time `us`: counted from where equally wide buckets begin to run."""
    if not plan.edges:
        return "CAST(0 AS BIGINT)"
    cases = [
        f"WHEN us >= {run.start_us} THEN us - mod(us - {run.start_us}, {run.width_us})"
        for run in reversed(runs(plan.edges, plan.end_us))
    ]
    return f"CASE {' '.join(cases)} END"


def _device_names(reader: WarehouseReader, tenant_id: int, ids: set[int]) -> tuple[dict[int, str], Completeness]:
    text = _TEXTS["device_names"].format(entities=_among(sorted(ids)))
    answer = reader.query(text, [tenant_id], scope=Scope(tenant_id))
    return dict(answer.rows), answer.completeness
