"""Aggregates apart from where they are computed: which types they have, the shape of an answer, two parts as one. Pure.

Two parts of a range, the older and the newer, may meet within a bucket. Each part is then asked for the functions from
which the whole bucket's follow (`part_functions`): a mean from sums and counts, a deviation by Chan, Golub and LeVeque,
"Updating formulae and a pairwise algorithm for computing sample variances" (1979). A percentile follows from nothing
but the readings, so the parts must not meet within a bucket of which it is asked.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias

from storage.aggregate.buckets import MAX_POINTS, TooManyPoints, bucket_holding
from storage.aggregate.model import (
    NUMERIC,
    AggregateAnswer,
    AggregateColumn,
    AggregateQuestion,
    AggregateSeries,
    AggregateTypeMismatch,
    Function,
    result_type,
)
from storage.aggregate.text_bound import check_text
from storage.model import Attribute, ValueType
from storage.reads.model import Scalar

_Point: TypeAlias = dict[tuple[Function, float], Scalar]
"""One bucket's results, by function and percentile."""


@dataclass(frozen=True, slots=True)
class AggregateRow:
    """One bucket of one group. `results` has one for each function asked; PERCENTILE's is a sequence."""

    # Empty and 0 unless grouped by.
    entity: str
    attribute_id: int
    at_us: int
    results: Sequence[Any]


def check_types(question: AggregateQuestion, attributes: Sequence[Attribute]) -> None:
    """Raises AggregateTypeMismatch unless every function exists for the attributes, together or each by itself."""
    for function in question.functions:
        for attribute in attributes:
            if function in NUMERIC and attribute.type not in (ValueType.DOUBLE, ValueType.BIGINT):
                text = f"{function} does not exist for {attribute.name!r}, which is of type {attribute.type}"
                raise AggregateTypeMismatch(attribute.name, function, text)
    if not question.by_attribute:
        common_type(attributes)


def common_type(attributes: Sequence[Attribute]) -> ValueType:
    """The type of all of them; DOUBLE where numbers mix. Raises AggregateTypeMismatch where others do."""
    types = {attribute.type for attribute in attributes}
    if len(types) == 1:
        return attributes[0].type
    if types == {ValueType.DOUBLE, ValueType.BIGINT}:
        return ValueType.DOUBLE
    other = next(a for a in attributes if a.type is not attributes[0].type)
    text = f"{attributes[0].name!r} and {other.name!r} are of types that do not mix; group by attribute"
    raise AggregateTypeMismatch(other.name, "", text)


def by_result_type(
    question: AggregateQuestion, attributes: Sequence[Attribute]
) -> list[tuple[ValueType, list[Attribute]]]:
    """What one statement computes: values of one type."""
    if not question.by_attribute:
        return [(common_type(attributes), list(attributes))]
    ordered = sorted(attributes, key=lambda a: a.type)
    return [(value_type, list(group)) for value_type, group in groupby(ordered, key=lambda a: a.type)]


def series_of(
    question: AggregateQuestion, attributes: Sequence[Attribute], rows: Iterable[AggregateRow]
) -> list[AggregateSeries]:
    """Rows in any order as an answer's series.

    Raises:
        TooMuchText: the texts are more than an answer may hold.
    """
    by_id = {attribute.attribute_id: attribute for attribute in attributes}
    rows = list(rows)
    if any(attribute.type is ValueType.TEXT for attribute in attributes):
        check_text(value for row in rows for value in row.results)
    common = None if question.by_attribute else common_type(attributes)

    def group(row: AggregateRow) -> tuple[str, str, int]:
        return row.entity, by_id[row.attribute_id].name if row.attribute_id else "", row.attribute_id

    series = []
    for (entity, name, attribute_id), of_group in groupby(sorted(rows, key=lambda r: (*group(r), r.at_us)), key=group):
        points = list(of_group)
        value_type = common or by_id[attribute_id].type
        columns: list[AggregateColumn] = []
        for place, function in enumerate(question.functions):
            kind = result_type(function, value_type)
            results = [row.results[place] for row in points]
            if function is Function.PERCENTILE:
                columns += [
                    AggregateColumn(function, percentile, kind, [r[i] for r in results])
                    for i, percentile in enumerate(question.percentiles)
                ]
            else:
                columns.append(AggregateColumn(function, 0.0, kind, results))
        series.append(AggregateSeries(entity, name, [row.at_us for row in points], columns))
    return series


