"""What Terraform makes and what the manifests expect are the same names."""

import json
import re
import subprocess
import sys
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml
from psycopg.conninfo import conninfo_to_dict

from k8s.values_from_terraform import FROM_OUTPUTS, NAMESPACE, Unusable, render, replica_dsns, values_of
from storage.kafka import DEFAULT_TOPIC
from storage.loader.config import LoaderConfig
from tests.k8s.manifests import K8S, OVERLAYS, REPOSITORY, Manifests

TERRAFORM = REPOSITORY / "terraform"
SCRIPT = K8S / "values_from_terraform.py"
CHOSEN = {"image-tag", "trust-domain", "public-name"}

# Outputs in the form that `terraform output -json` has, without its wrapping.
OUTPUTS: dict[str, Any] = {
    "namespace": NAMESPACE,
    "repository_url": "123456789012.dkr.ecr.eu-west-1.amazonaws.com/atlasco-dev/telemetry",
    "region": "eu-west-1",
    "postgres_host": "db.example",
    "postgres_port": 5432,
    "postgres_database": "atlasco",
    "postgres_member_hosts": ["db-1.example", "db-2.example", "db-3.example"],
    "kafka_bootstrap_servers": "b-1.example:9098,b-2.example:9098",
    "kafka_partitions": 8,
    "kafka_replication_factor": 2,
    "settings": {"kafka": {"retention_hours": 72}},
    "warehouse_host": "warehouse.example",
    "warehouse_port": 5439,
    "warehouse_database": "atlasco",
    "warehouse_copy_role_arn": "arn:aws:iam::123456789012:role/copy",
    "staging_bucket": "staging",
    "secret_arns": {"postgres_owner": "arn:aws:secretsmanager:eu-west-1:123456789012:secret:rds!db-1"},
    "secret_names": {
        "postgres_ingest": "atlasco-dev/postgres/ingest",
        "postgres_query": "atlasco-dev/postgres/query",
        "postgres_relay": "atlasco-dev/postgres/relay",
        "postgres_loader": "atlasco-dev/postgres/loader",
        "postgres_rollup": "atlasco-dev/postgres/rollup",
        "warehouse_loader": "atlasco-dev/warehouse/loader",
        "warehouse_reader": "atlasco-dev/warehouse/reader",
    },
}


def text_of(path: str) -> str:
    return (TERRAFORM / path).read_text(encoding="utf-8")


def output_block(name: str) -> str:
    found = re.search(rf'^output "{name}" \{{\n(.*?)^\}}', text_of("outputs.tf"), re.MULTILINE | re.DOTALL)
    assert found, f"terraform has no output {name}"
    return found[1]


def data_of(overlay: str) -> dict[str, str]:
    data: dict[str, str] = yaml.safe_load((K8S / "overlays" / overlay / "values.yaml").read_text("utf-8"))["data"]
    return data


def test_every_output_that_is_read_exists() -> None:
    for name in OUTPUTS:
        output_block(name)
    for map_name in ("secret_arns", "secret_names"):
        block = output_block(map_name)
        for key in OUTPUTS[map_name]:
            assert re.search(rf"^\s+{key}\s*=", block, re.MULTILINE), f"{map_name} has no {key}"
    assert re.search(r"^\s+kafka\s*=\s*var\.kafka$", output_block("settings"), re.MULTILINE)
    assert re.search(r"retention_hours", text_of("variables.tf"))


def test_every_value_is_written_and_put_into_place() -> None:
    component = yaml.safe_load((K8S / "components" / "values" / "kustomization.yaml").read_text("utf-8"))
    placed = {entry["source"]["fieldPath"].removeprefix("data.") for entry in component["replacements"]}
    assert placed == FROM_OUTPUTS.keys() | CHOSEN
    for overlay in OVERLAYS:
        assert data_of(overlay).keys() == placed


def test_every_value_arrives(prod: Manifests) -> None:
    # Long ones are wrapped.
    text = " ".join(prod.text.split())
    for name, value in data_of("prod").items():
        assert value in text, name


def test_values_of_outputs() -> None:
    values = values_of(OUTPUTS)
    assert values["warehouse-address"] == "warehouse.example:5439/atlasco"
    assert values["kafka-retention"] == "72h"
    assert yaml.safe_load(render(values))["data"] == values


