"""`atlasco query find` and `atlasco query aggregate`."""

import argparse
import re
import time
from collections.abc import Iterator
from typing import Any

from atlasco.telemetry.v1 import query_pb2

from cli.query_arguments import BadArgument, add_labels, add_question, take_relative_times
from cli.query_gateway import LIST_PAGE, Gateway
from cli.query_print import Row
from cli.times import parse_time, time_text

_BUCKET = re.compile(r"([0-9]*)(s|m|h|d|w|mo)")
_UNITS = {
    "s": query_pb2.BUCKET_UNIT_SECOND,
    "m": query_pb2.BUCKET_UNIT_MINUTE,
    "h": query_pb2.BUCKET_UNIT_HOUR,
    "d": query_pb2.BUCKET_UNIT_DAY,
    "w": query_pb2.BUCKET_UNIT_WEEK,
    "mo": query_pb2.BUCKET_UNIT_MONTH,
}
_FUNCTIONS = ("count", "min", "max", "sum", "mean", "first", "last", "stddev")


def add_questions(questions: Any) -> None:
    """Add both to the questions of `atlasco query`."""
    find = add_question(questions, "find", "devices that meet conditions, with chosen values", _find)
    find.add_argument(
        "filter", metavar="FILTER", help='such as: temperature > 80 and status = "active" and firmware starts with "2."'
    )
    find.add_argument("--attribute", action="append", default=[], metavar="NAME", help="show its value; repeatable")

    summary = add_question(questions, "aggregate", "readings summed up by time bucket and group", _aggregate)
    summary.add_argument("attributes", nargs="+", metavar="ATTRIBUTE")
    summary.add_argument("--device", action="append", default=[], metavar="NAME", help="only this one; repeatable")
    summary.add_argument("--type", default="", metavar="TYPE", help="only devices of this type")
    add_labels(summary)
    summary.add_argument("--filter", default="", metavar="FILTER", help="only devices that meet it; see `find`")
    summary.add_argument(
        "--function", action="append", choices=_FUNCTIONS, help="repeatable (default: count, min, max and mean)"
    )
    summary.add_argument("--percentile", action="append", type=float, default=[], metavar="P", help="repeatable")
    summary.add_argument(
        "--bucket", metavar="WIDTH", help="1s to 30s, 1m to 30m, 1h to 12h, 1d, 1w or 1mo (default: one for the range)"
    )
    summary.add_argument("--time-zone", metavar="NAME", help="whose clock buckets follow (default: UTC)")
    summary.add_argument("--by", action="append", choices=("device", "attribute"), default=[], help="repeatable")
    summary.add_argument("--start", required=True, metavar="TIME", help="from here on; as in `series`")
    summary.add_argument("--end", default="now", metavar="TIME", help="up to here, exclusive (default: now)")
    take_relative_times(summary)


def _find(gateway: Gateway, arguments: argparse.Namespace) -> Iterator[Row]:
    request = query_pb2.FindEntitiesRequest(
        filter=arguments.filter, attributes=dict.fromkeys(arguments.attribute), page_size=LIST_PAGE
    )
    for page in gateway.pages("FindEntities", request):
        for found in page.entities:
            values = {v.attribute: getattr(v.value, v.value.WhichOneof("kind")) for v in found.values}
            yield {
                "device": found.entity.name,
                "type": found.entity.entity_type,
                "labels": dict(sorted(found.entity.labels.items())),
                **{name: values.get(name, "") for name in dict.fromkeys(arguments.attribute)},
            }


def _aggregate(gateway: Gateway, arguments: argparse.Namespace) -> Iterator[Row]:
    now_us = time.time_ns() // 1000
    names = arguments.function or ([] if arguments.percentile else ["count", "min", "max", "mean"])
    functions = [f"AGGREGATE_FUNCTION_{name.upper()}" for name in dict.fromkeys(names)]
    if arguments.percentile:
        functions.append("AGGREGATE_FUNCTION_PERCENTILE")
    groups = {"device": query_pb2.AGGREGATE_GROUP_ENTITY, "attribute": query_pb2.AGGREGATE_GROUP_ATTRIBUTE}
    request = query_pb2.AggregateRequest(
        selection=query_pb2.Selection(
            entities=dict.fromkeys(arguments.device),
            entity_type=arguments.type,
            labels=dict(arguments.label),
            filter=arguments.filter,
        ),
        attributes=dict.fromkeys(arguments.attributes),
        start_time_us=parse_time(arguments.start, now_us, "--start"),
        end_time_us=parse_time(arguments.end, now_us, "--end"),
        bucket=_bucket(arguments.bucket, arguments.time_zone),
        functions=[query_pb2.AggregateFunction.Value(name) for name in functions],
        percentiles=arguments.percentile,
        group_by=[groups[name] for name in dict.fromkeys(arguments.by)],
    )
    for series in gateway.call("Aggregate", request).series:
        columns = {_title(column): _values(column) for column in series.columns}
        for place, bucket_us in enumerate(series.bucket_times_us):
            row: Row = {}
            if "device" in arguments.by:
                row["device"] = series.entity
            if "attribute" in arguments.by:
                row["attribute"] = series.attribute
            yield {**row, "bucket": time_text(bucket_us), **{name: values[place] for name, values in columns.items()}}


def _title(column: query_pb2.AggregateColumn) -> str:
    if column.function == query_pb2.AGGREGATE_FUNCTION_PERCENTILE:
        return f"p{column.percentile:g}"
    return query_pb2.AggregateFunction.Name(column.function).removeprefix("AGGREGATE_FUNCTION_").lower()


def _values(column: query_pb2.AggregateColumn) -> Any:
    return column.double_values or column.int64_values or column.bool_values or column.string_values


def _bucket(text: str | None, time_zone: str | None) -> query_pb2.Bucket | None:
    if text is None:
        if time_zone is not None:
            raise BadArgument("--time-zone says where buckets begin: give --bucket too")
        return None
    matched = _BUCKET.fullmatch(text)
    if matched is None:
        raise BadArgument(f"--bucket {text!r} is no width: use 10s, 15m, 1h, 1d, 1w or 1mo")
    width, unit = matched.groups()
    return query_pb2.Bucket(unit=_UNITS[unit], width=int(width or 1), time_zone=time_zone or "UTC")
