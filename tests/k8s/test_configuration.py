"""Every variable in the manifests is one the program reads, and the program accepts what they say."""

import argparse
import re
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict

import cli.load
import cli.relay
import cli.rollup
import cli.serve
from cli.maintain import MaintainConfig
from cli.migrate import MigrateConfig
from gateway.config import GatewayConfig
from runtime.config import REQUIRED, load_settings, settings_of
from runtime.logs import LogConfig
from storage.warehouse.config import WarehouseConfig, WarehouseReadConfig
from tests.k8s.manifests import Container, Manifests

# The configuration of each command that a container runs.
CONFIGS: dict[str, tuple[type[Any], ...]] = {
    "serve": cli.serve.CONFIGS,
    "relay": cli.relay.CONFIGS,
    "load": cli.load.CONFIGS,
    "rollup": cli.rollup.CONFIGS,
    "migrate": (MigrateConfig, LogConfig),
    "maintain": (MaintainConfig,),
    "warehouse": (WarehouseConfig,),
}
# libpq's own, which take the place of what a connection string does not say.
LIBPQ = {"PGHOST", "PGPORT", "PGDATABASE", "PGSSLMODE", "PGSSLROOTCERT"}
# Read by every process or by several: a process that has no use for one leaves it alone.
SHARED = ("atlasco-platform", "atlasco-kafka")

SECRETS = {
    "secret:atlasco-database/owner-dsn": "user=owner password='x y'",
    "secret:atlasco-database/ingest-dsn": "user=ingest password=x",
    "secret:atlasco-database/query-dsn": "user=query password=x",
    "secret:atlasco-database/relay-dsn": "user=relay password=x",
    "secret:atlasco-database/loader-dsn": "user=loader password=x",
    "secret:atlasco-database/rollup-dsn": "user=rollup password=x",
    "secret:atlasco-warehouse/loader-dsn": "redshift://loader:x@host:5439/atlasco",
    "secret:atlasco-warehouse/reader-dsn": "redshift://reader:x@host:5439/atlasco",
}


def known(command: str) -> set[str]:
    return {entry.env for config in CONFIGS[command] for entry in settings_of(config).values()}


def own_variables(manifests: Manifests, container: Container) -> set[str]:
    """What is said to this container and not to all."""
    shared = {name for config in SHARED for name in manifests.config(config)}
    return manifests.environment(container).keys() - shared


def test_every_container_runs_a_command_that_exists(manifests: Manifests) -> None:
    from cli.main import COMMANDS

    for container in manifests.containers():
        command = container.atlasco_command
        if command is None:
            assert container.spec["command"][0] == "python"
        else:
            assert command in COMMANDS
            assert command in CONFIGS


def test_every_variable_is_read_by_the_process_that_gets_it(manifests: Manifests) -> None:
    for container in manifests.containers():
        command = container.atlasco_command
        if command is not None:
            loose = {"ATLASCO_LOAD_AGE", "ATLASCO_LOAD_MEMORY", "ATLASCO_WAREHOUSE_COMPACT_EVERY"}
            # `warehouse init` shares the loader's ConfigMap.
            known_here = known(command) | LIBPQ | (loose if command == "warehouse" else set())
            assert own_variables(manifests, container) <= known_here, container.name


def test_every_shared_variable_is_read_by_some_process(manifests: Manifests) -> None:
    everything = LIBPQ.union(*(known(command) for command in CONFIGS))
    for config in SHARED:
        assert manifests.config(config).keys() <= everything


def test_the_program_accepts_the_environment(manifests: Manifests) -> None:
    for container in manifests.containers():
        command = container.atlasco_command
        if command is None:
            continue
        environment = {
            name: re.sub(r"secret:[a-z-]+/[a-z-]+", lambda found: SECRETS[found[0]], value)
            for name, value in manifests.environment(container).items()
        }
        # A gateway may do without a warehouse; it then reads none of the warehouse's settings.
        without = {WarehouseReadConfig} if command == "serve" and not environment.get("ATLASCO_REDSHIFT_DSN") else set()
        for config in (config for config in CONFIGS[command] if config not in without):
            # Raises with every problem, a missing required setting among them.
            load_settings(config, argparse.Namespace(), environment)
            for entry in settings_of(config).values():
                assert entry.default is not REQUIRED or environment.get(entry.env), container.name


