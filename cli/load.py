"""`atlasco load`: the loader, which follows the log into the warehouse."""

import argparse
import json
import sys

from runtime.admin import AdminConfig, AdminServer
from runtime.config import ConfigError, add_settings, load_settings
from runtime.logs import LogConfig, configure_logs
from runtime.metrics import OpenTelemetryMetrics, TelemetryConfig
from runtime.process import ExitCode, Shutdown, run_process
from storage.errors import StorageError
from storage.kafka import BrokerError, KafkaConfig
from storage.loader.config import LoaderConfig
from storage.loader.process import make_follower, redrive_dead_letters, run_loader
from storage.warehouse.config import WarehouseConfig, open_warehouse

CONFIGS = (LoaderConfig, WarehouseConfig, KafkaConfig, AdminConfig, LogConfig, TelemetryConfig)

DESCRIPTION = """\
Load the log of changes into the warehouse until SIGTERM or SIGINT, every reading exactly once. Several may run: they
share the log's partitions, and one that dies is replaced by the others.

A record that cannot be decoded goes to the topic <changes topic>.dead-letter, answers that may lack it are marked
incomplete, and loading goes on. After mending the cause, --redrive loads those records and ends.

When the log lacks records that were never loaded, or the topic was made anew, the loader halts there, is not ready, and
says so, until `atlasco rebuild` has made the warehouse again from PostgreSQL. It then goes on by itself.

  atlasco warehouse init                  make the warehouse first
  atlasco load                            then load, by default at least every minute
  atlasco load --load-age 2s              fresher, in more and smaller files
  atlasco load --redrive                  try the dead letters again
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "load",
        help="load the log of changes into the warehouse",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--redrive", action="store_true", help="load what was undecodable before, then end")
    for config_type in CONFIGS:
        add_settings(parser, config_type)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Load until told to stop, or redrive."""
    try:
        config = load_settings(LoaderConfig, arguments)
        kafka = load_settings(KafkaConfig, arguments)
        warehouse_config = load_settings(WarehouseConfig, arguments)
        admin_config = load_settings(AdminConfig, arguments)
        logs = load_settings(LogConfig, arguments)
        telemetry = load_settings(TelemetryConfig, arguments)
        warehouse = open_warehouse(warehouse_config)
    except (ConfigError, ValueError) as error:
        print(error, file=sys.stderr)
        return ExitCode.CONFIGURATION
    configure_logs(logs)
    if arguments.redrive:
        try:
            done = redrive_dead_letters(kafka, warehouse)
        except (StorageError, BrokerError) as error:
            print(f"atlasco: {error}", file=sys.stderr)
            return ExitCode.UNREACHABLE if error.retriable else ExitCode.FAILED
        finally:
            warehouse.close()
        print(json.dumps({"loaded": done.loaded, "still_undecodable": done.still_undecodable, "missing": done.missing}))
        return ExitCode.FAILED if done.still_undecodable or done.missing else ExitCode.OK
    metrics = OpenTelemetryMetrics("atlasco-loader", telemetry)

    async def main(shutdown: Shutdown) -> int:
        follower = make_follower(config, kafka, warehouse_config.dsn, warehouse, metrics)
        return await run_loader(config, follower, warehouse, AdminServer(admin_config, metrics), shutdown)

    try:
        return run_process(main, metrics=metrics)
    finally:
        metrics.close()
