"""`atlasco device`: delete a device and everything of it, and see how deletions stand."""

import argparse
import asyncio
import json
import sys
from typing import Final
from uuid import UUID, uuid4

from cli.argument_types import seconds
from cli.migrate import OwnerConfig, reporting_errors, say
from cli.projection import connected
from cli.tenant import print_table
from runtime.config import ConfigError, add_settings
from storage.database import Pool
from storage.deletion import Operation, find_operation, list_operations, order_deletion
from storage.errors import StorageError

DELETE_DESCRIPTION = """\
Delete a device: its name, its readings and latest values, its streams, its part in rollups and projections, and by the
log of changes what the warehouse has of it. It cannot be undone. From the moment it is ordered nobody finds the device
by its name or writes to it; once it has ended, the name can be registered again, as another device.

The order is carried out by `atlasco rollup`, and goes on whatever happens to this command. It ends when the warehouse,
if there is one, has loaded it: with the loader's waits, after a few minutes.
"""

DELETE_EPILOG = """\
On a terminal the device's name has to be typed to confirm; elsewhere --yes says that it is meant.

examples:
  atlasco device delete acme pump-7                          asks, orders, prints the operation's id
  atlasco device delete acme pump-7 --yes --wait             and follows it to its end
  id=$(uuidgen)                                              for scripts that may have to run again:
  atlasco device delete acme pump-7 --yes --operation $id    the same order again changes nothing

exit codes: 0 ordered (with --wait: ended), 1 no such device, another device's operation, or not ended within --timeout,
2 not confirmed by --yes where nobody can be asked, 3 the database could not be reached, 130 interrupted: it goes on.
"""

LIST_EPILOG = """\
Steps, in this order: database, settle (waits for write requests that were under way), materializations (rollups and
projections), warehouse (waits for the loader), done. A problem is what failed last; the step is tried again.
Operations are kept for 30 days after their end.

examples:
  atlasco device deletions acme
  atlasco device deletions acme --json | jq 'select(.problem != "")'
"""

_POLL_S: Final = 0.5
_NOBODY_S: Final = 10.0
_PAGE: Final = 1_000


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `device` and everything below it."""
    parser = subparsers.add_parser(
        "device",
        help="delete devices",
        description="Delete devices, and see how deletions stand. To register and list them: atlasco tenant device.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    delete = commands.add_parser(
        "delete",
        help="delete a device and everything of it",
        description=DELETE_DESCRIPTION,
        epilog=DELETE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    delete.add_argument("tenant", metavar="TENANT")
    delete.add_argument("device", metavar="DEVICE", help="the device's name")
    delete.add_argument("--yes", action="store_true", help="do not ask")
    delete.add_argument("--wait", action="store_true", help="follow it until it has ended")
    delete.add_argument("--timeout", type=seconds, metavar="DURATION", help="with --wait: how long at most")
    delete.add_argument("--operation", type=_uuid, metavar="ID", help="a UUID for the operation (default: a new one)")
    add_settings(delete, OwnerConfig)
    delete.set_defaults(run=reporting_errors(_delete))
    listing = commands.add_parser(
        "deletions",
        help="a tenant's deletions, the newest first",
        description="A tenant's deletions, the newest first.",
        epilog=LIST_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    listing.add_argument("tenant", metavar="TENANT")
    listing.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    add_settings(listing, OwnerConfig)
    listing.set_defaults(run=reporting_errors(_list))


def _uuid(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no UUID") from error


async def _delete(arguments: argparse.Namespace) -> int:
    if arguments.timeout is not None and not arguments.wait:
        raise ConfigError(["--timeout goes with --wait"])
    if not arguments.yes and not _confirmed(arguments.tenant, arguments.device):
        say("nothing was deleted: that is not the device's name")
        return 1
    async with connected(arguments) as (pool, tenant):
        ordered = await order_deletion(pool, tenant, arguments.device, arguments.operation or uuid4())
        print(ordered.operation_id, flush=True)
        if not arguments.wait:
            return 0
        try:
            async with asyncio.timeout(arguments.timeout):
                await _ended(pool, tenant, ordered)
        except TimeoutError:
            raise StorageError(f"the deletion has not ended yet, and goes on: {ordered.operation_id}") from None
    return 0


def _confirmed(tenant: str, device: str) -> bool:
    """Ask whether it is meant.

    Raises:
        ConfigError: there is nobody to ask.
    """
    if not sys.stdin.isatty():
        raise ConfigError(["deleting a device cannot be undone: say --yes, or run it on a terminal and confirm there"])
    say(f"This deletes the device {device!r} of {tenant!r} and all its readings, everywhere. It cannot be undone.")
    print("Type the device's name to go on: ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().rstrip("\r\n") == device


async def _ended(pool: Pool, tenant: int, operation: Operation) -> None:
    """Follow an operation until it has ended, and say where it stands whenever that changes."""
    loop = asyncio.get_running_loop()
    doubtful = loop.time() + _NOBODY_S
    told = ""
    while True:
        text = f"{operation.step}: {operation.readings_deleted:,} readings deleted"
        if operation.problem:
            text += f"; failed, is tried again: {operation.problem}"
        if text != told:
            say(text)
            told = text
        if operation.ended_at is not None:
            return
        if operation.started_at is None and loop.time() >= doubtful:
            say("nobody has begun yet: does `atlasco rollup` run?")
            doubtful = float("inf")
        await asyncio.sleep(_POLL_S)
        operation = await find_operation(pool, tenant, operation.operation_id)


async def _list(arguments: argparse.Namespace) -> int:
    found: list[Operation] = []
    async with connected(arguments) as (pool, tenant):
        while True:
            after = (found[-1].created_at, found[-1].operation_id) if found else None
            page = await list_operations(pool, tenant, limit=_PAGE, after=after)
            found += page
            if len(page) < _PAGE:
                break
    if arguments.json:
        for operation in found:
            print(json.dumps(_fields(operation), ensure_ascii=False))
        return 0
    print_table(
        ("operation", "device", "step", "readings deleted", "ordered", "ended", "problem"),
        [(o.operation_id, o.entity, o.step, o.readings_deleted, o.created_at, o.ended_at, o.problem) for o in found],
    )
    return 0


def _fields(operation: Operation) -> dict[str, object]:
    return {
        "operation": str(operation.operation_id),
        "device": operation.entity,
        "step": operation.step,
        "readings_deleted": operation.readings_deleted,
        "problem": operation.problem,
        "created_at": operation.created_at.isoformat(),
        "started_at": operation.started_at and operation.started_at.isoformat(),
        "ended_at": operation.ended_at and operation.ended_at.isoformat(),
    }
