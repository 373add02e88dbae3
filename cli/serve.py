"""`atlasco serve`: a gateway."""

import argparse
import os
import sys
from dataclasses import replace

from gateway.config import GatewayConfig
from gateway.server import serve
from gateway.tls import TlsConfig
from runtime.admin import AdminConfig, AdminServer
from runtime.config import ConfigError, add_settings, load_settings, settings_of
from runtime.logs import LogConfig, configure_logs
from runtime.metrics import OpenTelemetryMetrics, TelemetryConfig
from runtime.process import ExitCode, Shutdown, run_process
from runtime.tracing import Tracing
from storage.warehouse.config import WarehouseReadConfig, open_to_read
from storage.warehouse.port import Warehouse

CONFIGS = (GatewayConfig, TlsConfig, WarehouseReadConfig, AdminConfig, LogConfig, TelemetryConfig)

DESCRIPTION = """\
Serve device streams and queries until SIGTERM or SIGINT, then drain: streams are told to reconnect, what was received
is committed and acked, and the process ends.

Without TLS settings callers are believed to be whoever they say they are (development), and the gateway listens on
loopback only. With them, callers are who their client certificate says; see `atlasco pki`.

Analytical queries go to a warehouse where one is named: --warehouse-dir for a local one, --redshift-dsn for Redshift.
They only read: a login without the right to write is enough, and the loader's bucket and role are not asked for.

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
        warehouse = _warehouse(arguments, config)
    except (ConfigError, ValueError) as error:
        print(error, file=sys.stderr)
        return ExitCode.CONFIGURATION
    configure_logs(logs)
    metrics = OpenTelemetryMetrics("atlasco-gateway", telemetry)
    tracing = Tracing("atlasco-gateway", telemetry)

    async def main(shutdown: Shutdown) -> int:
        return await serve(config, tls, AdminServer(admin_config, metrics), metrics, shutdown, warehouse, tracing)

    try:
        return run_process(main, metrics=metrics)
    finally:
        if warehouse is not None:
            warehouse.close()
        tracing.close()
        metrics.close()


def _warehouse(arguments: argparse.Namespace, gateway: GatewayConfig) -> Warehouse | None:
    """The warehouse for queries; None when the settings name none.

    Raises:
        ConfigError: a setting is wrong.
        ValueError: a setting does not have the form it needs.
    """
    settings = settings_of(WarehouseReadConfig)
    naming = (settings["directory"], settings["redshift_dsn"])
    if not any(getattr(arguments, entry.dest, None) or os.environ.get(entry.env) for entry in naming):
        return None
    config = load_settings(WarehouseReadConfig, arguments)
    # A local warehouse's catalog is read by the query role; the ingest role has no right to it.
    config = replace(config, catalog_dsn=config.catalog_dsn or gateway.query_dsn)
    return open_to_read(config, measured_s=gateway.warehouse_measured)
