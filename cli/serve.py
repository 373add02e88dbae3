"""`atlasco serve`: a gateway."""

import argparse
import sys

from gateway.config import GatewayConfig
from gateway.server import serve
from gateway.tls import TlsConfig
from runtime.admin import AdminConfig, AdminServer
from runtime.config import ConfigError, add_settings, load_settings
from runtime.logs import LogConfig, configure_logs
from runtime.metrics import OpenTelemetryMetrics, TelemetryConfig
from runtime.process import ExitCode, Shutdown, run_process

CONFIGS = (GatewayConfig, TlsConfig, AdminConfig, LogConfig, TelemetryConfig)

DESCRIPTION = """\
Serve device streams and queries until SIGTERM or SIGINT, then drain: streams are told to reconnect, what was received
is committed and acked, and the process ends.

Without TLS settings callers are believed to be whoever they say they are (development), and the gateway listens on
loopback only. With them, callers are who their client certificate says; see `atlasco pki`.

  atlasco migrate --dsn postgresql://…        make or update the schema first
  atlasco serve --dsn postgresql://…          then serve on 127.0.0.1:7070
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "serve",
        help="run a gateway",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for config_type in CONFIGS:
        add_settings(parser, config_type)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to stop."""
    try:
        config = load_settings(GatewayConfig, arguments)
        tls = load_settings(TlsConfig, arguments)
        admin_config = load_settings(AdminConfig, arguments)
        logs = load_settings(LogConfig, arguments)
        telemetry = load_settings(TelemetryConfig, arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return ExitCode.CONFIGURATION
    configure_logs(logs)
    metrics = OpenTelemetryMetrics("atlasco-gateway", telemetry)

    async def main(shutdown: Shutdown) -> int:
        return await serve(config, tls, AdminServer(admin_config, metrics), metrics, shutdown)

    try:
        return run_process(main, metrics=metrics)
    finally:
        metrics.close()
