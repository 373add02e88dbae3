"""The manifests as kubectl renders them, and ways to find one's way in them."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
K8S = REPOSITORY / "k8s"
OVERLAYS = ("dev", "prod")
COMPONENTS = tuple(sorted(path.name for path in (K8S / "components").iterdir() if path.is_dir()))
NAMESPACE = "atlasco"

Manifest: TypeAlias = dict[str, Any]

_COMMAND = re.compile(r"\batlasco ([a-z]+)")


def kustomize(directory: Path) -> str:
    """What `kubectl kustomize` prints. Skips the test where there is no kubectl."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not on PATH; install it to check the manifests")
    done = subprocess.run([kubectl, "kustomize", str(directory)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Deprecated fields are reported on standard error.
    assert done.stderr == ""
    return done.stdout


def base_with(component: str, directory: Path) -> Path:
    """A kustomization, made in `directory`, of the base and one component."""
    base, part, values = (
        os.path.relpath(path, directory.resolve())
        for path in (K8S / "base", K8S / "components" / component, K8S / "overlays" / "prod" / "values.yaml")
    )
    (directory / "values.yaml").write_text((directory / values).read_text(encoding="utf-8"), encoding="utf-8")
    (directory / "kustomization.yaml").write_text(
        f"resources: [{base}, values.yaml]\ncomponents: [{part}]\n", encoding="utf-8"
    )
    return directory


@dataclass(frozen=True)
class Container:
    """A container, with the workload and the pod it is in."""

    workload: Manifest
    pod: Manifest
    spec: Manifest
    init: bool

    @property
    def name(self) -> str:
        return f"{self.workload['kind']}/{self.workload['metadata']['name']}/{self.spec['name']}"

    @property
    def atlasco_command(self) -> str | None:
        """The subcommand it runs; None for one that runs something else."""
        if "command" not in self.spec:
            return str(self.spec["args"][0])
        found = _COMMAND.search(" ".join([*self.spec["command"], *self.spec.get("args", [])]))
        return found[1] if found else None


class Manifests:
    """The objects of one rendered kustomization."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.text = text
        self.objects: list[Manifest] = list(yaml.safe_load_all(text))

    def of_kind(self, *kinds: str) -> list[Manifest]:
        return [item for item in self.objects if item["kind"] in kinds]

    def find(self, kind: str, name: str) -> Manifest | None:
        for item in self.of_kind(kind):
            if item["metadata"]["name"] == name:
                return item
        return None

    def get(self, kind: str, name: str) -> Manifest:
        found = self.find(kind, name)
        assert found is not None, f"{self.name} has no {kind} {name}"
        return found

    def config(self, name: str) -> dict[str, str]:
        """A generated ConfigMap's data, by its name without the hash."""
        (found,) = [
            item
            for item in self.of_kind("ConfigMap")
            if re.fullmatch(rf"{re.escape(name)}(-[a-z0-9]{{10}})?", item["metadata"]["name"])
        ]
        data: dict[str, str] = found["data"]
        return data

    def workloads(self) -> Iterator[tuple[Manifest, Manifest]]:
        """Everything that makes pods, each with its pod template."""
        for item in self.of_kind("Deployment", "Job"):
            yield item, item["spec"]["template"]
        for item in self.of_kind("CronJob"):
            yield item, item["spec"]["jobTemplate"]["spec"]["template"]

    def containers(self) -> Iterator[Container]:
        for workload, template in self.workloads():
            pod = template["spec"]
            for spec in pod.get("initContainers", []):
                yield Container(workload, pod, spec, init=True)
            for spec in pod["containers"]:
                yield Container(workload, pod, spec, init=False)

    def environment(self, container: Container) -> dict[str, str]:
        """The container's variables; those from secrets as `secret:<name>/<key>`.

        `$(NAME)` becomes what the kubelet puts in: a variable that stands before it in `env`, and none of `envFrom`.
        """
        variables: dict[str, str] = {}
        before: dict[str, str] = {}
        for source in container.spec.get("envFrom", []):
            variables |= self.get("ConfigMap", source["configMapRef"]["name"])["data"]
        for entry in container.spec.get("env", []):
            if "value" in entry:
                before[entry["name"]] = re.sub(
                    r"\$\((\w+)\)", lambda found: before.get(found[1], found[0]), entry["value"]
                )
            else:
                key = entry["valueFrom"]["secretKeyRef"]
                before[entry["name"]] = f"secret:{key['name']}/{key['key']}"
        return variables | before


def seconds(text: str) -> float:
    """A duration as the program reads it."""
    from runtime.config import duration

    return duration(text)


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    """Whether a label selector, of either form, selects these labels."""
    wanted = selector.get("matchLabels", {} if "matchExpressions" in selector else selector)
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return all(labels.get(key) == value for key, value in wanted.items())
