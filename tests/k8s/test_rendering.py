"""Every overlay and component renders, fits the schema, and is what the rendered files hold."""

import re
from pathlib import Path

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from tests.k8s.manifests import COMPONENTS, K8S, OVERLAYS, REPOSITORY, Manifest, Manifests, base_with, kustomize

# What each kind that Kubernetes does not know must hold, and in which version.
CUSTOM = {
    "SecretStore": ("external-secrets.io/v1", {"provider"}),
    "ExternalSecret": ("external-secrets.io/v1", {"secretStoreRef", "target", "data", "refreshInterval"}),
    "Certificate": ("cert-manager.io/v1", {"secretName", "issuerRef", "dnsNames", "privateKey"}),
    "PodMonitor": ("monitoring.coreos.com/v1", {"selector", "podMetricsEndpoints"}),
    "PrometheusRule": ("monitoring.coreos.com/v1", {"groups"}),
}
# The components that bring custom resources; docs/kubernetes.md lists the controllers they need.
BRING_CUSTOM = {"certificates", "external-secrets", "monitoring"}


def cluster_version() -> str:
    """The version that Terraform gives the cluster."""
    text = (REPOSITORY / "terraform" / "variables.tf").read_text(encoding="utf-8")
    found = re.search(r'variable "cluster" \{.*?version\s*=\s*optional\(string, "([0-9.]+)"\)', text, re.DOTALL)
    assert found
    return found[1]


def check_schema(item: Manifest) -> None:
    if item["kind"] in CUSTOM:
        version, fields = CUSTOM[item["kind"]]
        assert item["apiVersion"] == version
        assert fields <= item["spec"].keys()
    else:
        # Strict: a misspelt field, which a server would drop in silence, is an error.
        kubernetes_validate.validate(item, cluster_version(), strict=True)


def test_overlay_fits_the_schema(manifests: Manifests) -> None:
    for item in manifests.objects:
        check_schema(item)


@pytest.mark.parametrize("component", COMPONENTS)
def test_each_component_alone(component: str, tmp_path: Path) -> None:
    rendered = Manifests(component, kustomize(base_with(component, tmp_path)))
    for item in rendered.objects:
        check_schema(item)
    custom = {item["kind"] for item in rendered.objects} & CUSTOM.keys()
    assert bool(custom) == (component in BRING_CUSTOM)


def test_base_needs_no_custom_resource() -> None:
    rendered = Manifests("base", kustomize(K8S / "base"))
    assert not rendered.of_kind(*CUSTOM)
    for item in rendered.objects:
        check_schema(item)


def test_dev_needs_no_custom_resource() -> None:
    assert not Manifests("dev", kustomize(K8S / "overlays" / "dev")).of_kind(*CUSTOM)


def test_schema_check_is_strict(prod: Manifests) -> None:
    broken = yaml.safe_load(yaml.safe_dump(prod.get("Deployment", "atlasco-gateway")))
    broken["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        check_schema(broken)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_rendered_file_is_the_overlay(overlay: str) -> None:
    file = K8S / "rendered" / f"{overlay}.yaml"
    assert file.read_text(encoding="utf-8") == kustomize(K8S / "overlays" / overlay), (
        f"run: kubectl kustomize k8s/overlays/{overlay} > k8s/rendered/{overlay}.yaml"
    )


def test_everything_is_in_the_one_namespace(manifests: Manifests) -> None:
    for item in manifests.objects:
        if item["kind"] in {"Namespace", "PriorityClass"}:
            assert "namespace" not in item["metadata"]
        else:
            assert item["metadata"]["namespace"] == "atlasco"


def test_no_placeholder_is_left(manifests: Manifests) -> None:
    assert ".invalid" not in manifests.text


def test_no_deprecated_kustomize_field() -> None:
    for file in K8S.rglob("kustomization.yaml"):
        fields = yaml.safe_load(file.read_text(encoding="utf-8")).keys()
        assert not fields & {"commonLabels", "patchesStrategicMerge", "patchesJson6902", "bases", "vars"}, file


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_values_come_last(overlay: str) -> None:
    kustomization = yaml.safe_load((K8S / "overlays" / overlay / "kustomization.yaml").read_text(encoding="utf-8"))
    assert kustomization["components"][-1] == "../../components/values"


def test_sleep_hook_for_older_clusters(tmp_path: Path) -> None:
    older = Manifests("prestop-exec", kustomize(base_with("prestop-exec", tmp_path)))
    newer = Manifests("base", kustomize(K8S / "base"))

    def hook(rendered: Manifests) -> Manifest:
        pod = rendered.get("Deployment", "atlasco-gateway")["spec"]["template"]["spec"]
        found: Manifest = pod["containers"][0]["lifecycle"]["preStop"]
        return found

    assert hook(older) == {"exec": {"command": ["/bin/sleep", str(hook(newer)["sleep"]["seconds"])]}}
