"""Alerts, dashboard and autoscaler ask for metrics that exist; each alert has a runbook."""

import json
import re
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from gateway.config import GatewayConfig
from runtime.metric_definitions import DEFINITIONS, MetricDefinition
from runtime.metrics import OpenTelemetryMetrics
from tests.k8s.manifests import K8S, REPOSITORY, Manifests, selects

RULES = K8S / "components" / "monitoring" / "rules.yaml"
DASHBOARD = K8S / "components" / "monitoring" / "dashboard.json"
RUNBOOKS = REPOSITORY / "docs" / "runbooks"
DOCKER = REPOSITORY / "docker"

# From kube-state-metrics, for the jobs, which have no port of their own.
FOREIGN = {"kube_cronjob_status_last_successful_time", "kube_job_status_failed"}
# Put on by Prometheus when it scrapes.
SCRAPED = {"pod", "instance", "job", "namespace", "component", "le"}


def exported(name: str, definition: MetricDefinition) -> set[str]:
    """The names under which Prometheus stores a metric."""
    if definition.kind == "counter":
        return {f"{name}_total"}
    if definition.kind == "histogram":
        return {f"{name}_bucket", f"{name}_sum", f"{name}_count"}
    return {name}


SERIES = {series: definition for name, definition in DEFINITIONS.items() for series in exported(name, definition)}


def groups(path: Path) -> list[dict[str, Any]]:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = document.get("spec", document)["groups"]
    return found


