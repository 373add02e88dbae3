"""compose.yaml: its parts exist and fit each other, and the program accepts what it says."""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from psycopg.conninfo import conninfo_to_dict

from gateway.config import GatewayConfig
from runtime.config import load_settings, settings_of
from tests.k8s.manifests import seconds
from tests.k8s.test_configuration import CONFIGS
from tests.waiting import PATIENCE_S

REPOSITORY = Path(__file__).resolve().parents[2]
FILE = REPOSITORY / "compose.yaml"
COMPOSE: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OF_OUR_IMAGE = [name for name, service in SERVICES.items() if service["image"].startswith("atlasco/")]
# Those of them that run one of the program's commands as it is.
OURS = {
    name: service
    for name, service in SERVICES.items()
    if name in OF_OUR_IMAGE and "entrypoint" not in service and service["command"][0] in CONFIGS
}


def environment(name: str) -> dict[str, str]:
    return {key: str(value) for key, value in SERVICES[name]["environment"].items()}


def test_the_platform_is_complete() -> None:
    commands = {service["command"][0] for service in OURS.values()}
    assert commands == {"migrate", "warehouse", "serve", "relay", "load", "rollup", "maintain"}
    for name in ("postgres", "replica", "kafka", "moto", "prometheus", "grafana"):
        assert name in SERVICES


@pytest.mark.parametrize("name", OURS)
def test_the_program_accepts_the_environment(name: str) -> None:
    given = environment(name)
    configs = CONFIGS[OURS[name]["command"][0]]
    known = {entry.env for config in configs for entry in settings_of(config).values()}
    assert given.keys() <= known
    for config in configs:
        load_settings(config, argparse.Namespace(), given)


@pytest.mark.parametrize("name", SERVICES)
def test_service(name: str) -> None:
    service = SERVICES[name]
    # A tag that says which; `latest` is another image tomorrow.
    assert re.search(r":[a-z0-9][\w.-]*$", service["image"]) and not service["image"].endswith(":latest")
    for other, wanted in service.get("depends_on", {}).items():
        assert other in SERVICES
        if wanted["condition"] == "service_healthy":
            assert "healthcheck" in SERVICES[other]
    for volume in service.get("volumes", []):
        source = volume.split(":")[0]
        if source.startswith("."):
            assert (REPOSITORY / source).exists(), source
            assert volume.endswith(":ro")
        else:
            assert source in COMPOSE["volumes"]
    for port in service.get("ports", []):
        # The passwords are in the file: nothing is offered to the network.
        assert port.startswith("127.0.0.1:")