@pytest.mark.parametrize(
    "outputs",
    [
        pytest.param({**OUTPUTS, "namespace": "other"}, id="another namespace"),
        pytest.param({**OUTPUTS, "postgres_host": None}, id="nothing applied yet"),
        pytest.param({name: value for name, value in OUTPUTS.items() if name != "region"}, id="an output is missing"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(outputs: dict[str, Any]) -> None:
    with pytest.raises(Unusable):
        values_of(outputs)


@pytest.mark.parametrize(("tag", "code"), [("1.4.2", 0), ("3f9c2aa", 0), ("Release_1", 2), ("x" * 41, 2)])
def test_the_script(tag: str, code: int) -> None:
    arguments = ["--tag", tag, "--trust-domain", "telemetry.example", "--public-name", "telemetry.example"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        input=json.dumps({name: {"value": value} for name, value in OUTPUTS.items()}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    if code == 0:
        data = yaml.safe_load(done.stdout)["data"]
        assert data["image-tag"] == tag
        assert data.keys() == FROM_OUTPUTS.keys() | CHOSEN


def test_accounts_are_those_that_the_roles_are_bound_to(manifests: Manifests) -> None:
    block = re.search(r"workload_secrets = \{\n(.*?)\n  \}\n", text_of("modules/identities/workloads.tf"), re.DOTALL)
    assert block
    workloads = set(re.findall(r"^    ([a-z]+)\s*=\s*\[", block[1], re.MULTILINE))
    assert 'service_account = "atlasco-${workload}"' in text_of("modules/identities/main.tf")
    accounts = {account["metadata"]["name"] for account in manifests.of_kind("ServiceAccount")}
    assert accounts == {f"atlasco-{workload}" for workload in workloads}


def test_namespace_is_that_of_the_roles(manifests: Manifests) -> None:
    found = re.search(r'variable "namespace" \{.*?default\s*=\s*"([^"]+)"', text_of("variables.tf"), re.DOTALL)
    assert found and found[1] == NAMESPACE
    assert manifests.find("Namespace", NAMESPACE)


def test_kafka_names_are_the_programs() -> None:
    text = text_of("main.tf")
    assert f'changes_topic     = "{DEFAULT_TOPIC}"' in text
    assert f'dead_letter_topic = "{DEFAULT_TOPIC}.dead-letter"' in text
    assert f'consumer_group    = "{LoaderConfig().group}"' in text


def test_logins_are_those_of_the_secrets(manifests: Manifests) -> None:
    users = dict(re.findall(r'"postgres/([a-z]+)"\s*=\s*"([a-z_]+)"', text_of("main.tf")))
    migrate = manifests.config("atlasco-migrate")
    granted = {name.removeprefix("ATLASCO_GRANT_"): login for name, login in migrate.items() if "_GRANT_" in name}
    assert granted == {purpose.upper(): login for purpose, login in users.items()}
    for purpose in users:
        assert FROM_OUTPUTS[f"secret-postgres-{purpose}"](OUTPUTS) == f"atlasco-dev/postgres/{purpose}"


def hosts_in(dsns: str) -> list[list[str]]:
    """The hosts of each connection string, in libpq's order."""
    return [str(conninfo_to_dict(dsn.partition(" ")[2])["host"]).split(",") for dsn in dsns.split(";") if dsn]


@pytest.mark.parametrize("writer", ["db-1.example", "db-2.example", "db-3.example"])
def test_whoever_writes_each_standby_has_a_connection_string(writer: str) -> None:
    members = OUTPUTS["postgres_member_hosts"]
    # libpq takes the first that is a standby.
    found = [next(host for host in order if host != writer) for order in hosts_in(replica_dsns(members))]
    assert sorted(found) == sorted({*members} - {writer})


def test_a_cluster_that_is_being_repaired_has_one_standby() -> None:
    assert hosts_in(replica_dsns(["a", "b"])) == [["a", "b"]]
    assert hosts_in(replica_dsns(["a"])) == hosts_in(replica_dsns([])) == []


def test_one_database_has_no_replica_and_that_is_said() -> None:
    values = values_of({**OUTPUTS, "postgres_member_hosts": []})
    assert values["postgres-replica-dsns"] == ""


def test_the_warehouses_users_are_those_of_the_guide() -> None:
    users = dict(re.findall(r'"warehouse/([a-z]+)"\s*=\s*"([a-z_]+)"', text_of("main.tf")))
    guide = (REPOSITORY / "docs" / "deploy-aws.md").read_text(encoding="utf-8")
    queues = text_of("modules/warehouse/wlm.tf")
    for purpose, group in (("loader", "atlasco_load"), ("reader", "atlasco_read")):
        assert f"CREATE USER {users[purpose]} PASSWORD '<password of warehouse_{purpose}>' IN GROUP {group};" in guide
        assert f'"{group}"' in queues


def test_staging_is_where_the_loader_may_write(manifests: Manifests) -> None:
    prefix = manifests.config("atlasco-loader")["ATLASCO_REDSHIFT_STAGING"].split("/", 3)[3]
    assert f"${{var.staging.bucket_arn}}/{prefix}/*" in text_of("modules/identities/workloads.tf")


def test_networks_lie_within_the_policies(manifests: Manifests) -> None:
    allowed = {
        peer["ipBlock"]["cidr"]
        for policy in manifests.of_kind("NetworkPolicy")
        for rule in policy["spec"].get("egress", [])
        for peer in rule.get("to", [])
        if "ipBlock" in peer
    }
    assert "10.0.0.0/8" in allowed
    for overlay in OVERLAYS:
        found = re.search(r'vpc_cidr\s*=\s*"([0-9./]+)"', text_of(f"{overlay}.tfvars"))
        assert found and ip_network(found[1]).subnet_of(ip_network("10.0.0.0/8"))  # type: ignore[arg-type]


def test_controllers_accounts(prod: Manifests) -> None:
    # The store has no credentials of its own: the operator's account does, under this very name.
    assert "auth" not in prod.get("SecretStore", "aws-secrets-manager")["spec"]["provider"]["aws"]
    controllers = text_of("modules/identities/controllers.tf")
    documented = Path(REPOSITORY / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    for account in re.findall(r'service_account = "([a-z-]+)"', controllers):
        assert account in documented


def test_node_group_that_gateways_prefer_exists(prod: Manifests) -> None:
    affinity = prod.get("Deployment", "atlasco-gateway")["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    (preferred,) = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
    (expression,) = preferred["preference"]["matchExpressions"]
    assert f'"{expression["key"]}" = each.key' in text_of("modules/cluster/main.tf")
    for group in expression["values"]:
        assert re.search(rf"^    {group} = \{{", text_of("prod.tfvars"), re.MULTILINE)
