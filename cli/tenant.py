"""`atlasco tenant`: customers, their devices and attributes, and what was set aside for them."""

import argparse
import dataclasses
import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import TypeAlias

from cli.argument_types import label, seconds
from cli.migrate import OwnerConfig, reporting_errors, say
from cli.times import ABSOLUTE, moment
from runtime.config import add_settings, duration, load_settings
from storage.administration import Administration, TenantRow, TenantSettings
from storage.model import ValueType
from storage.quarantine import Selection, release_quarantined

EPILOG = """\
Gateways notice a change within seconds.

examples:
  atlasco tenant create acme --retention 365d
  atlasco tenant set acme --window-past 30d --outside-window quarantine
  atlasco tenant device add acme pump-17 --type pump --label site=berlin
  atlasco tenant attribute add acme temperature double --unit Cel
  atlasco tenant quarantine list acme
  atlasco tenant quarantine release acme --device pump-17
"""

RELEASE = """\
Write what was set aside into history, by the rules of any write: a reading must lie in the clock window as it is now
(widen it with `atlasco tenant set --window-past`), and replaces another value for the same device, attribute and
timestamp as a correction. Latest values do not move. What cannot be released stays in quarantine, and the exit code
is 1. Interrupted, a release is simply started again.
"""

Act: TypeAlias = Callable[[Administration, argparse.Namespace], Awaitable[None]]
_Parsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_parser(subparsers: _Parsers) -> None:
    """Add `tenant` and everything below it."""
    parser = subparsers.add_parser(
        "tenant",
        help="customers, their devices and attributes",
        description="Customers, their devices and attributes, and what was set aside for them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    create = _command(commands, "create", "make a tenant", _create)
    create.add_argument("tenant", metavar="NAME")
    create.add_argument(
        "--dedicated", action="store_true", help="a customer partition of its own, for good: for a large tenant"
    )
    _add_tenant_settings(create)
    change = _command(commands, "set", "change what binds a tenant", _set)
    change.add_argument("tenant", metavar="NAME")
    _add_tenant_settings(change)
    _command(commands, "list", "all tenants", _list)
    _command(commands, "show", "one tenant", _show).add_argument("tenant", metavar="NAME")

    devices = _group(commands, "device", "a tenant's devices")
    add = _command(devices, "add", "register devices by command", _add_devices)
    add.add_argument("tenant", metavar="NAME")
    add.add_argument("device", metavar="DEVICE", nargs="+")
    add.add_argument("--type", default="", help="the kind of device")
    add.add_argument("--label", action="append", default=[], type=label, metavar="KEY=VALUE")
    listing = _command(devices, "list", "devices by name", _list_devices)
    listing.add_argument("tenant", metavar="NAME")
    listing.add_argument("--type", help="only this kind of device")
    _add_paging(listing, str, "", "DEVICE")

    attributes = _group(commands, "attribute", "a tenant's attributes")
    add = _command(attributes, "add", "register an attribute by command", _add_attribute)
    add.add_argument("tenant", metavar="NAME")
    add.add_argument("attribute", metavar="ATTRIBUTE")
    add.add_argument("type", choices=[value_type.value for value_type in ValueType], help="fixed for good")
    add.add_argument("--unit", default="", help="a UCUM unit, such as Cel or kPa")
    add.add_argument("--latest", action=argparse.BooleanOptionalAction, default=True, help="keep the latest value")
    change = _command(attributes, "set", "change an attribute", _set_attribute)
    change.add_argument("tenant", metavar="NAME")
    change.add_argument("attribute", metavar="ATTRIBUTE")
    change.add_argument("--unit", help="a UCUM unit, such as Cel or kPa")
    change.add_argument(
        "--latest",
        action=argparse.BooleanOptionalAction,
        help="keep the latest value; switched on, it is there from a device's next reading on",
    )
    _command(attributes, "list", "attributes by name", _list_attributes).add_argument("tenant", metavar="NAME")
    _add_quarantine(commands)


def print_table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print aligned columns: numbers to the right, control characters escaped, never cut to the terminal's width."""
    cells = [tuple(_cell(value) for value in row) for row in rows]
    right = [bool(cells) for _ in titles]
    for row in cells:
        right = [r and number for r, (_, number) in zip(right, row, strict=True)]
    widths = [max(len(title), *(len(row[i][0]) for row in cells), 0) for i, title in enumerate(titles)]
    lines = [list(titles), ["-" * width for width in widths], *([text for text, _ in row] for row in cells)]
    for line in lines:
        padded = (
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(line, widths, right, strict=True)
        )
        print("  ".join(padded).rstrip())


def _cell(value: object) -> tuple[str, bool]:
    if isinstance(value, bool):
        return ("yes" if value else "no"), False
    if isinstance(value, int):
        return f"{value:,}", True
    if isinstance(value, datetime):
        return value.isoformat(sep=" ", timespec="milliseconds").replace("+00:00", "Z"), False
    text = "" if value is None else str(value)
    if not text.isprintable():
        # A device's name or value must not move the cursor of an operator's terminal.
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text, False


# -- the tree of parsers


def _group(parsers: _Parsers, name: str, text: str) -> _Parsers:
    parser = parsers.add_parser(name, help=text, description=text.capitalize() + ".")
    return parser.add_subparsers(title="commands", metavar="COMMAND", required=True)


def _command(parsers: _Parsers, name: str, text: str, act: Act) -> argparse.ArgumentParser:
    async def work(arguments: argparse.Namespace) -> int:
        async with Administration(load_settings(OwnerConfig, arguments).dsn) as administration:
            await act(administration, arguments)
        return 0

    parser = parsers.add_parser(name, help=text, description=text.capitalize() + ".")
    parser.add_argument("--json", action="store_true", help="JSON, one object a line")
    add_settings(parser, OwnerConfig)
    parser.set_defaults(run=reporting_errors(work))
    return parser


def _add_quarantine(commands: _Parsers) -> None:
    quarantine = _group(commands, "quarantine", "readings set aside because of their timestamp")
    listing = _command(quarantine, "list", "what was set aside", _list_quarantined)
    listing.add_argument("tenant", metavar="NAME")
    _add_paging(listing, int, 0, "ID")
    release = _command(quarantine, "release", "write what was set aside into history", _release_quarantined)
    release.description = RELEASE
    release.formatter_class = argparse.RawDescriptionHelpFormatter
    release.add_argument("tenant", metavar="NAME")
    release.add_argument("--before", type=moment, metavar="TIME", help=f"received before this time; {ABSOLUTE}")
    release.add_argument("--device", metavar="DEVICE", help="only of this device")
    release.add_argument("--attribute", metavar="ATTRIBUTE", help="only of this attribute")
    release.add_argument("--limit", type=_count, metavar="N", help="at most so many, those received first")
    discard = _command(quarantine, "discard", "delete what was set aside", _discard_quarantined)
    discard.add_argument("tenant", metavar="NAME")
    which = discard.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="everything received so far")
    which.add_argument("--id", type=int, nargs="+", metavar="ID", help="these")
    which.add_argument("--older-than", type=seconds, metavar="DURATION", help="received longer ago than this")


