"""Aggregates on PostgreSQL: from the readings, or from time rollups where these answer the question.

A range that rollups serve is cut in three: the ragged ends come from the readings, what lies between from the widest
buckets of which the asked ones are made. An answer from rollups is complete up to their watermark, which is read in the
same snapshot.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any, Final, LiteralString, TypeAlias

import numpy as np
from psycopg import sql
from psycopg.types.json import Jsonb

from storage.aggregate.buckets import AHEAD_US, MAX_POINTS, TooManyPoints, bucket_edges
from storage.aggregate.doubles import is_huge, is_tame, quotient, squares
from storage.aggregate.model import (
    MAX_SELECTED,
    AggregateAnswer,
    AggregateQuestion,
    AggregateSource,
    Function,
    Selection,
    SelectionTooLarge,
    selected_names,
)
from storage.aggregate.series import AggregateRow, by_result_type, check_types, series_of
from storage.aggregate.text_bound import within_text
from storage.binary import Int4Array, Int8Array, TimestampArray
from storage.errors import StorageError
from storage.filter.latest import bound_filter, latest_condition
from storage.model import Attribute, ValueType
from storage.reads.model import EntityNotFound
from storage.reads.series import attributes_by_name, entity_ids
from storage.reads.session import ReadSession
from storage.reads.watermark import materialization_watermark
from storage.reads.wire import Timestamp
from storage.statements import statements
from storage.times import HOUR_US, MINUTE_US, SECOND_US

_SQL = statements("aggregate.sql")

_HUGE: Final[LiteralString] = is_huge("value")
_TAME: Final[LiteralString] = is_tame("value")
_ANY_HUGE: Final[LiteralString] = f"count(*) FILTER (WHERE {_HUGE}) > 0"
_SUM: Final[LiteralString] = f"sum(value) FILTER (WHERE NOT {_HUGE})"
# SUM and STDDEV would fail, not overflow to infinity, where a finite value is too large.
_OF_READINGS: Final[Mapping[Function, LiteralString]] = {
    Function.COUNT: "count(*)",
    Function.MIN: "min(value)",
    Function.MAX: "max(value)",
    Function.SUM: f"CASE WHEN {_ANY_HUGE} THEN 'NaN' ELSE {_SUM} END::double precision",
    Function.MEAN: f"CASE WHEN {_ANY_HUGE} THEN 'NaN' ELSE {quotient(_SUM, 'count(*)')} END::double precision",
    Function.FIRST: "(array_agg(value ORDER BY ts, entity_id, attribute_id))[1]",
    Function.LAST: "(array_agg(value ORDER BY ts DESC, entity_id DESC, attribute_id DESC))[1]",
    Function.STDDEV: f"CASE WHEN {_ANY_HUGE} OR count(*) = 1 THEN 'NaN' "
    f"ELSE stddev_samp(value::double precision) FILTER (WHERE NOT {_HUGE}) END",
    Function.PERCENTILE: "percentile_cont(%(fractions)s::double precision[]) "
    "WITHIN GROUP (ORDER BY value::double precision)",
}
_DEVIATION: Final[LiteralString] = f"sum(deviation + {squares('readings', 'mean - overall')})"
_OF_ROLLUPS: Final[Mapping[Function, LiteralString]] = {
    Function.COUNT: "sum(readings)::bigint",
    Function.MIN: "min(minimum)",
    Function.MAX: "max(maximum)",
    Function.SUM: "sum(total)",
    Function.MEAN: quotient("sum(total)", "sum(readings)"),
    Function.FIRST: "(array_agg(first_value ORDER BY first_ts, entity_id, attribute_id))[1]",
    Function.LAST: "(array_agg(last_value ORDER BY last_ts DESC, entity_id DESC, attribute_id DESC))[1]",
    Function.STDDEV: "CASE WHEN sum(readings) = 1 THEN 'NaN' "
    f"ELSE sqrt({quotient(_DEVIATION, 'sum(readings) - 1')}) END",
}


@dataclass(frozen=True, slots=True)
class _Rolled:
    """The part of a range that rollups serve: buckets of `unit` in [from_us, to_us)."""

    unit: LiteralString
    from_us: int
    to_us: int
    as_of_us: int


_Found: TypeAlias = tuple[int, int, int, tuple[Any, ...]]
"""Entity id or 0, attribute id or 0, the bucket's beginning, results."""


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


