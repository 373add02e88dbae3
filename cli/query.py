"""`atlasco query`: latest values, series, devices, attributes and freshness, as a table or as JSON lines."""

import argparse
import importlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any, cast

import grpc
from atlasco.telemetry.v1 import common_pb2, query_pb2, query_pb2_grpc
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gateway.auth import encode_name
from runtime.config import duration

TARGET_DEFAULT = "127.0.0.1:7070"

EXAMPLES = """\
examples:
  atlasco query devices --type pump --label site=berlin
  atlasco query latest pump-7 pump-8 --attribute temperature
  atlasco query series pump-7 --attribute temperature --start -1h --end now
  atlasco query series pump-7 --attribute temperature --start 2026-01-01 --end 2026-02-01T12:00:00Z --json
  atlasco query latest pump-7 --freshness dashboard --explain
  atlasco query export pump-7 --attribute temperature --start -90d --freshness analytics --json > readings.jsonl
  atlasco query freshness

Without --ca the connection is plaintext, for a gateway in development mode on this machine: name the tenant with
--tenant. With --ca, --cert and --key the certificate says who asks.
"""

# A terminal is no place for a million rows; JSON lines may be.
TABLE_ROWS = 1_000
PAGE = 10_000
LIST_PAGE = 1_000
BATCH_DEVICES = 1_000
MAX_MESSAGE_BYTES = 64 * 1024 * 1024

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_UNITS_US = {"s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000, "d": 86_400_000_000, "w": 604_800_000_000}
_RELATIVE = re.compile(r"(?:now)?([+-])([0-9]{1,9})([smhdw])")

_HINTS = {
    "ENTITY_NOT_FOUND": "`atlasco query devices` lists them",
    "ATTRIBUTE_NOT_FOUND": "`atlasco query attributes` lists them",
    "LATEST_NOT_KEPT": "`atlasco query series` reads its history",
    "QUERY_DEADLINE": "ask for a shorter range, or give it more time with --timeout",
    "QUERY_CONCURRENCY": "try again in a moment",
    "FALLBACK_CONCURRENCY": "try again in a moment, or with --freshness critical",
    "FRESHNESS_UNMET": "`atlasco query freshness` says how fresh each is; --allow-degraded takes an older answer",
    "RANGE_RETIRED": "these readings are past the tenant's retention",
    "IDENTITY_MISSING": "name the tenant with --tenant, or give --ca, --cert and --key",
}

_TYPES = {
    common_pb2.ATTRIBUTE_TYPE_DOUBLE: "double",
    common_pb2.ATTRIBUTE_TYPE_INT64: "int64",
    common_pb2.ATTRIBUTE_TYPE_BOOL: "bool",
    common_pb2.ATTRIBUTE_TYPE_STRING: "string",
}


TIERS = ("critical", "dashboard", "report", "analytics")


class BadArgument(Exception):
    """The command line or the environment is wrong; the text says which part."""


def add_parser(subparsers: Any) -> None:
    """Add `atlasco query` and its four questions."""
    parser = subparsers.add_parser(
        "query",
        help="read telemetry back",
        description="Reads telemetry from a gateway: pages through everything by itself.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    questions = parser.add_subparsers(title="questions", metavar="QUESTION", required=True)

    latest = _question(questions, "latest", "the newest values of devices", _latest)
    latest.add_argument("devices", nargs="+", metavar="DEVICE")
    latest.add_argument("--attribute", action="append", default=[], metavar="NAME", help="only this one; repeatable")

    for name, text, ask in (
        ("series", "readings of devices in a time range", _series),
        ("export", "the same readings as one stream, for millions of them", _export),
    ):
        _add_range(_question(questions, name, text, ask))

    devices = _question(questions, "devices", "the tenant's devices", _devices)
    devices.add_argument("--type", default="", metavar="TYPE", help="only devices of this type")
    devices.add_argument(
        "--label", action="append", default=[], metavar="KEY=VALUE", help="only devices with this label; repeatable"
    )

    _question(questions, "attributes", "the tenant's attributes", _attributes)
    # Not imported above: it builds on this module.
    importlib.import_module("cli.query_find").add_questions(questions, _question)
    _question(questions, "freshness", "how fresh each source is now, and what each tier would get", _freshness)


def _add_range(series: argparse.ArgumentParser) -> None:
    series.add_argument("devices", nargs="+", metavar="DEVICE")
    series.add_argument("--attribute", action="append", required=True, metavar="NAME", help="repeatable")
    when = "ISO 8601 (UTC unless it says otherwise), `now`, or relative to now: -90s, -15m, -1h, -7d, -2w"
    series.add_argument("--start", required=True, metavar="TIME", help=f"from here on; {when}")
    series.add_argument("--end", default="now", metavar="TIME", help="up to here, exclusive (default: now)")
    series.add_argument("--descending", action="store_true", help="newest first")
    # argparse takes "-1h" for a flag; it does not what looks like a negative number, so that is what it is told.
    series._negative_number_matcher = re.compile(r"^-[0-9]+[a-z]*$")
    series.add_argument(
        "--per-series", type=int, default=0, metavar="N", help="at most N readings of each series (default: all)"
    )


def _question(questions: Any, name: str, text: str, ask: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = questions.add_parser(name, help=text, description=f"Lists {text}.")
    parser.set_defaults(run=run, ask=ask)
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help=f"at most N rows, 0: all (default: {TABLE_ROWS} in a table, all as JSON)",
    )
    parser.add_argument("--timeout", type=float, default=30.0, metavar="SECONDS", help="per request (default: 30)")
    if ask is not _freshness:
        freshness = parser.add_argument_group("freshness")
        freshness.add_argument(
            "--freshness",
            default="critical",
            metavar="TIER|DURATION",
            help="critical, dashboard, report, analytics, or how stale answers may be: 250ms (default: critical)",
        )
        freshness.add_argument("--read-token", default="", metavar="HEX", help="see the write that returned this token")
        freshness.add_argument(
            "--allow-degraded", action="store_true", help="where nothing is fresh enough, take what there is"
        )
        freshness.add_argument("--explain", action="store_true", help="tell on stderr where answers came from, and why")
    gateway = parser.add_argument_group("gateway")
    gateway.add_argument(
        "--target",
        default=os.environ.get("ATLASCO_TARGET") or TARGET_DEFAULT,
        metavar="HOST:PORT",
        help=f"[ATLASCO_TARGET; default: {TARGET_DEFAULT}]",
    )
    gateway.add_argument(
        "--tenant",
        default=os.environ.get("ATLASCO_TENANT") or None,
        metavar="NAME",
        help="who asks, in development mode [ATLASCO_TENANT]",
    )
    for flag, what in (
        ("--ca", "certificates of the authority that signed the gateway's"),
        ("--cert", "certificate of a service identity"),
        ("--key", "its private key"),
    ):
        gateway.add_argument(flag, type=Path, metavar="FILE", help=f"PEM: {what}")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Ask and print; returns the exit code."""
    try:
        with _channel(arguments) as channel:
            return _print(arguments, Gateway(channel, arguments))
    except BadArgument as error:
        return _fail(str(error), 2)
    except grpc.RpcError as error:
        return _explain(error, arguments.target)
    except BrokenPipeError:
        # The reader, such as head, has seen enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


class Gateway:
    """The query service with this command's identity and timeout on every call."""

    def __init__(self, channel: grpc.Channel, arguments: argparse.Namespace) -> None:
        self._stub = query_pb2_grpc.QueryServiceStub(channel)
        self._metadata = [] if arguments.ca else _development_identity(arguments.tenant)
        self._timeout_s = arguments.timeout
        self._freshness = _freshness_of(arguments)
        self._known = ""

    def call(self, method: str, request: Any) -> Any:
        """The answer to one request. Raises grpc.RpcError."""
        if self._freshness is not None:
            request.freshness.CopyFrom(self._freshness)
        answer = getattr(self._stub, method)(request, timeout=self._timeout_s, metadata=self._metadata)
        if method not in ("GetFreshness", "ExportSeries"):
            self.tell(answer.provenance)
        return answer

    def tell(self, provenance: query_pb2.Provenance) -> None:
        """Say on stderr in which way an answer is worse than asked, and with --explain how it came about."""
        degraded = "; ".join(f"{_reason(d.reason)}: {d.text}" for d in provenance.degraded)
        if degraded and degraded != self._known:
            self._known = degraded
            print(f"degraded: {degraded}", file=sys.stderr)
        if self._freshness is not None and self._freshness.explain:
            for line in explanation(provenance):
                print(line, file=sys.stderr)

    def pages(self, method: str, request: Any) -> Iterator[Any]:
        """The answer's pages, one after the other."""
        while True:
            page = self.call(method, request)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token


Row = dict[str, Any]


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
        page_size=min(PAGE, _limit(arguments) + 1) if _limit(arguments) else PAGE,
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
    labels = {}
    for label in arguments.label:
        key, separator, value = label.partition("=")
        if not key or not separator:
            raise BadArgument(f"--label {label!r} must be KEY=VALUE")
        labels[key] = value
    request = query_pb2.ListEntitiesRequest(entity_type=arguments.type, labels=labels, page_size=LIST_PAGE)
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
            "served_by": f"scan: {_source(tier.scan_source)}, latest: {_source(tier.lookup_source)}",
            "reason": tier.reason,
        }


def explanation(provenance: query_pb2.Provenance) -> Iterator[str]:
    """How an answer came about, line by line."""
    yield (
        f"answered by {_source(provenance.source)}, complete to {time_text(provenance.as_of_us)}, "
        f"at most {provenance.staleness_us / 1000:.1f} ms old"
    )
    for candidate in provenance.plan.candidates:
        yield f"  {'*' if candidate.chosen else ' '} {candidate.name}: {candidate.reason}"
    for step in provenance.plan.steps:
        outcome = f"failed: {step.failure}" if step.failure else "answered"
        yield f"  {step.name} {outcome} in {step.duration_us / 1000:.1f} ms"


def _source(source: "query_pb2.Provenance.Source.ValueType") -> str:
    if not source:
        return "none"
    return query_pb2.Provenance.Source.Name(source).removeprefix("SOURCE_").lower()


def _reason(reason: "query_pb2.Degradation.Reason.ValueType") -> str:
    return query_pb2.Degradation.Reason.Name(reason).removeprefix("REASON_")


def _freshness_of(arguments: argparse.Namespace) -> query_pb2.Freshness | None:
    """What the arguments ask for; None for a question without freshness."""
    if not hasattr(arguments, "freshness"):
        return None
    freshness = query_pb2.Freshness(explain=arguments.explain, allow_degraded=arguments.allow_degraded)
    if arguments.freshness.lower() in TIERS:
        freshness.tier = query_pb2.Tier.Value(f"TIER_{arguments.freshness.upper()}")
    else:
        try:
            freshness.max_staleness_us = round(duration(arguments.freshness) * 1e6)
        except ValueError:
            raise BadArgument(
                f"--freshness {arguments.freshness!r} is neither one of {', '.join(TIERS)} nor a duration such as 250ms"
            ) from None
    try:
        freshness.read_token = bytes.fromhex(arguments.read_token)
    except ValueError:
        raise BadArgument(f"--read-token {arguments.read_token!r} is not hexadecimal") from None
    return freshness


class Truncated(Exception):
    """An export ended without its summary."""


class NotFound(Exception):
    """Some devices do not exist; the others were shown."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(", ".join(names))


def _print(arguments: argparse.Namespace, gateway: Gateway) -> int:
    rows: Iterator[Row] = arguments.ask(gateway, arguments)
    limit = _limit(arguments)
    shown: Iterable[Row] = islice(rows, limit) if limit else rows
    try:
        if arguments.json:
            for row in shown:
                sys.stdout.write(json.dumps({key: _json_value(v) for key, v in row.items()}, ensure_ascii=False) + "\n")
            sys.stdout.flush()
        else:
            _print_table(shown)
            if limit and next(rows, None) is not None:
                print(f"the first {limit} rows; --limit N shows more, --limit 0 all of them", file=sys.stderr)
        return 0
    except Truncated:
        return _fail("the export ended early: what was shown is not the whole", 1)
    except NotFound as error:
        return _fail(f"ENTITY_NOT_FOUND: no such device: {error} ({_HINTS['ENTITY_NOT_FOUND']})", 1)


def _print_table(rows: Iterable[Row]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    count = 0
    try:
        for count, row in enumerate(rows, 1):
            if count == 1:
                for name in row:
                    table.add_column(name, no_wrap=name != "labels", justify="right" if name == "age_s" else "left")
            # Text, because values are data: markup in them must not style the terminal.
            table.add_row(*(Text(cell_text(value)) for value in row.values()))
    finally:
        # Also when an error ends the rows: what came before it is an answer.
        if count:
            # No terminal, no width to fit into: cut values would be of no use to a script.
            Console(width=None if sys.stdout.isatty() else 10_000, highlight=False).print(table)
    if not count:
        print("nothing found", file=sys.stderr)


def _limit(arguments: argparse.Namespace) -> int:
    """The most rows to show; 0: all."""
    if arguments.limit is None:
        return 0 if arguments.json else TABLE_ROWS
    if arguments.limit < 0:
        raise BadArgument(f"--limit {arguments.limit} must be 0 or more")
    return int(arguments.limit)


def parse_time(text: str, now_us: int, flag: str) -> int:
    """A time in microseconds since 1970: ISO 8601, `now`, or relative to now.

    Raises:
        BadArgument: it is none of these.
    """
    if text == "now":
        return now_us
    relative = _RELATIVE.fullmatch(text)
    if relative is not None:
        sign, count, unit = relative.groups()
        return now_us + (1 if sign == "+" else -1) * int(count) * _UNITS_US[unit]
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        raise BadArgument(
            f"{flag} {text!r} is no time: use ISO 8601 (2026-01-31T12:00:00Z), now, or -90s, -15m, -1h, -7d, -2w"
        ) from None
    return ((parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)) - _EPOCH) // timedelta(microseconds=1)


def time_text(time_us: int) -> str:
    """A time as ISO 8601 in UTC with microseconds; beyond the calendar, the number itself."""
    try:
        return (_EPOCH + timedelta(microseconds=time_us)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    except OverflowError:
        return str(time_us)


def cell_text(value: Any) -> str:
    """A value in a table."""
    match value:
        case bool():
            return "true" if value else "false"
        case float():
            return repr(value)
        case Mapping():
            return " ".join(f"{key}={v}" for key, v in value.items())
        case _:
            # Control characters would move the cursor.
            return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        # JSON has no such numbers; protobuf's JSON writes them so.
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _channel(arguments: argparse.Namespace) -> grpc.Channel:
    options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
    files = {"--ca": arguments.ca, "--cert": arguments.cert, "--key": arguments.key}
    missing = [flag for flag, path in files.items() if path is None]
    if len(missing) == len(files):
        return grpc.insecure_channel(arguments.target, options)
    if missing:
        raise BadArgument(f"--ca, --cert and --key go together; {' and '.join(missing)} is missing")
    contents = []
    for flag, path in files.items():
        try:
            contents.append(path.read_bytes())
        except OSError as error:
            raise BadArgument(f"{flag} {path}: {error.strerror}") from None
    ca, cert, key = contents
    return grpc.secure_channel(
        arguments.target,
        grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert),
        options,
    )


def _development_identity(tenant: str | None) -> list[tuple[str, str]]:
    if tenant is None:
        raise BadArgument("name the tenant with --tenant or ATLASCO_TENANT, or give --ca, --cert and --key")
    return [("atlasco-tenant", encode_name(tenant)), ("atlasco-service", "atlasco-cli")]


def _explain(error: grpc.RpcError, target: str) -> int:
    """Say in one line what an error means; returns the exit code."""
    # What a blocking call raises is a grpc.Call too; the types do not say so.
    status = rpc_status.from_call(cast(grpc.Call, error))
    code, text = error.code().name, error.details() or ""
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            hint = f" ({_HINTS[info.reason]})" if info.reason in _HINTS else ""
            return _fail(f"{info.reason}: {text}{hint}", 3 if info.reason == "STORAGE_UNAVAILABLE" else 1)
    if code == "UNAVAILABLE":
        return _fail(
            f"no gateway answers at {target}: {text} (`make demo` or `atlasco serve` starts one; --target names it)", 3
        )
    return _fail(f"{code}: {text}", 1)


def _fail(text: str, code: int) -> int:
    # One line, whatever the other side wrote.
    print("atlasco query: " + " ".join(text.split()), file=sys.stderr)
    return code