def _add_tenant_settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what binds the tenant")
    for flag, text in (
        ("--retention", "how long readings are kept"),
        ("--window-past", "how old a reading may be when it arrives; at most the retention"),
        ("--window-future", "how far ahead of the server's clock a reading may be; at most 7d"),
    ):
        group.add_argument(flag, type=seconds, metavar="DURATION", help=text)
    group.add_argument(
        "--outside-window", choices=["reject", "quarantine"], help="what becomes of a reading outside the window"
    )
    group.add_argument("--attribute-quota", type=int, metavar="N", help="most attributes")
    for flag, text in (("--register-entities", "devices"), ("--register-attributes", "attributes")):
        group.add_argument(
            flag, action=argparse.BooleanOptionalAction, help=f"unknown {text} are registered on first sight"
        )


def _add_paging(parser: argparse.ArgumentParser, kind: type, first: object, metavar: str) -> None:
    parser.add_argument("--after", type=kind, default=first, metavar=metavar, help="go on after this one")
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="at most so many (100)")


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


# -- what each command does


async def _create(administration: Administration, arguments: argparse.Namespace) -> None:
    made = await administration.create_tenant(
        arguments.tenant, _tenant_settings(arguments), dedicated=arguments.dedicated
    )
    _show_tenant(made, arguments)


async def _set(administration: Administration, arguments: argparse.Namespace) -> None:
    _show_tenant(await administration.set_tenant(arguments.tenant, _tenant_settings(arguments)), arguments)


async def _show(administration: Administration, arguments: argparse.Namespace) -> None:
    _show_tenant(await administration.tenant(arguments.tenant), arguments)


async def _list(administration: Administration, arguments: argparse.Namespace) -> None:
    rows = await administration.tenants()
    if arguments.json:
        _print_json(rows)
        return
    print_table(
        ("name", "id", "dedicated", "devices", "attributes", "retention", "window", "outside", "quarantined"),
        [
            (
                row.name,
                str(row.tenant_id),
                row.dedicated,
                row.devices,
                row.attributes,
                duration.write(row.retention_s),
                f"-{duration.write(row.window_past_s)} +{duration.write(row.window_future_s)}",
                row.outside_window,
                row.quarantined,
            )
            for row in rows
        ],
    )


async def _add_devices(administration: Administration, arguments: argparse.Namespace) -> None:
    for device in arguments.device:
        entity_id = await administration.add_device(
            arguments.tenant, device, entity_type=arguments.type, labels=dict(arguments.label)
        )
        _done(arguments, {"device": device, "entity_id": entity_id}, f"registered device {device!r} as {entity_id}")


