"""`atlasco relay`: carry the outbox to Kafka."""

import argparse
import sys

from runtime.admin import AdminConfig, AdminServer
from runtime.config import ConfigError, add_settings, load_settings
from runtime.logs import LogConfig, configure_logs
from runtime.metrics import OpenTelemetryMetrics, TelemetryConfig
from runtime.process import ExitCode, Shutdown, run_process
from storage.kafka import KafkaConfig
from storage.relay.config import RelayConfig
from storage.relay.service import Relay

CONFIGS = (RelayConfig, KafkaConfig, AdminConfig, LogConfig, TelemetryConfig)

DESCRIPTION = """\
Carry what the gateways committed from the outbox in PostgreSQL to the topic of changes in Kafka, until SIGTERM or
SIGINT; then the pages under way are finished and the lanes given up.

Run as many as you like: they share the lanes, and take over those of one that dies. While Kafka is down everything
waits in the outbox, and ingest goes on. The topic is made if it is missing.
"""

EPILOG = """\
examples:
  atlasco relay --dsn postgresql://relay@primary/telemetry --kafka-bootstrap-servers broker:9092
  atlasco relay --retire-after published        no warehouse: drop from the outbox what Kafka has

The login needs the role atlasco_relay, on the primary. Exit codes: 0 stopped on request, 1 failed, 2 wrong
configuration, 3 the database could not be reached at the start (Kafka is waited for).
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `relay`."""
    parser = subparsers.add_parser(
        "relay",
        help="carry the outbox to Kafka",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for config_type in CONFIGS:
        add_settings(parser, config_type)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Relay until told to stop; returns the exit code."""
    try:
        config = load_settings(RelayConfig, arguments)
        kafka = load_settings(KafkaConfig, arguments)
        admin_config = load_settings(AdminConfig, arguments)
        logs = load_settings(LogConfig, arguments)
        telemetry = load_settings(TelemetryConfig, arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return ExitCode.CONFIGURATION
    configure_logs(logs)
    metrics = OpenTelemetryMetrics("atlasco-relay", telemetry)

    async def main(shutdown: Shutdown) -> int:
        relay = Relay(config, kafka, metrics)
        admin = AdminServer(admin_config, metrics)
        admin.add_check("database", relay.database_ready)
        admin.add_check("kafka", relay.kafka_ready)
        async with admin:
            await relay.run(shutdown)
        return ExitCode.OK

    try:
        return run_process(main, metrics=metrics)
    finally:
        metrics.close()
