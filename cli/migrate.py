"""`atlasco migrate`: bring a database to this program's schema version."""

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import psycopg
from psycopg.conninfo import conninfo_to_dict

from runtime.config import REQUIRED, ConfigError, Kind, add_settings, duration, load_settings, setting
from storage.errors import StorageError, StorageUnavailable
from storage.migrations import grant_logins, migrate, schema_state

EPILOG = """\
A fresh database gets every migration in order; one that is up to date is left alone. Any number of these may run at
once: one works, the others wait. A migration that fails leaves no trace. A database that a newer release has migrated
is left as it is, and refused only where that release changed something that this one needs.

The login needs to own the database, and CREATEROLE unless the roles atlasco_ingest, atlasco_query, atlasco_relay,
atlasco_loader and atlasco_rollup exist.

examples:
  atlasco migrate --dsn postgresql://owner@db/telemetry     apply what is missing
  atlasco migrate --check                                   exit code 1 when something is missing: for readiness gates
  atlasco migrate --grant-ingest gateway --grant-query api  let two existing login roles do their work
"""


def _read_dsn(text: str) -> str:
    try:
        conninfo_to_dict(text)
    except psycopg.ProgrammingError as error:
        raise ValueError("not a connection string") from error
    return text


def _read_names(text: str) -> tuple[str, ...]:
    return tuple(name for name in (part.strip() for part in text.split(",")) if name)


connection_string = Kind(_read_dsn, "a connection string (host=… dbname=…) or a postgresql:// URI", metavar="DSN")
"""Reads a libpq connection string or URI."""

names = Kind(_read_names, "names, separated by commas", ",".join, "NAME[,NAME]")
"""Reads a comma-separated list."""


@dataclass(frozen=True)
class OwnerConfig:
    """Database, as the owner of the schema."""

    dsn: str = setting(
        "ATLASCO_DSN", REQUIRED, "The database, as the owner of the schema.", parse=connection_string, secret=True
    )


@dataclass(frozen=True)
class MigrateConfig(OwnerConfig):
    """Migration."""

    grant_ingest: tuple[str, ...] = setting(
        "ATLASCO_GRANT_INGEST", (), "Existing login roles that may write: gateways.", parse=names
    )
    grant_query: tuple[str, ...] = setting(
        "ATLASCO_GRANT_QUERY", (), "Existing login roles that may read.", parse=names
    )
    grant_relay: tuple[str, ...] = setting(
        "ATLASCO_GRANT_RELAY", (), "Existing login roles that may carry the outbox to the log.", parse=names
    )
    grant_loader: tuple[str, ...] = setting(
        "ATLASCO_GRANT_LOADER", (), "Existing login roles that may load the local warehouse.", parse=names
    )
    grant_rollup: tuple[str, ...] = setting(
        "ATLASCO_GRANT_ROLLUP", (), "Existing login roles that may keep rollups and projections.", parse=names
    )
    lock_timeout_s: float = setting(
        "ATLASCO_MIGRATE_LOCK_TIMEOUT",
        30.0,
        "How long a statement of a migration waits for a lock; whatever comes after it waits too.",
        parse=duration,
    )


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `migrate`."""
    parser = subparsers.add_parser(
        "migrate",
        help="bring a database to this program's schema version",
        description="Bring a PostgreSQL database to this program's schema version.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="change nothing; exit code 1 when a migration is missing")
    what.add_argument(
        "--list", "--dry-run", action="store_true", help="change nothing; show what is applied and what would be"
    )
    add_settings(parser, MigrateConfig)
    parser.set_defaults(run=reporting_errors(_run))


def reporting_errors(
    work: Callable[[argparse.Namespace], Awaitable[int]],
) -> Callable[[argparse.Namespace], int]:
    """Make a command's coroutine function a `run`: errors become one line on standard error and an exit code."""

    def run(arguments: argparse.Namespace) -> int:
        async def awaited() -> int:
            return await work(arguments)

        try:
            return asyncio.run(awaited())
        except ConfigError as error:
            code, text = 2, str(error)
        except StorageUnavailable as error:
            code, text = 3, f"the database cannot be reached: {error}"
        except StorageError as error:
            code, text = 1, str(error)
        for line in text.strip().splitlines():
            print(f"atlasco: {line}", file=sys.stderr)
        return code

    return run


def say(text: str) -> None:
    """A line of progress: on standard error, so that standard output holds results alone."""
    print(text, file=sys.stderr, flush=True)


async def _run(arguments: argparse.Namespace) -> int:
    config = load_settings(MigrateConfig, arguments)
    if arguments.check or arguments.list:
        state = await schema_state(config.dsn)
        if arguments.list:
            for migration in state.applied:
                print(f"applied  {migration}")
            for row in state.newer:
                print(f"newer    {row}")
        for migration in state.pending:
            print(f"pending  {migration}")
        return 1 if arguments.check and state.pending else 0
    applied = await migrate(config.dsn, progress=say, lock_timeout_s=config.lock_timeout_s)
    print(f"applied {len(applied)} migrations" if applied else "the schema is up to date")
    logins = {
        "ingest": config.grant_ingest,
        "query": config.grant_query,
        "relay": config.grant_relay,
        "loader": config.grant_loader,
        "rollup": config.grant_rollup,
    }
    for line in await grant_logins(config.dsn, logins):
        print(line)
    return 0
