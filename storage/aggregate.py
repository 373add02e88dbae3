"""Aggregates on PostgreSQL: from the readings, or from time rollups where these answer the question.

A range that rollups serve is cut in three: the ragged ends come from the readings, what lies between from the widest
buckets of which the asked ones are made. An answer from rollups is complete up to their watermark, which is read in the
same snapshot.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby, pairwise
from typing import Any, Final, LiteralString

import numpy as np
from psycopg import sql
from psycopg.types.json import Jsonb

from storage.aggregate_buckets import HOUR_US, MAX_POINTS, MINUTE_US, TooManyPoints, bucket_edges
from storage.aggregate_model import (
    MAX_SELECTED,
    NUMERIC,
    AggregateAnswer,
    AggregateColumn,
    AggregateQuestion,
    AggregateSeries,
    AggregateSource,
    AggregateTypeMismatch,
    Function,
    Selection,
    SelectionTooLarge,
    result_type,
)
from storage.binary import Int4Array, Int8Array, TimestampArray
from storage.model import Attribute, ValueType
from storage.read_model import EntityNotFound
from storage.read_series import attributes_by_name, entity_ids
from storage.read_session import ReadSession
from storage.read_wire import Timestamp
from storage.search import bound_filter, follower_watermark, latest_condition, oldest_shown
from storage.statements import statements

_SQL = statements("aggregate.sql")

# No reading lies further ahead: a tenant's clock window ends at most 7 days after now.
_AHEAD_US: Final = 8 * 24 * HOUR_US

_HUGE: Final[LiteralString] = "abs(value::float8) >= 1e140 AND abs(value::float8) < 'Infinity'"
# SUM and STDDEV would fail, not overflow to infinity, where a finite value is too large.
_OF_READINGS: Final[Mapping[Function, LiteralString]] = {
    Function.COUNT: "count(*)",
    Function.MIN: "min(value)",
    Function.MAX: "max(value)",
    Function.SUM: f"CASE WHEN count(*) FILTER (WHERE {_HUGE}) > 0 THEN 'NaN' "
    f"ELSE sum(value) FILTER (WHERE NOT ({_HUGE})) END::double precision",
    Function.MEAN: f"CASE WHEN count(*) FILTER (WHERE {_HUGE}) > 0 THEN 'NaN' "
    f"ELSE sum(value) FILTER (WHERE NOT ({_HUGE})) / count(*) END::double precision",
    Function.FIRST: "(array_agg(value ORDER BY ts, entity_id, attribute_id))[1]",
    Function.LAST: "(array_agg(value ORDER BY ts DESC, entity_id DESC, attribute_id DESC))[1]",
    Function.STDDEV: f"CASE WHEN count(*) FILTER (WHERE {_HUGE}) > 0 OR count(*) = 1 THEN 'NaN' "
    f"ELSE stddev_samp(value::double precision) FILTER (WHERE NOT ({_HUGE})) END",
    Function.PERCENTILE: "percentile_cont(%(fractions)s::double precision[]) "
    "WITHIN GROUP (ORDER BY value::double precision)",
}
_OF_ROLLUPS: Final[Mapping[Function, LiteralString]] = {
    Function.COUNT: "sum(readings)::bigint",
    Function.MIN: "min(minimum)",
    Function.MAX: "max(maximum)",
    Function.SUM: "sum(total)",
    Function.MEAN: "sum(total) / sum(readings)::double precision",
    Function.FIRST: "(array_agg(first_value ORDER BY first_ts, entity_id, attribute_id))[1]",
    Function.LAST: "(array_agg(last_value ORDER BY last_ts DESC, entity_id DESC, attribute_id DESC))[1]",
    Function.STDDEV: "CASE WHEN sum(readings) = 1 THEN 'NaN' ELSE sqrt(sum(deviation + readings * "
    "(mean - overall) * (mean - overall)) / (sum(readings) - 1)::double precision) END",
}


@dataclass(frozen=True, slots=True)
class _Rolled:
    """The part of a range that rollups serve: buckets of `unit` in [from_us, to_us)."""

    unit: LiteralString
    from_us: int
    to_us: int
    as_of_us: int


@dataclass(frozen=True, slots=True)
class _Plan:
    """A question with everything looked up."""

    question: AggregateQuestion
    attributes: Sequence[Attribute]
    selected: sql.Composable
    parameters: Mapping[str, Any]
    # [start, end), clipped to what there can be.
    start_us: int
    end_us: int
    edges: Sequence[int]
    rolled: _Rolled | None


async def aggregate(
    session: ReadSession, question: AggregateQuestion, *, needed_as_of_us: int | None, only: str | None = None
) -> AggregateAnswer:
    """Compute an aggregate; rollups may serve when they are complete up to `needed_as_of_us` (None: they may not).

    `only`: the one device the caller may see; None: all of its tenant.

    Raises:
        AttributeNotFound, EntityNotFound: the tenant does not have one of them.
        AggregateTypeMismatch: a function does not exist for an attribute's type.
        FilterInvalid, LatestNotKept: of the selection's filter.
        SelectionTooLarge: the filter selects more than MAX_SELECTED devices.
        TimeZoneUnknown: there is no such time zone.
        TooManyPoints: more than MAX_POINTS buckets, or buckets times groups.
    """
    attributes = list((await attributes_by_name(session, question.attributes)).values())
    check_types(question, attributes)
    oldest_us = await oldest_shown(session)
    start_us = max(question.start_us, oldest_us)
    end_us = min(question.end_us, session.as_of_us + _AHEAD_US)
    edges: list[int] = []
    if start_us < end_us:
        edges = bucket_edges(question.bucket, start_us, end_us) if question.bucket else [question.start_us]
    selected, parameters = await _selected(session, question.selection, oldest_us, only)
    rolled = None
    if edges and needed_as_of_us is not None:
        rolled = await _rolled(session, question, attributes, edges, start_us, end_us, needed_as_of_us)
    plan = _Plan(question, attributes, selected, parameters, start_us, end_us, edges, rolled)
    await session.run_text(_SQL["plan_aggregate"])
    series: list[AggregateSeries] = []
    if edges:
        found: list[tuple[int, int, int, tuple[Any, ...]]] = []
        for value_type, group in _by_result_type(question, attributes):
            found += await _compute(session, plan, value_type, group)
            if len(found) > MAX_POINTS:
                raise TooManyPoints(len(found))
        series = await _series(session, plan, found)
    return AggregateAnswer(
        as_of_us=session.as_of_us if rolled is None else min(session.as_of_us, rolled.as_of_us),
        complete_from_us=oldest_us,
        source=AggregateSource.READINGS if rolled is None else AggregateSource.ROLLUP,
        series=series,
    )


def check_types(question: AggregateQuestion, attributes: Sequence[Attribute]) -> None:
    """Raises AggregateTypeMismatch unless every function exists for the attributes, together or each by itself."""
    for function in question.functions:
        for attribute in attributes:
            if function in NUMERIC and attribute.type not in (ValueType.DOUBLE, ValueType.BIGINT):
                text = f"{function} does not exist for {attribute.name!r}, which is of type {attribute.type}"
                raise AggregateTypeMismatch(attribute.name, function, text)
    if not question.by_attribute:
        _common_type(attributes)


def _common_type(attributes: Sequence[Attribute]) -> ValueType:
    types = {attribute.type for attribute in attributes}
    if len(types) == 1:
        return attributes[0].type
    if types == {ValueType.DOUBLE, ValueType.BIGINT}:
        return ValueType.DOUBLE
    other = next(a for a in attributes if a.type is not attributes[0].type)
    text = f"{attributes[0].name!r} and {other.name!r} are of types that do not mix; group by attribute"
    raise AggregateTypeMismatch(other.name, "", text)


def _by_result_type(
    question: AggregateQuestion, attributes: Sequence[Attribute]
) -> list[tuple[ValueType, list[Attribute]]]:
    """What one statement computes: values of one type."""
    if not question.by_attribute:
        return [(_common_type(attributes), list(attributes))]
    ordered = sorted(attributes, key=lambda a: a.type)
    return [(value_type, list(group)) for value_type, group in groupby(ordered, key=lambda a: a.type)]


async def _selected(
    session: ReadSession, selection: Selection, oldest_us: int, only: str | None
) -> tuple[sql.Composable, dict[str, Any]]:
    """A statement that gives the ids of the selected devices, and its parameters."""
    kind = {"type": selection.entity_type, "labels": Jsonb(dict(selection.labels))}
    names = list(selection.entities)
    if only is not None:
        names = [only] if not names or only in names else []
    by_id: list[int] | None = None
    if names or only is not None:
        ids = await entity_ids(session, names)
        for name in selection.entities:
            if name not in ids:
                raise EntityNotFound(name)
        by_id = list(ids.values())
    if selection.filter or (by_id is not None and (selection.entity_type or selection.labels)):
        joins, condition, found = latest_condition(await bound_filter(session, selection.filter))
        if by_id is not None:
            condition = sql.SQL("{} AND e.entity_id = ANY (%(by_id)s)").format(condition)
        statement = sql.SQL(_SQL["devices_of_filter"]).format(values=joins, condition=condition)
        limits = {"oldest": Timestamp(oldest_us), "limit": MAX_SELECTED + 1, "by_id": Int8Array(by_id or [])}
        rows = await (await session.run_text(statement, {**kind, **limits, **found})).fetchall()
        if len(rows) > MAX_SELECTED:
            raise SelectionTooLarge(f"the filter selects more than {MAX_SELECTED} devices; narrow it, or leave it out")
        by_id = [row[0] for row in rows]
    if by_id is not None:
        return sql.SQL(_SQL["selected_by_id"]), {"entities": Int8Array(by_id)}
    return sql.SQL(_SQL["selected_by_kind"]).format(), kind


async def _rolled(
    session: ReadSession,
    question: AggregateQuestion,
    attributes: Sequence[Attribute],
    edges: Sequence[int],
    start_us: int,
    end_us: int,
    needed_as_of_us: int,
) -> _Rolled | None:
    if Function.PERCENTILE in question.functions or any(
        a.type not in (ValueType.DOUBLE, ValueType.BIGINT) for a in attributes
    ):
        return None
    as_of_us = await follower_watermark(session)
    if as_of_us is None or as_of_us < needed_as_of_us:
        return None
    parameters = {"attributes": Int4Array([a.attribute_id for a in attributes])}
    rows = await (await session.run_text(_SQL["serving_rollups"], parameters)).fetchall()
    if len(rows) < len(attributes):
        return None
    filled_from_us = max(start_us, *(row[1] for row in rows))
    inner = edges[1:]
    for unit_us, unit in ((HOUR_US, "hour"), (MINUTE_US, "minute")):
        from_us, to_us = -(-filled_from_us // unit_us) * unit_us, end_us // unit_us * unit_us
        if from_us < to_us and not any(edge % unit_us for edge in inner):
            return _Rolled("hour" if unit == "hour" else "minute", from_us, to_us, as_of_us)
    return None


async def _compute(
    session: ReadSession, plan: _Plan, value_type: ValueType, attributes: Sequence[Attribute]
) -> list[tuple[int, int, int, tuple[Any, ...]]]:
    """Rows of (entity id or 0, attribute id or 0, bucket's beginning, results)."""
    question = plan.question
    bucket, bucket_parameters = _bucket_key(plan.edges)
    keys = [
        bucket,
        sql.SQL("entity_id" if question.by_entity else "0::bigint"),
        sql.SQL("attribute_id" if question.by_attribute else "0"),
    ]
    text = "aggregate_readings" if plan.rolled is None else "merge_rollups"
    functions = _OF_READINGS if plan.rolled is None else _OF_ROLLUPS
    fields = {
        "keys": sql.SQL(", ").join(keys),
        "keys_by_number": sql.SQL("1, 2, 3"),
        "results": sql.SQL(", ").join(sql.SQL(functions[f]) for f in question.functions),
        "source": _source(plan, value_type, attributes),
    }
    if plan.rolled is not None:
        fields["overall"] = sql.SQL("")
        if Function.STDDEV in question.functions:
            # The mean of the whole bucket, next to each of its parts.
            fields["overall"] = sql.SQL(
                ", sum(p.total) OVER (PARTITION BY {0}) / (sum(p.readings) OVER (PARTITION BY {0}))::double precision "
                "AS overall"
            ).format(fields["keys"])
    statement = sql.SQL(_SQL[text]).format(**fields)
    parameters = {
        **plan.parameters,
        **bucket_parameters,
        "attributes": Int4Array([a.attribute_id for a in attributes]),
        "fractions": [p / 100 for p in question.percentiles],
        "limit": MAX_POINTS + 1,
    }
    rows = await (await session.run_text(statement, parameters)).fetchall()
    uniform = "width" in bucket_parameters
    found = []
    for key, entity_id, attribute_id, *results in rows:
        at = plan.edges[0] if len(plan.edges) == 1 else key if uniform else plan.edges[key - 1]
        found.append((entity_id, attribute_id, at, tuple(results)))
    return found


def _bucket_key(edges: Sequence[int]) -> tuple[sql.Composable, dict[str, Any]]:
    """The bucket of a reading: its beginning where all are equally wide, else its number from 1."""
    if len(edges) == 1:
        return sql.SQL("0"), {}
    width_us = edges[1] - edges[0]
    if edges[-1] - edges[0] == width_us * (len(edges) - 1) and all(b - a == width_us for a, b in pairwise(edges)):
        origin = Timestamp(edges[0])
        return (
            sql.SQL("date_bin(%(width)s, ts, %(origin)s)"),
            {"width": timedelta(microseconds=width_us), "origin": origin},
        )
    return sql.SQL("width_bucket(ts, %(edges)s)"), {"edges": TimestampArray(np.array(edges, np.int64))}


def _source(plan: _Plan, value_type: ValueType, attributes: Sequence[Attribute]) -> sql.Composable:
    """The readings, or the buckets of rollups and the readings around them, as a statement."""
    types = sorted({attribute.type for attribute in attributes})

    def readings(from_us: int, to_us: int) -> list[sql.Composable]:
        return [
            _branch("readings_branch", f"entity_attributes_{t}", plan, t, value_type, from_us, to_us) for t in types
        ]

    rolled = plan.rolled
    if rolled is None:
        return sql.SQL("\nUNION ALL\n").join(readings(plan.start_us, plan.end_us))
    branches = [
        _branch("rollup_branch", f"rollup_{rolled.unit}_{t}", plan, t, value_type, rolled.from_us, rolled.to_us)
        for t in types
    ]
    for from_us, to_us in ((plan.start_us, rolled.from_us), (rolled.to_us, plan.end_us)):
        if from_us < to_us:
            branches += [sql.SQL(_SQL["reading_as_rollup"]).format(source=b) for b in readings(from_us, to_us)]
    return sql.SQL("\nUNION ALL\n").join(branches)


def _branch(
    text: str, table: str, plan: _Plan, own: ValueType, wanted: ValueType, from_us: int, to_us: int
) -> sql.Composable:
    return sql.SQL(_SQL[text]).format(
        cast=sql.SQL("" if own is wanted else "::double precision"),
        selected=plan.selected,
        table=sql.Identifier(table),
        from_=_instant(from_us),
        to=_instant(to_us),
    )


def _instant(time_us: int) -> sql.Composable:
    """A time as a constant of the statement, exact to the microsecond."""
    seconds, rest = divmod(time_us, 1_000_000)
    return sql.SQL("(to_timestamp({}) + {} * interval '1 microsecond')").format(sql.Literal(seconds), sql.Literal(rest))


async def _series(
    session: ReadSession, plan: _Plan, found: Sequence[tuple[int, int, int, tuple[Any, ...]]]
) -> list[AggregateSeries]:
    question = plan.question
    entity_names: dict[int, str] = {0: ""}
    if question.by_entity:
        parameters = {"entities": Int8Array(list({row[0] for row in found}))}
        entity_names |= dict(await (await session.run_text(_SQL["device_names"], parameters)).fetchall())
    attributes = {a.attribute_id: a for a in plan.attributes}
    common = None if question.by_attribute else _common_type(plan.attributes)

    def group(row: tuple[int, int, int, tuple[Any, ...]]) -> tuple[str, str, int]:
        return entity_names[row[0]], attributes[row[1]].name if row[1] else "", row[1]

    series = []
    for (entity, name, attribute_id), rows in groupby(sorted(found, key=lambda r: (*group(r), r[2])), key=group):
        points = list(rows)
        value_type = common or attributes[attribute_id].type
        columns: list[AggregateColumn] = []
        for place, function in enumerate(question.functions):
            kind = result_type(function, value_type)
            results = [row[3][place] for row in points]
            if function is Function.PERCENTILE:
                columns += [
                    AggregateColumn(function, percentile, kind, [r[i] for r in results])
                    for i, percentile in enumerate(question.percentiles)
                ]
            else:
                columns.append(AggregateColumn(function, 0.0, kind, results))
        series.append(AggregateSeries(entity, name, [row[2] for row in points], columns))
    return series