@pytest.mark.parametrize("name", OF_OUR_IMAGE)
def test_our_containers_are_hardened(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_one_service_builds_the_image_and_the_others_wait_for_it() -> None:
    assert [name for name, service in SERVICES.items() if "build" in service] == ["pki"]

    def waits(name: str) -> bool:
        return name == "pki" or any(waits(other) for other in SERVICES[name].get("depends_on", {}))

    assert all(waits(name) for name in OF_OUR_IMAGE)


def test_logins_are_made_granted_and_used() -> None:
    script = (REPOSITORY / "docker" / "postgres" / "primary.sh").read_text(encoding="utf-8")
    made = dict(re.findall(r"CREATE ROLE (\w+) LOGIN (?:REPLICATION )?PASSWORD '(\w+)'", script))
    granted = {value for name, value in environment("migrate").items() if name.startswith("ATLASCO_GRANT_")}
    owner = SERVICES["postgres"]["environment"]
    made[owner["POSTGRES_USER"]] = owner["POSTGRES_PASSWORD"]
    for name in OURS:
        for variable, value in environment(name).items():
            if variable.endswith("_DSN"):
                given = conninfo_to_dict(value)
                assert made[str(given["user"])] == given["password"]
                assert given["host"] == "postgres"
                assert given["dbname"] == owner["POSTGRES_DB"]
                assert given["user"] in granted | {owner["POSTGRES_USER"]}
    replica = (REPOSITORY / "docker" / "postgres" / "replica.sh").read_text(encoding="utf-8")
    assert "--username=replicator" in replica and "replicator" in made


def test_gateway_reads_from_the_replica() -> None:
    gateway = environment("gateway")
    config = load_settings(GatewayConfig, argparse.Namespace(), gateway)
    (dsn,) = map(conninfo_to_dict, config.replicas)
    # As the query role, on the streaming copy of the very database.
    assert dsn == {**conninfo_to_dict(gateway["ATLASCO_QUERY_DSN"]), "host": "replica"}
    assert SERVICES["replica"]["image"] == SERVICES["postgres"]["image"]
    assert "replica" not in SERVICES["gateway"]["depends_on"], (
        "a replica that is down must keep no gateway from starting"
    )
    # A standby refuses to start with fewer than its primary has; and each has room for the gateway's pools.
    command = " ".join(SERVICES["postgres"]["command"])
    script = (REPOSITORY / "docker" / "postgres" / "replica.sh").read_text(encoding="utf-8")
    for name in ("max_connections", "max_locks_per_transaction", "max_wal_senders"):
        (here,), (there,) = (re.findall(rf"-c{name}=(\d+)", text) for text in (command, script))
        assert here == there, name
    # Replay that waits for queries makes every answer stale.
    assert "-cmax_standby_streaming_delay=1s" in script and "-chot_standby_feedback=on" in script


def test_gateway_only_reads_the_warehouse() -> None:
    """The volume is the loader's to write; the one thing a query writes is what outgrows memory, elsewhere."""
    volumes = {
        name: [v for v in service.get("volumes", []) if v.startswith("warehouse:")] for name, service in OURS.items()
    }
    directory = environment("gateway")["ATLASCO_WAREHOUSE_DIR"]
    assert volumes["gateway"] == [f"warehouse:{directory}:ro"]
    assert volumes["loader"] == volumes["warehouse"] == [f"warehouse:{directory}"]
    assert environment("loader")["ATLASCO_WAREHOUSE_DIR"] == directory
    assert set(SERVICES["gateway"]["tmpfs"]) == {"/tmp", f"{directory}/tmp"}
    # What it reads has to be set up; and it reads the catalog as the query role, which may change nothing in it.
    assert SERVICES["gateway"]["depends_on"]["warehouse"] == {"condition": "service_completed_successfully"}


def test_rollup_worker_signs_in_as_itself() -> None:
    assert environment("migrate")["ATLASCO_GRANT_ROLLUP"] == "rollup"
    assert conninfo_to_dict(environment("rollup")["ATLASCO_DSN"])["user"] == "rollup"


def test_certificates_are_made_where_they_are_read() -> None:
    gateway = environment("gateway")
    (script,) = SERVICES["pki"]["command"]
    assert f"--trust-domain {gateway['ATLASCO_TRUST_DOMAIN']}" in script
    # The name by which the tools connect.
    assert "--host gateway" in script
    for name in ("ATLASCO_TLS_CERTIFICATE", "ATLASCO_TLS_KEY", "ATLASCO_TLS_CLIENT_CA"):
        assert gateway[name].startswith("/var/lib/atlasco/pki/")
    for name in ("gateway", "simulate", "query"):
        assert "pki:/var/lib/atlasco/pki:ro" in SERVICES[name]["volumes"]
    # A named volume takes over its owner from the image's directory, which must exist.
    dockerfile = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    for name in ("pki", "warehouse"):
        assert re.search(rf"install --directory --owner=10001.*/var/lib/atlasco/{name}", dockerfile)


def test_certificates_script_runs_twice(tmp_path: Path) -> None:
    (script,) = SERVICES["pki"]["command"]
    here = script.replace("/var/lib/atlasco/pki", str(tmp_path))
    program = Path(sys.executable).parent
    path = {"PATH": f"{program}:/usr/bin:/bin"}
    authority = None
    for _ in range(2):
        subprocess.run(["/bin/sh", "-ec", here], check=True, capture_output=True, env=path, timeout=PATIENCE_S)
        content = (tmp_path / "ca.crt").read_bytes()
        assert authority in (None, content)
        authority = content
    for tool in ("simulate", "query"):
        told = " ".join([*SERVICES[tool].get("entrypoint", []), *SERVICES[tool]["command"]])
        for file in re.findall(r"/var/lib/atlasco/pki/(\S+)", told):
            assert (tmp_path / file).exists(), file


def test_drain_fits_into_the_grace_period() -> None:
    drain = seconds(environment("gateway")["ATLASCO_DRAIN_TIMEOUT"])
    assert seconds(SERVICES["gateway"]["stop_grace_period"]) >= 3 * drain + 1 + 8


def test_prometheus_scrapes_the_admin_ports() -> None:
    config = yaml.safe_load((REPOSITORY / "docker" / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = config["scrape_configs"]
    (names,) = job["dns_sd_configs"]
    for name in names["names"]:
        assert environment(name)["ATLASCO_ADMIN_LISTEN"] == f"0.0.0.0:{names['port']}"
    mounted = {volume.split(":")[1] for volume in SERVICES["prometheus"]["volumes"]}
    assert set(config["rule_files"]) <= mounted


def test_grafana_finds_data_source_and_dashboard() -> None:
    provisioning = REPOSITORY / "docker" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text("utf-8"))["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "atlasco.yml").read_text("utf-8"))["providers"]
    mounted = {volume.split(":")[1] for volume in SERVICES["grafana"]["volumes"]}
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home in mounted
    assert str(Path(home).parent) == provider["options"]["path"]


@pytest.mark.parametrize("script", ["primary.sh", "replica.sh"])
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", str(REPOSITORY / "docker" / "postgres" / script)], check=True)


def test_compose_itself_accepts_the_file() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker compose is not here: the file was checked by its structure only")
    subprocess.run([docker, "compose", "--file", str(FILE), "--profile", "*", "config", "--quiet"], check=True)
