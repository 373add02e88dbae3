"""The parts fit each other: probes and ports, selectors and labels, accounts, volumes, times."""

import argparse
import re

import pytest

from runtime.config import load_settings
from tests.k8s.manifests import Manifests, seconds, selects

# After the lanes: the last push of metrics, which runtime.metrics bounds.
METRICS_CLOSE_S = 8
PORT_CLOSE_S = 1
# What AWS documents for a provisioned cluster: connections, and slots of all queues together.
REDSHIFT_CONNECTIONS = 500
REDSHIFT_SLOTS = 50


def ports_of(container: dict[str, object]) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container.get("ports", [])}  # type: ignore[attr-defined]


def test_long_running_containers_have_probes_on_real_ports(manifests: Manifests) -> None:
    for container in manifests.containers():
        if container.workload["kind"] != "Deployment" or container.init:
            continue
        environment = manifests.environment(container)
        ports = ports_of(container.spec)
        assert ports["admin"] == int(environment["ATLASCO_ADMIN_LISTEN"].rpartition(":")[2])
        # Loopback would be out of the kubelet's reach.
        assert environment["ATLASCO_ADMIN_LISTEN"].startswith("0.0.0.0:")
        for probe, path in (("startupProbe", "/livez"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")):
            asked = container.spec[probe]["httpGet"]
            assert asked["path"] == path, container.name
            assert asked["port"] in ports, container.name


def test_admin_paths_are_the_programs() -> None:
    from runtime import admin

    assert admin.__doc__ and "/livez" in admin.__doc__ and "/readyz" in admin.__doc__
    # A readiness probe waits longer than a check may take.
    assert admin.CHECK_TIMEOUT_S < 3


def test_gateway_listens_where_the_services_point(manifests: Manifests) -> None:
    (gateway,) = [c for c in manifests.containers() if c.name == "Deployment/atlasco-gateway/gateway"]
    ports = ports_of(gateway.spec)
    assert ports["grpc"] == int(manifests.environment(gateway)["ATLASCO_LISTEN"].rpartition(":")[2])
    labels = gateway.workload["spec"]["template"]["metadata"]["labels"]
    services = manifests.of_kind("Service")
    assert {service["metadata"]["name"] for service in services} == {"atlasco-gateway", "atlasco-gateway-public"}
    for service in services:
        assert selects(service["spec"]["selector"], labels)
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in ports
            # The admin port is nobody's service.
            assert port["targetPort"] != "admin"


def test_load_balancer_passes_tls_through_and_asks_the_admin_port(manifests: Manifests) -> None:
    service = manifests.get("Service", "atlasco-gateway-public")
    prefix = "service.beta.kubernetes.io/aws-load-balancer-"
    notes = {key.removeprefix(prefix): value for key, value in service["metadata"]["annotations"].items()}
    assert service["spec"]["loadBalancerClass"] == "service.k8s.aws/nlb"
    assert service["spec"]["allocateLoadBalancerNodePorts"] is False
    assert notes["nlb-target-type"] == "ip"
    assert not any(key.startswith("ssl-") for key in notes)
    assert notes["healthcheck-port"] == manifests.config("atlasco-platform")["ATLASCO_ADMIN_LISTEN"].rpartition(":")[2]
    assert notes["healthcheck-path"] == "/readyz"
    (port,) = service["spec"]["ports"]
    idle = int(notes[f"listener-attributes.TCP-{port['port']}"].removeprefix("tcp.idle_timeout.seconds="))
    # Within what the load balancer takes, and above the gateway's ping of every connection.
    from gateway.server import server_options

    assert 60 <= idle <= 6000
    assert idle * 1000 > 2 * dict(server_options())["grpc.keepalive_time_ms"]
    targets = dict(pair.split("=") for pair in notes["target-group-attributes"].split(","))
    grace = manifests.get("Deployment", "atlasco-gateway")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert int(targets["deregistration_delay.timeout_seconds"]) > grace
    assert targets["deregistration_delay.connection_termination.enabled"] == "false"
    assert targets["preserve_client_ip.enabled"] == "false"
    namespace = manifests.get("Namespace", "atlasco")
    assert namespace["metadata"]["labels"]["elbv2.k8s.aws/pod-readiness-gate-inject"] == "enabled"


def test_gateway_drain_fits_into_the_grace_period(manifests: Manifests) -> None:
    (gateway,) = [c for c in manifests.containers() if c.name == "Deployment/atlasco-gateway/gateway"]
    drain = seconds(manifests.environment(gateway)["ATLASCO_DRAIN_TIMEOUT"])
    pause = gateway.spec["lifecycle"]["preStop"]["sleep"]["seconds"]
    # gateway.server: streams have twice the drain time, the port a second, the lanes the drain time once more.
    total = pause + 2 * drain + PORT_CLOSE_S + drain + METRICS_CLOSE_S
    assert gateway.pod["terminationGracePeriodSeconds"] >= total + 10
    # The load balancer has noticed by then: two failed checks of ten seconds and its own propagation.
    assert pause >= 60


def test_relay_and_loader_end_within_the_grace_period(manifests: Manifests) -> None:
    from storage.loader.config import LoaderConfig
    from storage.relay.config import RelayConfig

    relay = RelayConfig(dsn="host=x")
    pod = manifests.get("Deployment", "atlasco-relay")["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > relay.lease_s * 2 / 3 + relay.delivery_timeout_s + METRICS_CLOSE_S
    pod = manifests.get("Deployment", "atlasco-loader")["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= 2 * LoaderConfig().age_s + METRICS_CLOSE_S


def test_startup_probe_outlasts_the_programs_own_patience(manifests: Manifests) -> None:
    (gateway,) = [c for c in manifests.containers() if c.name == "Deployment/atlasco-gateway/gateway"]
    probe = gateway.spec["startupProbe"]
    # The schema check and four pools, 30 s each, after which the gateway ends by itself and says why.
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 5 * 30


def test_selectors_select(manifests: Manifests) -> None:
    templates = {
        workload["metadata"]["name"]: template["metadata"]["labels"] for workload, template in manifests.workloads()
    }
    for deployment in manifests.of_kind("Deployment"):
        name = deployment["metadata"]["name"]
        selector = deployment["spec"]["selector"]
        # Its own pods, and no other workload's.
        assert [found for found, labels in templates.items() if selects(selector, labels)] == [name]
        for constraint in deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]:
            assert selects(constraint["labelSelector"], templates[name])
    for budget in manifests.of_kind("PodDisruptionBudget"):
        chosen = [found for found, labels in templates.items() if selects(budget["spec"]["selector"], labels)]
        assert chosen == [budget["metadata"]["name"]]
    assert len(manifests.of_kind("PodDisruptionBudget")) == len(manifests.of_kind("Deployment"))


def test_network_policies_name_real_pods_and_ports(manifests: Manifests) -> None:
    policies = manifests.of_kind("NetworkPolicy")
    listening = {
        port["containerPort"] for container in manifests.containers() for port in container.spec.get("ports", [])
    }
    (deny,) = [policy for policy in policies if policy["metadata"]["name"] == "default-deny"]
    assert deny["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    templates = [template["metadata"]["labels"] for _, template in manifests.workloads()]
    for policy in policies:
        assert any(selects(policy["spec"]["podSelector"], labels) for labels in templates), policy["metadata"]["name"]
        for rule in policy["spec"].get("ingress", []):
            assert {port["port"] for port in rule["ports"]} <= listening
    outgoing = {
        port["port"] for policy in policies for rule in policy["spec"].get("egress", []) for port in rule["ports"]
    }
    assert {53, int(manifests.config("atlasco-platform")["PGPORT"])} <= outgoing
    brokers = manifests.config("atlasco-kafka")["KAFKA_BOOTSTRAP_SERVERS"].split(",")
    assert {int(broker.rpartition(":")[2]) for broker in brokers} <= outgoing


# Who may call whom: ports of the VPC's services, by component. What is not here must not be reachable.
REACHES = {
    "gateway": {5432, 5439},
    "relay": {5432, 9098},
    "loader": {5432, 9098, 5439},
    "rollup": {5432},
    "migrate": {5432},
    "maintain": {5432},
}


def test_each_component_reaches_what_it_needs_and_no_more(manifests: Manifests) -> None:
    found: dict[str, set[int]] = {}
    for _, template in manifests.workloads():
        labels = template["metadata"]["labels"]
        found[labels["app.kubernetes.io/component"]] = {
            port["port"]
            for policy in manifests.of_kind("NetworkPolicy")
            if selects(policy["spec"]["podSelector"], labels) and "Egress" in policy["spec"]["policyTypes"]
            for rule in policy["spec"].get("egress", [])
            if {"ipBlock": {"cidr": "10.0.0.0/8"}} in rule["to"]
            for port in rule["ports"]
        }
    assert found == REACHES


def test_metrics_of_every_deployment_can_be_scraped(manifests: Manifests) -> None:
    (policy,) = [item for item in manifests.of_kind("NetworkPolicy") if item["metadata"]["name"] == "metrics"]
    for _, template in manifests.workloads():
        assert selects(policy["spec"]["podSelector"], template["metadata"]["labels"])


def test_accounts_are_declared_and_hold_no_token(manifests: Manifests) -> None:
    accounts = {account["metadata"]["name"]: account for account in manifests.of_kind("ServiceAccount")}
    for account in accounts.values():
        assert account["automountServiceAccountToken"] is False
    used = [template["spec"]["serviceAccountName"] for _, template in manifests.workloads()]
    assert set(used) <= accounts.keys()
    # One each: an account of two workloads would have the rights of both.
    assert len(used) == len(set(used))
    assert accounts.keys() == set(used)


def test_volumes_are_mounted_and_mounts_have_volumes(manifests: Manifests) -> None:
    for workload, template in manifests.workloads():
        pod = template["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        mounted = {
            mount["name"]
            for spec in (*pod.get("initContainers", []), *pod["containers"])
            for mount in spec["volumeMounts"]
        }
        assert volumes == mounted, workload["metadata"]["name"]


def test_files_named_by_settings_are_mounted(manifests: Manifests) -> None:
    for container in manifests.containers():
        mounts = [mount["mountPath"] for mount in container.spec["volumeMounts"]]
        for name, value in manifests.environment(container).items():
            if value.startswith("/etc/") and not name.startswith("secret:"):
                assert any(value.startswith(path + "/") for path in mounts), f"{container.name}: {name}={value}"


def test_every_image_is_the_one_image(manifests: Manifests) -> None:
    values = manifests_values(manifests.name)
    images = {container.spec["image"] for container in manifests.containers()}
    assert images == {f"{values['image-repository']}:{values['image-tag']}"}


def manifests_values(overlay: str) -> dict[str, str]:
    import yaml

    from tests.k8s.manifests import K8S

    data: dict[str, str] = yaml.safe_load((K8S / "overlays" / overlay / "values.yaml").read_text("utf-8"))["data"]
    return data


def test_migration_job_is_named_for_its_release(manifests: Manifests) -> None:
    (job,) = manifests.of_kind("Job")
    assert job["metadata"]["name"] == f"atlasco-migrate-{manifests_values(manifests.name)['image-tag']}"
    # Nothing with a hash in its name may be in a template that cannot change.
    named = re.findall(r"atlasco-[a-z]+-[a-z0-9]{10}\b", str(job["spec"]))
    assert named == []
    assert job["spec"]["ttlSecondsAfterFinished"] > 0


def test_everything_that_needs_the_schema_waits_for_it(manifests: Manifests) -> None:
    for deployment in manifests.of_kind("Deployment"):
        first = deployment["spec"]["template"]["spec"]["initContainers"][0]
        assert "until atlasco migrate --check" in first["args"][0]
    (job,) = manifests.of_kind("Job")
    assert job["spec"]["activeDeadlineSeconds"] >= 1800


def test_migration_and_platform_agree_on_the_database(manifests: Manifests) -> None:
    platform, migrate = manifests.config("atlasco-platform"), manifests.config("atlasco-migrate")
    for name in ("PGHOST", "PGPORT", "PGDATABASE", "PGSSLMODE", "PGSSLROOTCERT"):
        assert platform[name] == migrate[name]
    assert platform["PGSSLMODE"] == "verify-full"


def test_autoscaler_owns_the_gateways(manifests: Manifests) -> None:
    autoscaler = manifests.get("HorizontalPodAutoscaler", "atlasco-gateway")["spec"]
    gateway = manifests.get("Deployment", "atlasco-gateway")
    assert autoscaler["scaleTargetRef"]["name"] == "atlasco-gateway"
    assert "replicas" not in gateway["spec"]
    metrics = {metric["type"]: metric for metric in autoscaler["metrics"]}
    # The fallback that needs no adapter is always there.
    assert metrics["Resource"]["resource"]["name"] == "cpu"
    age = seconds(manifests.config("atlasco-gateway")["ATLASCO_MAX_STREAM_AGE"])
    assert autoscaler["behavior"]["scaleDown"]["stabilizationWindowSeconds"] >= age


def test_streams_fit_into_the_memory(manifests: Manifests) -> None:
    (gateway,) = [c for c in manifests.containers() if c.name == "Deployment/atlasco-gateway/gateway"]
    streams = int(manifests.environment(gateway)["ATLASCO_MAX_STREAMS"])
    limit = int(gateway.spec["resources"]["limits"]["memory"].removesuffix("Gi")) << 30
    # What the benchmark measured for an idle stream; half of the limit stays for queues, queries and the process.
    assert streams * 43 * 1024 <= limit / 2


def lanes_of_a_new_database() -> int:
    from importlib import resources

    schema = resources.files("storage").joinpath("sql", "schema.sql").read_text("utf-8")
    found = re.search(r"\blanes\s+smallint NOT NULL DEFAULT (\d+)", schema)
    assert found
    return int(found[1])


class Connections:
    """What the pools of one overlay may hold at the most."""

    def __init__(self, overlay: str) -> None:
        from gateway.config import GatewayConfig
        from tests.k8s.manifests import K8S, REPOSITORY, kustomize

        manifests = Manifests(overlay, kustomize(K8S / "overlays" / overlay))
        text = (REPOSITORY / "terraform" / f"{overlay}.tfvars").read_text(encoding="utf-8")

        def value(name: str, otherwise: int = 0) -> int:
            found = re.search(rf"\b{name}\s*=\s*(\d+)", text)
            return int(found[1]) if found else otherwise

        (gateway,) = [c for c in manifests.containers() if c.name == "Deployment/atlasco-gateway/gateway"]
        config = load_settings(GatewayConfig, argparse.Namespace(), manifests.environment(gateway))
        self.allowed = value("max_connections")
        # One more during a rollout.
        self.gateways = manifests.get("HorizontalPodAutoscaler", "atlasco-gateway")["spec"]["maxReplicas"] + 1
        # In each pod the heartbeat, and before it starts the schema check.
        own = config.registry_connections + config.unary_connections + config.query_connections + 2
        self.of_a_gateway = lanes_of_a_new_database() + own

        def replicas(name: str) -> int:
            count: int = manifests.get("Deployment", f"atlasco-{name}")["spec"]["replicas"]
            return count

        # A relay's pool has 8; a loader and a rollup worker keep a few; jobs and operators have a dozen.
        self.others = replicas("relay") * 8 + (replicas("loader") + replicas("rollup")) * 4 + 12
        # With the probe's.
        self.of_a_replica = config.replica_connections + 1
        self.replicas = len(config.replicas)
        self.warehouse_queries = self.gateways * config.warehouse_queries
        # Each query, what cancels it, and the measurement.
        self.of_the_warehouse = self.gateways * (2 * config.warehouse_queries + 1) + replicas("loader") * 2 + 12
        self.scaling_clusters = value("concurrency_scaling_max")


@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_connections_fit_into_the_primary(overlay: str) -> None:
    found = Connections(overlay)
    now = found.gateways * found.of_a_gateway + found.others
    # A standby that becomes the primary keeps the connections that read from it, until the pools replace them.
    left_over = found.gateways * found.of_a_replica if found.replicas else 0
    assert now + left_over <= 0.95 * found.allowed


@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_connections_fit_into_a_standby(overlay: str) -> None:
    """One parameter group for all members; while one is away the other has the pools of both."""
    found = Connections(overlay)
    assert found.gateways * found.of_a_replica * found.replicas <= 0.95 * found.allowed


@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_connections_and_queries_fit_into_the_warehouse(overlay: str) -> None:
    found = Connections(overlay)
    assert found.of_the_warehouse <= 0.95 * REDSHIFT_CONNECTIONS
    # The main cluster's slots and those of the clusters that concurrency scaling may add. Automatic workload management
    # may give fewer: then queries wait in Redshift's queue, and the gateway's time limit ends them.
    assert found.warehouse_queries <= REDSHIFT_SLOTS * (1 + found.scaling_clusters)
