"""`atlasco rebuild`: make the warehouse again from PostgreSQL."""

import argparse
import asyncio

from cli.migrate import reporting_errors, say
from runtime.config import add_settings, load_settings
from storage.kafka import BrokerError, KafkaConfig
from storage.loader.process import log_end_of
from storage.loader.rebuild import rebuild_warehouse
from storage.warehouse.config import WarehouseConfig, open_warehouse

DESCRIPTION = """\
Make the warehouse's content again from PostgreSQL, tenant by tenant and time range by time range, and have loaders go
on in the log from where it stands now. For a log that lost records before they were loaded, a topic that was made anew,
a database that was restored to an earlier moment, or a warehouse set up late.

What the warehouse has of times that PostgreSQL no longer keeps stays as it is. Queries go on throughout, on the old
content; loads wait. A rebuild that fails or is interrupted leaves the old content in use: run it again.

PostgreSQL is read in one snapshot, which keeps vacuum from cleaning up while it lasts: prefer quiet hours.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "rebuild",
        help="make the warehouse again from PostgreSQL",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for config_type in (WarehouseConfig, KafkaConfig):
        add_settings(parser, config_type)
    parser.set_defaults(run=reporting_errors(_run))


async def _run(arguments: argparse.Namespace) -> int:
    kafka = load_settings(KafkaConfig, arguments)
    config = load_settings(WarehouseConfig, arguments)
    warehouse = open_warehouse(config)
    try:
        # In a thread: it blocks, and asks Kafka on an event loop of its own.
        rows = await asyncio.to_thread(rebuild_warehouse, config.dsn, warehouse, log_end_of(kafka), say)
    except BrokerError as error:
        say(f"atlasco: {error}")
        return 3 if error.retriable else 1
    finally:
        warehouse.close()
    print(f"rebuilt with {rows} readings")
    return 0
