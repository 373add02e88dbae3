"""`atlasco rollup`: keep rollups and projections, and delete devices; and the declarations of rollups."""

import argparse
import sys

from cli.migrate import OwnerConfig, reporting_errors
from cli.projection import add_listing, connected, print_entries, status_cells
from cli.times import ABSOLUTE, moment
from runtime.admin import AdminConfig, AdminServer
from runtime.config import ConfigError, add_settings, load_settings
from runtime.logs import LogConfig, configure_logs
from runtime.metrics import OpenTelemetryMetrics, TelemetryConfig
from runtime.process import ExitCode, Shutdown, run_process
from storage.errors import translated
from storage.rollup.config import RollupConfig
from storage.rollup.declare import create_rollup, drop_rollup, list_rollups
from storage.rollup.service import RollupProcess
from storage.statements import statements

CONFIGS = (RollupConfig, AdminConfig, LogConfig, TelemetryConfig)

DESCRIPTION = """\
Keep rollups and projections up to date, fill new ones, and delete devices whose deletion was ordered, until SIGTERM or
SIGINT; the transaction under way is finished first.

Run two: one works, the other stands by and takes over when it dies. What was declared while none ran is filled when one
does. The outbox is kept for the worker from its first start on; to give it up for good: `atlasco rollup forget`.
"""

EPILOG = """\
examples:
  atlasco rollup --dsn postgresql://rollup@primary/telemetry                    the worker
  atlasco rollup create acme climate --attribute temperature --attribute load   buckets of a minute and of an hour
  atlasco rollup list acme
  atlasco rollup drop acme climate

The worker's login needs the role atlasco_rollup, on the primary; the other commands are the owner's. Exit codes: 0
stopped on request, 1 failed, 2 wrong configuration, 3 the database could not be reached at the start.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `rollup` and everything below it."""
    parser = subparsers.add_parser(
        "rollup",
        help="keep rollups and projections, delete devices",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for config_type in CONFIGS:
        add_settings(parser, config_type)
    parser.set_defaults(run=run)
    commands = parser.add_subparsers(title="commands besides the worker", metavar="COMMAND")

    create = commands.add_parser("create", help="declare a rollup", description="Declare a rollup.")
    create.add_argument("tenant", metavar="TENANT")
    create.add_argument("name", metavar="NAME")
    create.add_argument("--attribute", action="append", required=True, metavar="NAME", help="a number; repeatable")
    create.add_argument(
        "--from",
        dest="since",
        type=moment,
        metavar="TIME",
        help=f"fill from here on; {ABSOLUTE} (default: everything kept)",
    )
    add_settings(create, OwnerConfig)
    create.set_defaults(run=reporting_errors(_create))
    add_listing(commands, "rollups", reporting_errors(_list))
    drop = commands.add_parser("drop", help="take a rollup out of use", description="Take a rollup out of use.")
    drop.add_argument("tenant", metavar="TENANT")
    drop.add_argument("name", metavar="NAME")
    add_settings(drop, OwnerConfig)
    drop.set_defaults(run=reporting_errors(_drop))
    forget = commands.add_parser(
        "forget",
        help="keep the outbox for no worker any more",
        description="Keep the outbox for no worker any more. Queries stop using rollups and projections at once.",
    )
    add_settings(forget, OwnerConfig)
    forget.set_defaults(run=reporting_errors(_forget))


def run(arguments: argparse.Namespace) -> int:
    """Work until told to stop; returns the exit code."""
    try:
        config = load_settings(RollupConfig, arguments)
        admin_config = load_settings(AdminConfig, arguments)
        logs = load_settings(LogConfig, arguments)
        telemetry = load_settings(TelemetryConfig, arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return ExitCode.CONFIGURATION
    configure_logs(logs)
    metrics = OpenTelemetryMetrics("atlasco-rollup", telemetry)

    async def main(shutdown: Shutdown) -> int:
        process = RollupProcess(config, metrics)
        admin = AdminServer(admin_config, metrics)
        admin.add_check("database", process.database_ready)
        async with admin:
            await process.run(shutdown)
        return ExitCode.OK

    try:
        return run_process(main, metrics=metrics)
    finally:
        metrics.close()


async def _create(arguments: argparse.Namespace) -> int:
    async with connected(arguments) as (pool, tenant):
        made = await create_rollup(pool, tenant, arguments.name, arguments.attribute, arguments.since)
    print(f"rollup {made.name}: {made.status.state}")
    return 0


async def _list(arguments: argparse.Namespace) -> int:
    async with connected(arguments) as (pool, tenant):
        found = await list_rollups(pool, tenant)
    rows = [{"rollup": r.name, "attributes": list(r.attributes), **status_cells(r.status)} for r in found]
    print_entries(rows, as_json=arguments.json)
    return 0


async def _drop(arguments: argparse.Namespace) -> int:
    async with connected(arguments) as (pool, tenant):
        await drop_rollup(pool, tenant, arguments.name)
    print(f"rollup {arguments.name} is out of use; the worker removes its rows")
    return 0


async def _forget(arguments: argparse.Namespace) -> int:
    async with connected(arguments) as (pool, _):
        with translated():
            async with pool.connection() as connection:
                await connection.execute(statements("rollup.sql")["forget_consumer"])
    print("the outbox is kept for no rollup worker; one that starts begins anew")
    return 0
