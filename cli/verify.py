"""`atlasco verify`: do PostgreSQL, the log and the warehouse hold the same readings, each once?"""

import argparse
import asyncio
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from cli.migrate import reporting_errors
from cli.times import ABSOLUTE, moment
from runtime.config import add_settings, load_settings
from storage import times
from storage.kafka import KafkaConfig
from storage.verify.deletions import (
    Hidden,
    Leftover,
    deleted_devices,
    hidden_devices,
    leftovers_in_primary,
    leftovers_in_store,
)
from storage.verify.log import LogStore
from storage.verify.readings import HourAudit, Primary, Store, VerifyResult, WarehouseStore, by_tenant, verify
from storage.warehouse.config import WarehouseConfig, open_warehouse

DESCRIPTION = """\
Compare the warehouse, and with --log the log of changes, with PostgreSQL: per tenant and hour of reading time, by count
and by checksum. Where an hour differs, the first reading that does is named. Waits until the other store has everything
that PostgreSQL has now, so the relay and the loader have to run. Times before a store's retention are left out.

Of devices whose deletion ended in the last 30 days nothing may be left, in PostgreSQL or in the other store; and the
warehouse may name no device that PostgreSQL does not have. What is found is named, with the device and the store.
Nor may the warehouse hold a device as deleted that PostgreSQL has, as it does after a restore of PostgreSQL to a moment
before the deletion: it shows nothing of it until it is rebuilt.

Exit code 0 when all hours are equal, nothing is left and nothing hidden, 1 when not, or when a store did not become
complete in time.

  atlasco verify                                   everything
  atlasco verify --tenant acme --from 2026-11-01   one tenant, from a day on
  atlasco verify --log                             the log too, as far as it still has its beginning
"""

_SHOWN = 20
"""How many findings of a kind are shown to a person."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "verify",
        help="compare PostgreSQL, the log and the warehouse",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tenant", metavar="NAME", help="one tenant instead of all")
    parser.add_argument("--from", dest="start", type=moment, metavar="TIME", help=f"from here on; {ABSOLUTE}")
    parser.add_argument("--to", dest="end", type=moment, metavar="TIME", help=f"up to here, exclusive; {ABSOLUTE}")
    parser.add_argument("--log", action="store_true", help="compare the log too, which is read from its beginning")
    parser.add_argument("--no-warehouse", action="store_true", help="with --log: leave the warehouse out")
    parser.add_argument(
        "--patience", type=float, default=120.0, metavar="SECONDS", help="how long a store may lag [120]"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per hour, and one at the end")
    add_settings(parser, WarehouseConfig)
    add_settings(parser, KafkaConfig)
    parser.set_defaults(run=reporting_errors(_verify))


async def _verify(arguments: argparse.Namespace) -> int:
    config = load_settings(WarehouseConfig, arguments)
    kafka = load_settings(KafkaConfig, arguments) if arguments.log else None
    primary = Primary(config.dsn)
    failed = await asyncio.to_thread(_audit_primary, arguments, primary)
    if not arguments.no_warehouse:
        warehouse = await asyncio.to_thread(open_warehouse, config)
        try:
            failed |= await asyncio.to_thread(_compare, arguments, primary, WarehouseStore(warehouse))
        finally:
            warehouse.close()
    if kafka is not None:
        log = LogStore(kafka)
        try:
            failed |= await asyncio.to_thread(_compare, arguments, primary, log)
        finally:
            log.close()
        if log.undecodable:
            print(f"{log.undecodable} records of the log could not be decoded", file=sys.stderr)
    return int(failed)


def _audit_primary(arguments: argparse.Namespace, primary: Primary) -> bool:
    left = leftovers_in_primary(primary, arguments.tenant)
    _show(arguments, "leftover", left)
    return bool(left)


def _show(arguments: argparse.Namespace, kind: str, found: Sequence[Leftover | Hidden]) -> None:
    if arguments.json:
        for one in found:
            print(json.dumps({kind: str(one), **dataclasses.asdict(one)}))
        return
    for one in found[:_SHOWN]:
        print(one)
    if len(found) > _SHOWN:
        print(f"and {len(found) - _SHOWN:,} more {kind}s; --json shows all")


def _compare(arguments: argparse.Namespace, primary: Primary, store: Store) -> bool:
    audits: list[HourAudit] = []

    def report(audit: HourAudit) -> None:
        audits.append(audit)
        if arguments.json:
            print(json.dumps(_hour(store.name, audit)))
        elif not audit.equal:
            print(f"{audit.tenant} {_shown(audit.hour_us)}: differs from the {store.name}", file=sys.stderr)
        elif len(audits) % 1000 == 0:
            print(f"{len(audits):,} hours compared with the {store.name}", file=sys.stderr)

    # Read first: the comparison waits until the store is past them.
    deleted = deleted_devices(primary, arguments.tenant)
    result = verify(
        primary,
        store,
        tenant=arguments.tenant,
        from_us=None if arguments.start is None else times.microseconds(arguments.start),
        to_us=None if arguments.end is None else times.microseconds(arguments.end),
        patience_s=arguments.patience,
        report=report,
    )
    left = leftovers_in_store(primary, store, deleted, patience_s=arguments.patience)
    # The log hides nothing.
    hidden = hidden_devices(primary, store, deleted) if isinstance(store, WarehouseStore) else []
    _show(arguments, "hidden device", hidden)
    _show(arguments, "leftover", left)
    if arguments.json:
        print(json.dumps(_total(store.name, result) | {"hidden": len(hidden), "leftovers": len(left)}))
    else:
        for tenant, (ours, theirs) in by_tenant(audits).items():
            word = "equal" if ours == theirs else "DIFFERENT"
            print(
                f"{tenant}: {ours.readings:,} readings in PostgreSQL, {theirs.readings:,} in the {store.name}; "
                f"checksums {ours.checksum:016x} and {theirs.checksum:016x}: {word}"
            )
        for difference in result.differences[:_SHOWN]:
            print(difference)
        print(f"{result.hours:,} hours, {result.readings:,} readings, {len(result.differences)} hours differ")
        if isinstance(store, WarehouseStore):
            print(f"{len(hidden):,} devices that are there and that the {store.name} hides")
        print(f"{len(left):,} leftovers of deleted devices in the {store.name}")
    return bool(result.differences or hidden or left)


def _hour(store: str, audit: HourAudit) -> dict[str, Any]:
    return {
        "store": store,
        "tenant": audit.tenant,
        "hour": _shown(audit.hour_us),
        "postgres": audit.primary.readings,
        store: audit.other.readings,
        "equal": audit.equal,
    }


def _total(store: str, result: VerifyResult) -> dict[str, Any]:
    return {
        "store": store,
        "hours": result.hours,
        "readings": result.readings,
        "different": len(result.differences),
        "first_difference": str(result.differences[0]) if result.differences else None,
    }


def _shown(time_us: int) -> str:
    return times.moment(time_us).isoformat()
