"""`atlasco query latest`, `series`, `export`, `devices`, `attributes` and `freshness`."""

import argparse
import time
from collections.abc import Iterable, Iterator
from typing import Any

from atlasco.telemetry.v1 import common_pb2, query_pb2

from cli.query_arguments import add_labels, add_question, limit_of, take_relative_times
from cli.query_gateway import LIST_PAGE, Gateway, source_name
from cli.query_print import Row
from cli.times import ABSOLUTE, parse_time, time_text

PAGE = 10_000
BATCH_DEVICES = 1_000

_TYPES = {
    common_pb2.ATTRIBUTE_TYPE_DOUBLE: "double",
    common_pb2.ATTRIBUTE_TYPE_INT64: "int64",
    common_pb2.ATTRIBUTE_TYPE_BOOL: "bool",
    common_pb2.ATTRIBUTE_TYPE_STRING: "string",
}


class Truncated(Exception):
    """An export ended without its summary."""


class NotFound(Exception):
    """Some devices do not exist; the others were shown."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(", ".join(names))


def add_questions(questions: Any) -> None:
    """Add what is asked about readings, devices and attributes."""
    latest = add_question(questions, "latest", "the newest values of devices", _latest)
    latest.add_argument("devices", nargs="+", metavar="DEVICE")
    latest.add_argument("--attribute", action="append", default=[], metavar="NAME", help="only this one; repeatable")

    _add_range(add_question(questions, "series", "readings of devices in a time range", _series))
    text = "the same readings as one stream, for millions of them"
    _add_range(add_question(questions, "export", text, _export, timeout_s=None))

    devices = add_question(questions, "devices", "the tenant's devices", _devices)
    devices.add_argument("--type", default="", metavar="TYPE", help="only devices of this type")
    add_labels(devices)

    add_question(questions, "attributes", "the tenant's attributes", _attributes)


def add_freshness(questions: Any) -> None:
    """Add what is asked about the sources themselves."""
    text = "how fresh each source is now, and what each tier would get"
    add_question(questions, "freshness", text, _freshness, is_fresh=False)


def _add_range(series: argparse.ArgumentParser) -> None:
    series.add_argument("devices", nargs="+", metavar="DEVICE")
    series.add_argument("--attribute", action="append", required=True, metavar="NAME", help="repeatable")
    when = f"{ABSOLUTE}; `now`; or relative to now: -90s, -15m, -1h, -7d, -2w"
    series.add_argument("--start", required=True, metavar="TIME", help=f"from here on; {when}")
    series.add_argument("--end", default="now", metavar="TIME", help="up to here, exclusive (default: now)")
    series.add_argument("--descending", action="store_true", help="newest first")
    take_relative_times(series)
    series.add_argument(
        "--per-series", type=int, default=0, metavar="N", help="at most N readings of each series (default: all)"
    )


def _latest(gateway: Gateway, arguments: argparse.Namespace) -> Iterator[Row]:
    # Each once: the service refuses a name that comes twice, a shell's glob gives it easily.
    devices = list(dict.fromkeys(arguments.devices))
    missing: list[str] = []
    for at in range(0, len(devices), BATCH_DEVICES):
        answer = gateway.call(
            "BatchGetLatest",
            query_pb2.BatchGetLatestRequest(
                entities=devices[at : at + BATCH_DEVICES], attributes=dict.fromkeys(arguments.attribute)
            ),
        )
        missing += answer.not_found
        for entity in answer.latest:
            for latest in entity.values:
                yield {
                    "device": entity.entity,
                    "attribute": latest.attribute,
                    "time": time_text(latest.time_us),
                    "age_s": latest.age_us / 1e6,
                    "value": getattr(latest.value, latest.value.WhichOneof("kind")),
                }
    if missing:
        raise NotFound(missing)


def _range_of(arguments: argparse.Namespace) -> dict[str, Any]:
    now_us = time.time_ns() // 1000
    return {
        "entities": dict.fromkeys(arguments.devices),
        "attributes": dict.fromkeys(arguments.attribute),
        "start_time_us": parse_time(arguments.start, now_us, "--start"),
        "end_time_us": parse_time(arguments.end, now_us, "--end"),
        "descending": arguments.descending,
        "limit_per_series": arguments.per_series,
    }


def _series(gateway: Gateway, arguments: argparse.Namespace) -> Iterator[Row]:
    request = query_pb2.ReadSeriesRequest(
        **_range_of(arguments),
        # One more than shown tells whether there are more.
        page_size=min(PAGE, limit_of(arguments) + 1) if limit_of(arguments) else PAGE,
    )
    for page in gateway.pages("ReadSeries", request):
        yield from _readings(page.series)


def _export(gateway: Gateway, arguments: argparse.Namespace) -> Iterator[Row]:
    summary = None
    for message in gateway.call("ExportSeries", query_pb2.ExportSeriesRequest(**_range_of(arguments))):
        yield from _readings(message.series)
        if message.HasField("summary"):
            summary = message.summary
    if summary is None:
        raise Truncated
    gateway.tell(summary.provenance)


def _readings(found: Iterable[query_pb2.Series]) -> Iterator[Row]:
    for series in found:
        values = series.double_values or series.int64_values or series.bool_values or series.string_values
        revisions = series.revisions or [0] * len(series.times_us)
        for time_us, value, revision in zip(series.times_us, values, revisions, strict=True):
            yield {
                "device": series.entity,
                "attribute": series.attribute,
                "time": time_text(time_us),
                "value": value,
                "revision": revision,
            }


def _devices(gateway: Gateway, arguments: argparse.Namespace) -> Iterator[Row]:
    request = query_pb2.ListEntitiesRequest(
        entity_type=arguments.type, labels=dict(arguments.label), page_size=LIST_PAGE
    )
    for page in gateway.pages("ListEntities", request):
        for entity in page.entities:
            yield {
                "device": entity.name,
                "type": entity.entity_type,
                "labels": dict(sorted(entity.labels.items())),
                "registered": time_text(entity.create_time_us),
            }


def _attributes(gateway: Gateway, _: argparse.Namespace) -> Iterator[Row]:
    for page in gateway.pages("ListAttributes", query_pb2.ListAttributesRequest(page_size=LIST_PAGE)):
        for attribute in page.attributes:
            yield {
                "attribute": attribute.name,
                "type": _TYPES.get(attribute.type, "unknown"),
                "unit": attribute.unit,
                "latest": attribute.keeps_latest,
                "registered": time_text(attribute.create_time_us),
            }


def _freshness(gateway: Gateway, _: argparse.Namespace) -> Iterator[Row]:
    answer = gateway.call("GetFreshness", query_pb2.GetFreshnessRequest())
    for source in answer.sources:
        yield {
            "kind": "source",
            "name": source.name,
            "available": source.available,
            "complete_to": time_text(source.as_of_us) if source.as_of_us else "",
            "staleness_s": source.staleness_us / 1e6,
            "served_by": "",
            "reason": source.reason,
        }
    for tier in answer.tiers:
        yield {
            "kind": "tier",
            "name": query_pb2.Tier.Name(tier.tier).removeprefix("TIER_").lower(),
            "available": bool(tier.scan_source and tier.lookup_source),
            "complete_to": "",
            "staleness_s": tier.max_staleness_us / 1e6,
            "served_by": f"scan: {source_name(tier.scan_source)}, latest: {source_name(tier.lookup_source)}",
            "reason": tier.reason,
        }