class NotRolled(StorageError):
    """Rollups do not answer the question: not declared, not filled, not fresh enough, or of another width."""


async def aggregate(
    session: ReadSession,
    question: AggregateQuestion,
    *,
    needed_as_of_us: int | None,
    only: str | None = None,
    only_rolled: bool = False,
) -> AggregateAnswer:
    """Compute an aggregate; rollups may serve when they are complete up to `needed_as_of_us` (None: they may not).

    `only`: the one device the caller may see; None: all of its tenant. `only_rolled`: from rollups, and from
    readings of less than an hour at either end.

    Raises:
        NotRolled: with `only_rolled`, when rollups do not serve.
        AttributeNotFound, EntityNotFound: the tenant does not have one of them.
        AggregateTypeMismatch: a function does not exist for an attribute's type.
        FilterInvalid, LatestNotKept: of the selection's filter.
        SelectionTooLarge: the filter selects more than MAX_SELECTED devices.
        TimeZoneUnknown: there is no such time zone.
        TooManyPoints: more than MAX_POINTS buckets, or buckets times groups.
        TooMuchText: the texts are more than an answer may hold.
    """
    attributes = list((await attributes_by_name(session, question.attributes)).values())
    check_types(question, attributes)
    start_us = max(question.start_us, session.oldest_us)
    end_us = min(question.end_us, session.as_of_us + AHEAD_US)
    edges: list[int] = []
    if start_us < end_us:
        edges = bucket_edges(question.bucket, start_us, end_us) if question.bucket else [question.start_us]
    rolled = None
    if edges and needed_as_of_us is not None:
        rolled = await _rolled(session, question, attributes, edges, start_us, end_us, needed_as_of_us)
    if only_rolled and (rolled is None or rolled.from_us - start_us >= HOUR_US):
        raise NotRolled("rollups do not answer it at this freshness")
    selected, parameters = await _selected(session, question.selection, only)
    plan = _Plan(question, attributes, selected, parameters, start_us, end_us, edges, rolled)
    await session.run_text(_SQL["plan_aggregate"])
    found: list[_Found] = []
    for value_type, group in by_result_type(question, attributes) if edges else ():
        found += await _compute(session, plan, value_type, group)
        if len(found) > MAX_POINTS:
            raise TooManyPoints(len(found))
    return AggregateAnswer(
        as_of_us=session.as_of_us if rolled is None else min(session.as_of_us, rolled.as_of_us),
        complete_from_us=session.oldest_us,
        source=AggregateSource.READINGS if rolled is None else AggregateSource.ROLLUP,
        series=series_of(question, attributes, await _named(session, found)),
    )


async def selected_devices(
    session: ReadSession, selection: Selection, only: str | None, *, limit: int
) -> list[tuple[int, str]]:
    """Ids and names of the selected devices.

    Raises:
        EntityNotFound, FilterInvalid, AttributeNotFound, LatestNotKept: of the selection.
        SelectionTooLarge: it selects more than `limit` devices.
    """
    by_id = await _named_ids(session, selection, only)
    joins, condition, found = latest_condition(await bound_filter(session, selection.filter))
    if by_id is not None:
        condition = sql.SQL("{} AND e.entity_id = ANY (%(by_id)s)").format(condition)
    statement = sql.SQL(_SQL["devices_of_filter"]).format(values=joins, condition=condition)
    parameters = {
        "type": selection.entity_type,
        "labels": Jsonb(dict(selection.labels)),
        "oldest": Timestamp(session.oldest_us),
        "limit": limit + 1,
        "by_id": Int8Array(by_id or []),
        **found,
    }
    rows = await (await session.run_text(statement, parameters)).fetchall()
    if len(rows) > limit:
        raise SelectionTooLarge(f"the selection has more than {limit} devices; narrow it, or leave it out")
    return rows


async def devices_being_deleted(session: ReadSession) -> list[int]:
    """The ids of devices whose deletion was ordered and has not reached every store yet."""
    return [number for (number,) in await (await session.run_text(_SQL["devices_being_deleted"])).fetchall()]


