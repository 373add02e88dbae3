"""`atlasco warehouse`: set it up, look at it, ask it, tidy it."""

import argparse
import asyncio
import dataclasses
import json
import time
from datetime import datetime
from typing import Any

from cli.argument_types import seconds
from cli.migrate import reporting_errors, say
from cli.tenant import print_table
from runtime.config import add_settings, load_settings
from storage.times import moment
from storage.warehouse.config import WarehouseConfig, open_warehouse
from storage.warehouse.port import Completeness, Scope, Warehouse

DESCRIPTION = """\
The warehouse: where analytics run.

  atlasco warehouse init                            make what is missing; safe to repeat
  atlasco warehouse status                          how far it is loaded, what is wrong, how big it is
  atlasco warehouse query "SELECT …"                the relations entity_attributes_double, …_bigint, …_boolean, …_text,
                                                    entity_attributes, entities, attributes, tenants
  atlasco warehouse compact                         merge small files, fold corrections in, delete what nobody reads
  atlasco warehouse compact --keep 400d             and remove readings older than that
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "warehouse",
        help="set up, look at, ask and tidy the warehouse",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    init = actions.add_parser("init", help="make what is missing")
    init.set_defaults(run=reporting_errors(_init))
    status = actions.add_parser("status", help="how far it is loaded, what is wrong, how big it is")
    status.add_argument("--json", action="store_true", help="as one JSON object")
    status.set_defaults(run=reporting_errors(_status))
    query = actions.add_parser("query", help="run a SELECT")
    query.add_argument("statement", metavar="SQL", help="one SELECT; ts is UTC")
    query.add_argument("--tenant", type=int, metavar="ID", help="read only files that may hold this tenant")
    query.add_argument("--max-rows", type=int, default=10_000, metavar="N", help="refuse longer answers [10000]")
    query.add_argument("--json", action="store_true", help="one JSON object a row")
    query.set_defaults(run=reporting_errors(_query))
    compact = actions.add_parser("compact", help="merge, fold, delete")
    compact.add_argument("--keep", type=seconds, metavar="DURATION", help="remove readings older than this")
    compact.add_argument("--tenant", type=int, metavar="ID", help="with --keep: of this tenant only")
    compact.set_defaults(run=reporting_errors(_compact))
    for action in (init, status, query, compact):
        add_settings(action, WarehouseConfig)


async def _init(arguments: argparse.Namespace) -> int:
    with _Opened(arguments) as warehouse:
        await asyncio.to_thread(warehouse.init)
    print("the warehouse is ready")
    return 0


async def _status(arguments: argparse.Namespace) -> int:
    with _Opened(arguments) as warehouse:
        status = await asyncio.to_thread(warehouse.status)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(status), default=_plain))
        return 0
    done = status.completeness
    print_table(
        ("what", "value"),
        [
            ("warehouse", f"{status.adapter}, generation {status.generation}"),
            ("complete through", _time(done.as_of_us)),
            ("complete from", _time(done.complete_from_us) if done.complete_from_us else "the beginning"),
            ("dead letters", len(done.incomplete)),
        ],
    )
    print()
    print_table(
        ("partition", "next offset", "state"),
        [(state.partition, state.next_offset, state.halted or "loading") for state in status.states],
    )
    print()
    print_table(
        ("kind", "rows", "files", "bytes"), [(size.kind, size.rows, size.files, size.bytes) for size in status.sizes]
    )
    _warn(done)
    return 0


async def _query(arguments: argparse.Namespace) -> int:
    with _Opened(arguments) as warehouse:
        # A percent sign stands for itself here: there are no parameters.
        statement = arguments.statement.replace("%", "%%")
        scope = Scope(tenant_id=arguments.tenant)
        answer = await asyncio.to_thread(warehouse.query, statement, scope=scope, max_rows=arguments.max_rows)
    if arguments.json:
        for row in answer.rows:
            print(json.dumps(dict(zip(answer.columns, row, strict=True)), default=_plain))
    else:
        print_table(answer.columns, [tuple(row) for row in answer.rows])
    say(f"complete through {_time(answer.completeness.as_of_us)}")
    _warn(answer.completeness)
    return 0


async def _compact(arguments: argparse.Namespace) -> int:
    with _Opened(arguments) as warehouse:
        if arguments.keep is not None:
            before_us = int((time.time() - arguments.keep) * 1_000_000)
            expired = await asyncio.to_thread(warehouse.expire, before_us, arguments.tenant)
            print(f"{expired.rows_expired} readings expired")
        done = await asyncio.to_thread(warehouse.compact)
    print(
        f"{done.files_merged} files merged into {done.files_written}, {done.corrections_folded} corrections folded, "
        f"{done.files_deleted} files deleted"
    )
    return 0


class _Opened:
    """The configured warehouse, closed at the end."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._warehouse = open_warehouse(load_settings(WarehouseConfig, arguments))

    def __enter__(self) -> Warehouse:
        return self._warehouse

    def __exit__(self, *_: object) -> None:
        self._warehouse.close()


def _time(us: int | None) -> str:
    return "never" if us is None else moment(us).isoformat(timespec="milliseconds")


def _plain(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _warn(done: Completeness) -> None:
    for reason in done.halted:
        say(f"halted, needs `atlasco rebuild`: {reason}")
    if done.incomplete:
        say(f"incomplete: {len(done.incomplete)} records could not be decoded; see `atlasco load --redrive`")