def part_functions(functions: Sequence[Function]) -> list[Function]:
    """What each of two parts is asked for, so that the results of the whole follow."""
    needed = set(functions)
    if needed & {Function.MEAN, Function.STDDEV}:
        needed |= {Function.COUNT, Function.SUM}
    return [function for function in Function if function in needed]


def joined(question: AggregateQuestion, older: AggregateAnswer, newer: AggregateAnswer, cut_us: int) -> AggregateAnswer:
    """The answer to `question` of its parts before and from `cut_us` on, each asked for `part_functions`.

    Raises:
        TooManyPoints, TooMuchText: each part has as many as an answer may, or fewer, but not both together.
    """
    edge_us = _bucket_at(question, cut_us)
    groups: dict[tuple[str, str], tuple[dict[int, _Point], Sequence[AggregateColumn]]] = {}
    for part in (older, newer):
        for series in part.series:
            points, _ = groups.setdefault((series.entity, series.attribute), ({}, series.columns))
            for place, at_us in enumerate(series.bucket_times_us):
                # The newer part's first bucket begins where the whole's does that holds the cut.
                at = edge_us if part is newer and at_us <= cut_us else at_us
                point = {(c.function, c.percentile): c.values[place] for c in series.columns}
                points[at] = _merged(points[at], point) if at in points else point
    count = sum(len(points) for points, _ in groups.values())
    if count > MAX_POINTS:
        raise TooManyPoints(count)
    found = [
        AggregateSeries(entity, attribute, sorted(points), _columns(question, points, columns))
        for (entity, attribute), (points, columns) in sorted(groups.items())
    ]
    check_text(v for series in found for c in series.columns if c.type is ValueType.TEXT for v in c.values)
    return AggregateAnswer(newer.as_of_us, older.complete_from_us, newer.source, found)


def _bucket_at(question: AggregateQuestion, time_us: int) -> int:
    if question.bucket is None:
        return question.start_us
    return bucket_holding(question.bucket, question.start_us, time_us)


def _columns(
    question: AggregateQuestion, points: Mapping[int, _Point], columns: Sequence[AggregateColumn]
) -> list[AggregateColumn]:
    types = {(column.function, column.percentile): column.type for column in columns}
    wanted = [
        (function, percentile)
        for function in question.functions
        for percentile in (question.percentiles if function is Function.PERCENTILE else (0.0,))
    ]
    ordered = [points[at] for at in sorted(points)]
    return [AggregateColumn(*key, types[key], [point[key] for point in ordered]) for key in wanted]


def _merged(older: _Point, newer: _Point) -> _Point:
    """One bucket of its two parts' results."""
    return {key: _merged_result(key[0], older, newer) for key in older}


def _merged_result(function: Function, older: _Point, newer: _Point) -> Any:
    one: Any = older.get((function, 0.0))
    other: Any = newer.get((function, 0.0))
    match function:
        case Function.COUNT | Function.SUM:
            return one + other
        case Function.FIRST:
            return one
        case Function.LAST:
            return other
        case Function.MIN:
            return min(one, other, key=_nan_last)
        case Function.MAX:
            return max(one, other, key=_nan_last)
        case Function.MEAN:
            return (_sum(older) + _sum(newer)) / (_count(older) + _count(newer))
        case Function.STDDEV:
            count, others = _count(older), _count(newer)
            apart = _sum(newer) / others - _sum(older) / count
            total = _deviation(older) + _deviation(newer) + apart * apart * count * others / (count + others)
            return math.sqrt(total / (count + others - 1)) if total >= 0 else math.nan
        case Function.PERCENTILE:
            raise AssertionError("parts of which a percentile is asked meet between buckets")


def _nan_last(value: float) -> tuple[bool, float]:
    """NaN is greater than every number."""
    return math.isnan(value), value


def _count(point: _Point) -> int:
    return int(point[Function.COUNT, 0.0])


def _sum(point: _Point) -> float:
    return float(point[Function.SUM, 0.0])


def _deviation(point: _Point) -> float:
    """The sum of the squared distances from the mean; NaN where a reading is not finite, or huge."""
    count = _count(point)
    if count == 1:
        return 0.0 if math.isfinite(_sum(point)) else math.nan
    return float(point[Function.STDDEV, 0.0]) ** 2 * (count - 1)