def test_secrets_never_stand_in_a_config_map(manifests: Manifests) -> None:
    secret = {
        entry.env for configs in CONFIGS.values() for c in configs for entry in settings_of(c).values() if entry.secret
    }
    for item in manifests.of_kind("ConfigMap"):
        assert not secret & item["data"].keys()
    for container in manifests.containers():
        for name in secret & manifests.environment(container).keys():
            # One that is put together of others begins with a login of the secret; or it is not set.
            value = manifests.environment(container)[name]
            assert value == "" or value.startswith("secret:")
            for part in value.split(";"):
                assert not re.search(r"\bpassword=", part)


def test_gateway_uses_mutual_tls(manifests: Manifests) -> None:
    from gateway.tls import TlsConfig

    assert load_settings(TlsConfig, argparse.Namespace(), manifests.config("atlasco-gateway")).enabled


def test_each_process_signs_in_as_itself(manifests: Manifests) -> None:
    wanted = {
        "Deployment/atlasco-gateway/gateway": "ingest-dsn",
        "Deployment/atlasco-relay/relay": "relay-dsn",
        "Deployment/atlasco-loader/loader": "loader-dsn",
        "Deployment/atlasco-rollup/rollup": "rollup-dsn",
        "CronJob/atlasco-maintain/maintain": "owner-dsn",
    }
    found = {c.name: manifests.environment(c).get("ATLASCO_DSN", "") for c in manifests.containers()}
    for name, key in wanted.items():
        assert found[name] == f"secret:atlasco-database/{key}"
    # The owner's is for jobs alone.
    for name, value in found.items():
        assert "owner-dsn" not in value or name.startswith(("Job/", "CronJob/"))
    gateway = next(c for c in manifests.containers() if c.name == "Deployment/atlasco-gateway/gateway")
    assert manifests.environment(gateway)["ATLASCO_QUERY_DSN"] == "secret:atlasco-database/query-dsn"


def gateway_of(manifests: Manifests) -> Container:
    return next(c for c in manifests.containers() if c.name == "Deployment/atlasco-gateway/gateway")


def test_gateway_asks_each_standby_as_the_query_role(manifests: Manifests) -> None:
    environment = manifests.environment(gateway_of(manifests))
    config = load_settings(GatewayConfig, argparse.Namespace(), environment)
    # Development has one database, and no standby of it.
    assert len(config.replicas) == (0 if manifests.name == "dev" else 2)
    orders = []
    for dsn in config.replicas:
        login, _, rest = dsn.partition(" ")
        # The same login and nobody else's, put in by the kubelet; no `$(…)` was left standing.
        assert login == environment["ATLASCO_QUERY_DSN"] == "secret:atlasco-database/query-dsn"
        given = conninfo_to_dict(rest)
        assert given["target_session_attrs"] == "standby"
        orders.append(str(given["host"]).split(","))
        # Port, database and TLS are the primary's, by libpq's own variables.
        assert given.keys() == {"host", "target_session_attrs"}
    assert not orders or orders[0] == orders[1][::-1]


def test_gateway_reads_the_warehouse_and_only_reads(manifests: Manifests) -> None:
    gateway = gateway_of(manifests)
    environment = manifests.environment(gateway)
    assert environment["ATLASCO_WAREHOUSE"] == "redshift"
    assert environment["ATLASCO_REDSHIFT_DSN"] == "secret:atlasco-warehouse/reader-dsn"
    # What only a loader has.
    for name in ("ATLASCO_REDSHIFT_STAGING", "ATLASCO_REDSHIFT_COPY_ROLE", "ATLASCO_AWS_REGION"):
        assert name not in environment
    (entry,) = [e for e in gateway.spec["env"] if e["name"] == "ATLASCO_REDSHIFT_DSN"]
    # In production a secret that lacks the key is a mistake to be seen; in development it is the way to do without.
    assert entry["valueFrom"]["secretKeyRef"].get("optional", False) == (manifests.name == "dev")


@pytest.mark.parametrize(("redshift", "read"), [(True, True), (False, False)], ids=["with the key", "without it"])
def test_serve_opens_what_the_manifests_say(redshift: bool, read: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`atlasco serve` itself: no bucket, no region, and without a connection string no warehouse."""
    from storage.warehouse.redshift_reader import RedshiftReader

    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ATLASCO_DSN", "user=ingest")
    monkeypatch.setenv("ATLASCO_WAREHOUSE", "redshift")
    if redshift:
        monkeypatch.setenv("ATLASCO_REDSHIFT_DSN", SECRETS["secret:atlasco-warehouse/reader-dsn"])
    opened = cli.serve._warehouse(argparse.Namespace(), GatewayConfig(dsn="user=ingest"))
    assert isinstance(opened, RedshiftReader) if read else opened is None
