"""Aggregate: from the request, checked field by field, to a question; and from the answer to messages."""

from collections.abc import Sequence
from typing import Final

from atlasco.telemetry.v1 import query_pb2

from gateway.auth import Identity
from gateway.query_requests import (
    MAX_SERIES_ATTRIBUTES,
    attribute_names,
    entity_names,
    entity_type,
    filter_text,
    labels,
    time_range,
)
from gateway.status import field_invalid
from storage.aggregate.buckets import WIDTHS, Bucket, BucketUnit
from storage.aggregate.model import (
    AggregateAnswer,
    AggregateColumn,
    AggregateQuestion,
    Function,
    Selection,
)
from storage.model import ValueType
from storage.outbox import WIRE_TYPES

MAX_PERCENTILES: Final = 16

SELECTION_FILTER: Final = "selection.filter"
"""Where an AggregateRequest has its filter."""

FUNCTIONS: Final = {
    query_pb2.AGGREGATE_FUNCTION_COUNT: Function.COUNT,
    query_pb2.AGGREGATE_FUNCTION_MIN: Function.MIN,
    query_pb2.AGGREGATE_FUNCTION_MAX: Function.MAX,
    query_pb2.AGGREGATE_FUNCTION_SUM: Function.SUM,
    query_pb2.AGGREGATE_FUNCTION_MEAN: Function.MEAN,
    query_pb2.AGGREGATE_FUNCTION_FIRST: Function.FIRST,
    query_pb2.AGGREGATE_FUNCTION_LAST: Function.LAST,
    query_pb2.AGGREGATE_FUNCTION_STDDEV: Function.STDDEV,
    query_pb2.AGGREGATE_FUNCTION_PERCENTILE: Function.PERCENTILE,
}
_WIRE_FUNCTIONS: Final = {function: wire for wire, function in FUNCTIONS.items()}
_UNITS: Final = {
    query_pb2.BUCKET_UNIT_SECOND: BucketUnit.SECOND,
    query_pb2.BUCKET_UNIT_MINUTE: BucketUnit.MINUTE,
    query_pb2.BUCKET_UNIT_HOUR: BucketUnit.HOUR,
    query_pb2.BUCKET_UNIT_DAY: BucketUnit.DAY,
    query_pb2.BUCKET_UNIT_WEEK: BucketUnit.WEEK,
    query_pb2.BUCKET_UNIT_MONTH: BucketUnit.MONTH,
}
_GROUPS: Final = frozenset({query_pb2.AGGREGATE_GROUP_ENTITY, query_pb2.AGGREGATE_GROUP_ATTRIBUTE})


def aggregate_question(identity: Identity, request: query_pb2.AggregateRequest) -> AggregateQuestion:
    """The request as a question.

    Raises:
        Refusal: a field is out of bounds.
        FilterInvalid: the selection's filter does not parse; its path is SELECTION_FILTER.
    """
    attributes = list(attribute_names(request.attributes))
    if not 1 <= len(attributes) <= MAX_SERIES_ATTRIBUTES:
        raise field_invalid("attributes", f"must name 1 to {MAX_SERIES_ATTRIBUTES} attributes")
    start_us, end_us = time_range(request.start_time_us, request.end_time_us)
    functions = _functions(request.functions)
    groups = list(request.group_by)
    # A group of a later version of the protocol must be refused, not silently ignored.
    if len(set(groups)) < len(groups) or not _GROUPS.issuperset(groups):
        raise field_invalid("group_by", "must name ENTITY and ATTRIBUTE at most once each")
    return AggregateQuestion(
        selection=_selection(identity, request.selection),
        attributes=attributes,
        start_us=start_us,
        end_us=end_us,
        functions=functions,
        bucket=_bucket(request.bucket) if request.HasField("bucket") else None,
        percentiles=_percentiles(request.percentiles, wanted=Function.PERCENTILE in functions),
        by_entity=query_pb2.AGGREGATE_GROUP_ENTITY in groups,
        by_attribute=query_pb2.AGGREGATE_GROUP_ATTRIBUTE in groups,
    )


def aggregate_message(answer: AggregateAnswer) -> list[query_pb2.AggregateSeries]:
    """The series of an answer."""
    return [
        query_pb2.AggregateSeries(
            entity=series.entity,
            attribute=series.attribute,
            bucket_times_us=series.bucket_times_us,
            columns=[_column(column) for column in series.columns],
        )
        for series in answer.series
    ]


def _column(column: AggregateColumn) -> query_pb2.AggregateColumn:
    message = query_pb2.AggregateColumn(
        function=_WIRE_FUNCTIONS[column.function], percentile=column.percentile, type=WIRE_TYPES[column.type]
    )
    match column.type:
        case ValueType.DOUBLE:
            message.double_values.extend(float(value) for value in column.values)
        case ValueType.BIGINT:
            message.int64_values.extend(int(value) for value in column.values)
        case ValueType.BOOLEAN:
            message.bool_values.extend(bool(value) for value in column.values)
        case ValueType.TEXT:
            message.string_values.extend(str(value) for value in column.values)
    return message


def _selection(identity: Identity, selection: query_pb2.Selection) -> Selection:
    names = list(entity_names(identity, selection.entities, "selection.entities")) if selection.entities else []
    return Selection(
        names,
        entity_type(selection.entity_type, "selection.entity_type"),
        labels(selection.labels, "selection.labels"),
        filter_text(selection.filter),
    )


def _functions(asked: Sequence[query_pb2.AggregateFunction.ValueType]) -> list[Function]:
    if not asked or len(set(asked)) < len(asked):
        raise field_invalid("functions", "must name 1 to 9 functions, each once")
    for place, function in enumerate(asked):
        if function not in FUNCTIONS:
            raise field_invalid(f"functions[{place}]", f"is {function}, which is not a function")
    return [FUNCTIONS[function] for function in asked]


def _percentiles(asked: Sequence[float], *, wanted: bool) -> list[float]:
    if wanted != bool(asked) or len(asked) > MAX_PERCENTILES:
        raise field_invalid("percentiles", f"must hold 1 to {MAX_PERCENTILES} values with PERCENTILE, none without")
    for place, percentile in enumerate(asked):
        if not 0 <= percentile <= 100:
            raise field_invalid(f"percentiles[{place}]", "must be 0 to 100")
    return list(asked)


def _bucket(bucket: query_pb2.Bucket) -> Bucket:
    unit = _UNITS.get(bucket.unit)
    if unit is None:
        raise field_invalid("bucket.unit", "must be one of SECOND to MONTH")
    width = bucket.width or 1
    if width not in WIDTHS[unit]:
        raise field_invalid("bucket.width", f"must be one of {sorted(WIDTHS[unit])} for {unit.upper()}")
    return Bucket(unit, width, bucket.time_zone or "UTC")