async def _named_ids(session: ReadSession, selection: Selection, only: str | None) -> list[int] | None:
    names = selected_names(selection, only)
    if names is None:
        return None
    ids = await entity_ids(session, names)
    for name in selection.entities:
        if name not in ids:
            raise EntityNotFound(name)
    return list(ids.values())


async def _selected(
    session: ReadSession, selection: Selection, only: str | None
) -> tuple[sql.Composable, dict[str, Any]]:
    """A statement that gives the ids of the selected devices, and its parameters."""
    by_id: list[int] | None
    if selection.filter or (selection.by_condition and selected_names(selection, only) is not None):
        by_id = [number for number, _ in await selected_devices(session, selection, only, limit=MAX_SELECTED)]
    else:
        by_id = await _named_ids(session, selection, only)
    if by_id is not None:
        return sql.SQL(_SQL["selected_by_id"]), {"entities": Int8Array(by_id)}
    kind = {"type": selection.entity_type, "labels": Jsonb(dict(selection.labels))}
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
    watermark = await materialization_watermark(session)
    if watermark is None or not watermark.proves(needed_as_of_us, session.as_of_us):
        return None
    parameters = {"attributes": Int4Array([a.attribute_id for a in attributes])}
    rows = await (await session.run_text(_SQL["serving_rollups"], parameters)).fetchall()
    if len(rows) < len(attributes):
        return None
    # Back-fills begin at whole hours, whatever is stored of one that an earlier program made.
    filled_from_us = max(start_us, *(-(-row[1] // HOUR_US) * HOUR_US for row in rows))
    inner = edges[1:]
    for unit_us, unit in ((HOUR_US, "hour"), (MINUTE_US, "minute")):
        from_us, to_us = -(-filled_from_us // unit_us) * unit_us, end_us // unit_us * unit_us
        if from_us < to_us and not any(edge % unit_us for edge in inner):
            return _Rolled("hour" if unit == "hour" else "minute", from_us, to_us, watermark.as_of_us)
    return None


async def _compute(
    session: ReadSession, plan: _Plan, value_type: ValueType, attributes: Sequence[Attribute]
) -> list[_Found]:
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
        fields["mean"] = sql.SQL(quotient("p.total", "p.readings"))
        fields["overall"] = fields["window"] = sql.SQL("")
        if Function.STDDEV in question.functions:
            # The mean of the whole bucket, next to each of its parts.
            overall = quotient("sum(p.total) OVER w", "sum(p.readings) OVER w")
            fields["overall"] = sql.SQL(f", {overall} AS overall")
            fields["window"] = sql.SQL("WINDOW w AS (PARTITION BY {})").format(fields["keys"])
    statement = sql.SQL(_SQL[text]).format(**fields)
    if value_type is ValueType.TEXT:
        statement = within_text(question, statement)
    parameters = {
        **plan.parameters,
        **bucket_parameters,
        "attributes": Int4Array([a.attribute_id for a in attributes]),
        "fractions": [p / 100 for p in question.percentiles],
        "limit": MAX_POINTS + 1,
    }
    rows = await (await session.run_text(statement, parameters)).fetchall()
    uniform = "width" in bucket_parameters
    found: list[_Found] = []
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
    ragged, predicates = sql.SQL(_SQL["reading_as_rollup"]), {"huge": sql.SQL(_HUGE), "tame": sql.SQL(_TAME)}
    for from_us, to_us in ((plan.start_us, rolled.from_us), (rolled.to_us, plan.end_us)):
        if from_us < to_us:
            branches += [ragged.format(**predicates, source=branch) for branch in readings(from_us, to_us)]
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
    seconds, rest = divmod(time_us, SECOND_US)
    return sql.SQL("(to_timestamp({}) + {} * interval '1 microsecond')").format(sql.Literal(seconds), sql.Literal(rest))


async def _named(session: ReadSession, found: Sequence[_Found]) -> list[AggregateRow]:
    """Rows with the devices' names in place of their ids."""
    names: dict[int, str] = {0: ""}
    if ids := {row[0] for row in found if row[0]}:
        parameters = {"entities": Int8Array(list(ids))}
        names |= dict(await (await session.run_text(_SQL["device_names"], parameters)).fetchall())
    return [AggregateRow(names[entity], attribute, at_us, results) for entity, attribute, at_us, results in found]
