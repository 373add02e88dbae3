"""`atlasco verify`: do PostgreSQL, the log and the warehouse hold the same readings, each once?"""

import argparse
import asyncio
import json
import sys
from datetime import UTC, datetime
from typing import Any

from cli.migrate import reporting_errors
from runtime.config import add_settings, load_settings
from storage.kafka import KafkaConfig
from storage.verify import HourAudit, Primary, Store, VerifyResult, WarehouseStore, by_tenant, verify
from storage.verify_log import LogStore
from storage.warehouse.config import WarehouseConfig, open_warehouse

DESCRIPTION = """\
Compare the warehouse, and with --log the log of changes, with PostgreSQL: per tenant and hour of reading time, by count
and by checksum. Where an hour differs, the first reading that does is named. Waits until the other store has everything
that PostgreSQL has now, so the relay and the loader have to run.

Exit code 0 when all hours are equal, 1 when one differs or a store did not become complete in time.

  atlasco verify                                   everything
  atlasco verify --tenant acme --from 2026-11-01   one tenant, from a day on
  atlasco verify --log                             the log too, as far as it still has its beginning
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "verify",
        help="compare PostgreSQL, the log and the warehouse",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tenant", metavar="NAME", help="one tenant instead of all")
    parser.add_argument(
        "--from", dest="start", type=_time, metavar="TIME", help="ISO 8601, UTC unless it says otherwise"
    )
    parser.add_argument("--to", dest="end", type=_time, metavar="TIME", help="end of the range, exclusive")
    parser.add_argument("--log", action="store_true", help="compare the log too, which is read from its beginning")
    parser.add_argument("--no-warehouse", action="store_true", help="with --log: leave the warehouse out")
    parser.add_argument(
        "--patience", type=float, default=120.0, metavar="SECONDS", help="how long a store may lag [120]"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per hour, and one at the end")
    add_settings(parser, WarehouseConfig)
    add_settings(parser, KafkaConfig)
    parser.set_defaults(run=reporting_errors(_verify))


def _time(text: str) -> int:
    moment = datetime.fromisoformat(text)
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    return int(moment.timestamp() * 1_000_000)


async def _verify(arguments: argparse.Namespace) -> int:
    config = load_settings(WarehouseConfig, arguments)
    kafka = load_settings(KafkaConfig, arguments) if arguments.log else None
    failed = False
    if not arguments.no_warehouse:
        warehouse = await asyncio.to_thread(open_warehouse, config)
        try:
            failed |= await asyncio.to_thread(_compare, arguments, Primary(config.dsn), WarehouseStore(warehouse))
        finally:
            warehouse.close()
    if kafka is not None:
        log = LogStore(kafka)
        try:
            failed |= await asyncio.to_thread(_compare, arguments, Primary(config.dsn), log)
        finally:
            log.close()
        if log.undecodable:
            print(f"{log.undecodable} records of the log could not be decoded", file=sys.stderr)
    return int(failed)


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

    result = verify(
        primary,
        store,
        tenant=arguments.tenant,
        from_us=arguments.start,
        to_us=arguments.end,
        patience_s=arguments.patience,
        report=report,
    )
    if arguments.json:
        print(json.dumps(_total(store.name, result)))
    else:
        for tenant, (ours, theirs) in by_tenant(audits).items():
            word = "equal" if ours == theirs else "DIFFERENT"
            print(
                f"{tenant}: {ours.readings:,} readings in PostgreSQL, {theirs.readings:,} in the {store.name}; "
                f"checksums {ours.checksum:016x} and {theirs.checksum:016x}: {word}"
            )
        for difference in result.differences[:20]:
            print(difference)
        print(f"{result.hours:,} hours, {result.readings:,} readings, {len(result.differences)} hours differ")
    return bool(result.differences)


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
    return datetime.fromtimestamp(time_us / 1e6, UTC).isoformat()