def alerts() -> list[dict[str, Any]]:
    return [rule for group in groups(RULES) for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def expressions() -> dict[str, str]:
    """Every expression there is, by where it stands."""
    found = {rule["alert"]: rule["expr"] for rule in alerts()}
    for panel in panels():
        for target in panel["targets"]:
            found[f"{panel['title']} {target['refId']}"] = target["expr"].replace("$__rate_interval", "1m")
    return found


@pytest.mark.parametrize("expression", [pytest.param(text, id=name) for name, text in expressions().items()])
def test_expression(expression: str) -> None:
    promql_parser.parse(expression)
    names = set(re.findall(r"\b((?:atlasco|kube)_[a-z0-9_]+)\b(?!\")", re.sub(r'"[^"]*"', '""', expression)))
    assert names
    assert names <= SERIES.keys() | FOREIGN
    labels = {label for name in names & SERIES.keys() for label in SERIES[name].labels}
    for grouping in re.findall(r"\bby \(([^)]*)\)", expression):
        given = {label.strip() for label in grouping.split(",")}
        assert given <= labels | SCRAPED | ({"job_name"} if names & FOREIGN else set())
    for name, matchers in re.findall(r"\b(atlasco_[a-z0-9_]+)\{([^}]*)\}", expression):
        for label, operator, value in re.findall(r"(\w+)(=~?)\"([^\"]+)\"", matchers):
            assert label in SERIES[name].labels, f"{name}: {label}"
            listed = SERIES[name].labels[label]
            asked = value.split("|") if operator == "=~" else [value]
            assert not listed or set(asked) <= set(listed), f"{name}: {label}{operator}{value}"


def test_series_are_named_as_the_process_exports_them() -> None:
    metrics = OpenTelemetryMetrics("test")
    try:
        metrics.gauge("atlasco_streams_open", lambda: 1.0)
        metrics.count("atlasco_tls_reloads", result="failed")
        metrics.observe("atlasco_ack_latency_seconds", 0.1)
        text = metrics.prometheus()[0].decode()
    finally:
        metrics.close()
    for series in (
        "atlasco_streams_open ",
        'atlasco_tls_reloads_total{result="failed"}',
        "atlasco_ack_latency_seconds_bucket{",
    ):
        assert f"\n{series}" in text


@pytest.mark.parametrize("rule", [pytest.param(rule, id=rule["alert"]) for rule in alerts()])
def test_alert_has_a_runbook(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"critical", "warning"}
    page = REPOSITORY / rule["annotations"]["runbook_url"]
    assert page == RUNBOOKS / f"{rule['alert']}.md"
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {rule['alert']}\n")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == ["Meaning", "Impact", "Diagnosis", "Mitigation"]
    assert rule["annotations"]["summary"] in " ".join(text.split())


def test_no_runbook_without_an_alert() -> None:
    pages = {page.stem for page in RUNBOOKS.glob("*.md")} - {"README"}
    assert pages == {rule["alert"] for rule in alerts()}
    index = (RUNBOOKS / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((\w+)\.md\)", index)) == pages


def test_links_between_runbooks_resolve() -> None:
    for page in RUNBOOKS.glob("*.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (RUNBOOKS / link).exists(), f"{page.name}: {link}"


def test_metrics_and_settings_in_runbooks_exist() -> None:
    from runtime.config import settings_of
    from tests.k8s.test_configuration import CONFIGS

    settings = {
        entry.env for configs in CONFIGS.values() for config in configs for entry in settings_of(config).values()
    }
    for page in RUNBOOKS.glob("Atlasco*.md"):
        text = page.read_text(encoding="utf-8")
        assert set(re.findall(r"\bATLASCO_[A-Z_]+\b", text)) <= settings, page.name
        for name in re.findall(r"\batlasco_(?!ingest\b|query\b|relay\b|loader\b)[a-z_]+\b", text):
            assert name in SERIES, f"{page.name}: {name}"


def test_limits_in_alerts_are_the_manifests(prod: Manifests) -> None:
    from tests.k8s.test_workloads import lanes_of_a_new_database

    rules = {rule["alert"]: rule["expr"] for rule in alerts()}
    assert f"0.9 * {prod.config('atlasco-gateway')['ATLASCO_MAX_STREAMS']}" in rules["AtlascoStreamsNearLimit"]
    assert f"< {lanes_of_a_new_database()}" in rules["AtlascoRelayLanesUnheld"]


def test_pods_are_scraped(prod: Manifests) -> None:
    monitor = prod.get("PodMonitor", "atlasco")["spec"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    scraped = {
        workload["metadata"]["name"]
        for workload, template in prod.workloads()
        if selects(monitor["selector"], template["metadata"]["labels"])
    }
    assert scraped == {item["metadata"]["name"] for item in prod.of_kind("Deployment")}
    for container in prod.containers():
        if container.workload["kind"] == "Deployment" and not container.init:
            assert endpoint["port"] in {port["name"] for port in container.spec["ports"]}


def test_autoscaler_metrics_come_from_the_adapter(prod: Manifests) -> None:
    path = K8S / "components" / "autoscale-on-streams" / "adapter-values.yaml"
    rules = {rule["name"]["as"]: rule for rule in yaml.safe_load(path.read_text(encoding="utf-8"))["rules"]["custom"]}
    asked = {
        metric["pods"]["metric"]["name"]: metric["pods"]["target"]
        for metric in prod.get("HorizontalPodAutoscaler", "atlasco-gateway")["spec"]["metrics"]
        if metric["type"] == "Pods"
    }
    assert asked.keys() == rules.keys()
    for rule in rules.values():
        found = re.match(r"(\w+)\{", rule["seriesQuery"])
        assert found and found[1] in SERIES
    # Below the limit by enough that the streams of a pod that goes fit into the others.
    streams = int(asked["atlasco_streams_open"]["averageValue"])
    assert streams <= int(prod.config("atlasco-gateway")["ATLASCO_MAX_STREAMS"]) * 2 / 3
    assert GatewayConfig(dsn="").max_streams >= streams


def test_dashboard_is_well_formed(prod: Manifests) -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    identifiers = [panel["id"] for panel in dashboard["panels"]]
    assert len(identifiers) == len(set(identifiers))
    for panel in panels():
        assert panel["description"]
        assert panel["datasource"]["uid"] == "${datasource}"
    shipped = prod.get("ConfigMap", "atlasco-dashboard")
    assert json.loads(shipped["data"]["atlasco.json"]) == dashboard
    assert shipped["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_compose_has_the_same_alerts() -> None:
    own = [group for group in groups(RULES) if not any(name in str(group) for name in FOREIGN)]
    assert groups(DOCKER / "prometheus" / "rules.yml") == own
