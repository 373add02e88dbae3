"""`atlasco projection`: which latest values stand side by side, for finding devices fast."""

import argparse
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

from cli.migrate import OwnerConfig, reporting_errors
from cli.tenant import print_table
from runtime.config import add_settings, load_settings
from storage.administration import NotFound
from storage.database import Pool, PoolSettings, Role, make_pool
from storage.errors import translated
from storage.rollup.declare import Status, create_projection, drop_projection, list_projections
from storage.statements import statements

EPILOG = """\
Queries use a projection by themselves once `atlasco rollup` has filled it.

examples:
  atlasco projection create acme alarms --attribute temperature --attribute status --type pump
  atlasco projection list acme
  atlasco projection drop acme alarms
"""

_CONNECT_S = 10.0


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `projection` and everything below it."""
    parser = subparsers.add_parser(
        "projection",
        help="declare wide projections of latest values",
        description="Which latest values stand side by side, one row per device, every column indexed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    create = commands.add_parser("create", help="declare a projection", description="Declare a projection.")
    create.add_argument("tenant", metavar="TENANT")
    create.add_argument("name", metavar="NAME")
    create.add_argument("--attribute", action="append", required=True, metavar="NAME", help="repeatable")
    create.add_argument("--type", default="", metavar="TYPE", help="devices of this type only")
    add_settings(create, OwnerConfig)
    create.set_defaults(run=reporting_errors(_create))
    add_listing(commands, "projections", reporting_errors(_list))
    drop = commands.add_parser("drop", help="take a projection out of use", description="Take a projection out of use.")
    drop.add_argument("tenant", metavar="TENANT")
    drop.add_argument("name", metavar="NAME")
    add_settings(drop, OwnerConfig)
    drop.set_defaults(run=reporting_errors(_drop))


def add_listing(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    what: str,
    run: Callable[[argparse.Namespace], int],
) -> None:
    """Add `list` of declarations."""
    listing = commands.add_parser("list", help=f"a tenant's {what}", description=f"A tenant's {what}.")
    listing.add_argument("tenant", metavar="TENANT")
    listing.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    add_settings(listing, OwnerConfig)
    listing.set_defaults(run=run)


@asynccontextmanager
async def connected(arguments: argparse.Namespace) -> AsyncIterator[tuple[Pool, int]]:
    """The owner's connections, and the id of the tenant named; 0 when the command names none.

    Raises:
        StorageUnavailable: the database cannot be reached.
        NotFound: there is no such tenant.
    """
    dsn = load_settings(OwnerConfig, arguments).dsn
    pool = make_pool(PoolSettings(dsn, Role.MAINTAIN, max_size=1, timeout_s=_CONNECT_S))
    with translated():
        await pool.open()
        try:
            await pool.wait(_CONNECT_S)
            yield pool, await _tenant(pool, getattr(arguments, "tenant", None))
        finally:
            await pool.close()


async def _tenant(pool: Pool, name: str | None) -> int:
    if name is None:
        return 0
    async with pool.connection() as connection:
        row = await (await connection.execute(statements("administration.sql")["tenant_id"], [name])).fetchone()
    if row is None:
        raise NotFound(f"there is no tenant {name!r}")
    return int(row[0])


def status_cells(status: Status) -> dict[str, Any]:
    """A status as columns."""
    return {
        "state": status.state,
        "filled": f"{status.backfilled:.0%}",
        "from": _text(status.complete_from),
        "as of": _text(status.as_of),
        "problem": status.problem,
    }


def print_entries(rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print declarations as a table, or one JSON object a line."""
    if as_json:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
    elif rows:
        print_table(
            list(rows[0]),
            [[", ".join(v) if isinstance(v, list) else v for v in row.values()] for row in rows],
        )


def _text(at: datetime | None) -> str:
    return "" if at is None else at.isoformat(timespec="milliseconds")


async def _create(arguments: argparse.Namespace) -> int:
    async with connected(arguments) as (pool, tenant):
        made = await create_projection(pool, tenant, arguments.name, arguments.attribute, arguments.type)
    print(f"projection {made.name}: {made.status.state}")
    return 0


async def _list(arguments: argparse.Namespace) -> int:
    async with connected(arguments) as (pool, tenant):
        found = await list_projections(pool, tenant)
    rows = [
        {"projection": p.name, "type": p.entity_type, "attributes": list(p.attributes), **status_cells(p.status)}
        for p in found
    ]
    print_entries(rows, as_json=arguments.json)
    return 0


async def _drop(arguments: argparse.Namespace) -> int:
    async with connected(arguments) as (pool, tenant):
        await drop_projection(pool, tenant, arguments.name)
    print(f"projection {arguments.name} is out of use; the worker removes its table")
    return 0