async def _list_devices(administration: Administration, arguments: argparse.Namespace) -> None:
    rows = await administration.devices(
        arguments.tenant, entity_type=arguments.type, after=arguments.after, limit=arguments.limit
    )
    if arguments.json:
        _print_json(rows)
        return
    print_table(
        ("device", "id", "type", "labels", "since"),
        [
            (row.external_id, str(row.entity_id), row.entity_type, json.dumps(row.labels), row.created_at)
            for row in rows
        ],
    )


async def _add_attribute(administration: Administration, arguments: argparse.Namespace) -> None:
    attribute_id = await administration.add_attribute(
        arguments.tenant,
        arguments.attribute,
        ValueType(arguments.type),
        unit=arguments.unit,
        keeps_latest=arguments.latest,
    )
    _done(
        arguments,
        {"attribute": arguments.attribute, "attribute_id": attribute_id},
        f"registered attribute {arguments.attribute!r} as {attribute_id}",
    )


async def _set_attribute(administration: Administration, arguments: argparse.Namespace) -> None:
    removed = await administration.set_attribute(
        arguments.tenant, arguments.attribute, keeps_latest=arguments.latest, unit=arguments.unit
    )
    _done(
        arguments,
        {"attribute": arguments.attribute, "latest_values_removed": removed},
        f"changed attribute {arguments.attribute!r}; {removed:,} latest values removed",
    )


async def _list_attributes(administration: Administration, arguments: argparse.Namespace) -> None:
    rows = await administration.attributes(arguments.tenant)
    if arguments.json:
        _print_json(rows)
        return
    print_table(
        ("attribute", "id", "type", "unit", "latest", "since"),
        [(row.name, str(row.attribute_id), row.type, row.unit, row.keeps_latest, row.created_at) for row in rows],
    )


async def _list_quarantined(administration: Administration, arguments: argparse.Namespace) -> None:
    rows = await administration.quarantined(arguments.tenant, after=arguments.after, limit=arguments.limit)
    if arguments.json:
        _print_json(rows)
        return
    print_table(
        ("id", "device", "attribute", "timestamp", "value", "reason", "received"),
        [
            (str(row.quarantine_id), row.device, row.attribute, row.ts, str(row.value), row.reason, row.received_at)
            for row in rows
        ],
    )


async def _release_quarantined(_: Administration, arguments: argparse.Namespace) -> None:
    released = await release_quarantined(
        load_settings(OwnerConfig, arguments).dsn,
        arguments.tenant,
        Selection(
            received_before=arguments.before,
            device=arguments.device,
            attribute=arguments.attribute,
            limit=arguments.limit,
        ),
        progress=lambda so_far: say(f"{so_far.released:,} readings released"),
    )
    fields: dict[str, object] = {
        "released": released.released,
        "changed": released.changed,
        "corrections": released.corrections,
        "kept": {why.name.lower(): count for why, count in released.kept.items() if count},
    }
    text = f"released {released.released:,} readings; {released.changed:,} changed history, "
    _done(arguments, fields, text + f"{released.corrections:,} of them as corrections")
    released.check(arguments.tenant)


async def _discard_quarantined(administration: Administration, arguments: argparse.Namespace) -> None:
    before = None
    if arguments.older_than is not None:
        before = datetime.now(UTC) - timedelta(seconds=arguments.older_than)
    count = await administration.discard_quarantined(arguments.tenant, ids=arguments.id, received_before=before)
    _done(arguments, {"discarded": count}, f"discarded {count:,} readings")


# -- output


def _tenant_settings(arguments: argparse.Namespace) -> TenantSettings:
    return TenantSettings(
        retention_s=arguments.retention,
        window_past_s=arguments.window_past,
        window_future_s=arguments.window_future,
        outside_window=arguments.outside_window,
        attribute_quota=arguments.attribute_quota,
        register_entities=arguments.register_entities,
        register_attributes=arguments.register_attributes,
    )


def _show_tenant(row: TenantRow, arguments: argparse.Namespace) -> None:
    if arguments.json:
        _print_json([row])
        return
    fields = dataclasses.asdict(row)
    for key in ("retention_s", "window_past_s", "window_future_s"):
        fields[key.removesuffix("_s")] = duration.write(fields.pop(key))
    fields["tenant_id"] = str(row.tenant_id)
    print_table(("setting", "value"), [(key.replace("_", " "), _cell(value)[0]) for key, value in fields.items()])


def _print_json(rows: Iterable[object]) -> None:
    for row in rows:
        print(json.dumps(dataclasses.asdict(row), default=_plain))  # type: ignore[call-overload]


def _plain(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _done(arguments: argparse.Namespace, result: dict[str, object], text: str) -> None:
    print(json.dumps(result) if arguments.json else text)
