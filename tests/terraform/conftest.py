"""The terraform binary, its provider, and a copy of the configuration to work on.

The checkout stays clean: everything runs in a copy under pytest's temporary directory, with Terraform's
data directory, plugin cache and command line configuration beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_S

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGURATION = REPOSITORY / "terraform"

MIRROR_VARIABLE = "ATLASCO_TF_PLUGIN_MIRROR"
PROVIDER = "hashicorp/aws"

# What `terraform init` says when it looked for the provider and reached nobody.
UNREACHABLE = re.compile(
    r"could not connect|no such host|connection refused|timeout|failed to request discovery|proxyconnect|"
    r"Failed to query available provider packages|Failed to install provider",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Terraform:
    """The binary with an environment of its own; nothing of the caller's credentials or flags gets in."""

    binary: str
    environment: Mapping[str, str]

    def run(
        self, *arguments: str, cwd: Path, timeout: float = 170, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        completed = subprocess.run(
            [self.binary, *arguments],
            cwd=cwd,
            env=dict(self.environment),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and completed.returncode != 0:
            pytest.fail(
                f"terraform {' '.join(arguments)} exited with {completed.returncode}\n"
                f"{completed.stdout}\n{completed.stderr}",
                pytrace=False,
            )
        return completed

    def with_environment(self, **changes: str) -> Terraform:
        return Terraform(self.binary, {**self.environment, **changes})


def directories(path: Path) -> list[Path]:
    """What is in there, as far as it can be seen; processes come and go under /proc while we look."""
    if path in {Path("/proc"), Path("/sys"), Path("/dev")}:
        return []
    try:
        return sorted(child for child in path.iterdir() if child.is_dir())
    except OSError:
        return []


def mirror_root() -> Path | None:
    """The directory a filesystem mirror starts at: the parent of the one named after the registry.

    The environment variable may name either. Without it, a directory one or two levels below the root of
    the file system is looked for.
    """
    named = os.environ.get(MIRROR_VARIABLE)
    if named:
        path = Path(named)
        if (path / PROVIDER).is_dir():
            return path.parent
        if any((host / PROVIDER).is_dir() for host in path.glob("registry.*.io")):
            return path
        pytest.fail(f"{MIRROR_VARIABLE}={named} holds no {PROVIDER} provider", pytrace=False)
    top = directories(Path("/"))
    for parent in (*top, *(inner for outer in top for inner in directories(outer))):
        for directory in directories(parent):
            if fnmatch(directory.name, "registry.*.io") and (directory / PROVIDER).is_dir():
                return parent
    return None


def initialise(terraform: Terraform, root: Path) -> None:
    completed = terraform.run("init", "-backend=false", "-no-color", cwd=root, check=False)
    if completed.returncode == 0:
        return
    output = completed.stdout + completed.stderr
    if mirror_root() is None and UNREACHABLE.search(output):
        pytest.skip(
            f"neither a provider mirror nor the registry is reachable: set {MIRROR_VARIABLE} to a directory "
            "made by `terraform providers mirror`, or allow access to the registry"
        )
    pytest.fail(f"terraform init failed\n{output}", pytrace=False)


def copy_configuration(destination: Path) -> Path:
    """A copy without what an operator's own runs leave behind."""
    copy = destination / "terraform"
    shutil.copytree(
        CONFIGURATION, copy, ignore=shutil.ignore_patterns(".terraform*", "*.tfstate*", "*.tfplan", "backend.hcl")
    )
    return copy


@dataclass(frozen=True)
class Apply:
    """An apply that runs while other tests do: most of it is the provider waiting for the service."""

    terraform: Terraform
    root: Path
    endpoint: str
    process: subprocess.Popen[bytes]
    log: Path

    def finish(self) -> None:
        """Return when the apply has ended well; fail the test with its log otherwise."""
        if self.process.wait(timeout=170) != 0:
            pytest.fail(f"terraform apply failed\n{self.log.read_text(encoding='utf-8')}", pytrace=False)

    def outputs(self) -> dict[str, object]:
        printed = json.loads(self.terraform.run("output", "-json", cwd=self.root).stdout)
        return {name: output["value"] for name, output in printed.items()}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "terraform: needs the terraform binary and the AWS provider, from a mirror "
        f"({MIRROR_VARIABLE}) or the public registry",
    )


@pytest.fixture(scope="session")
def terraform(tmp_path_factory: pytest.TempPathFactory) -> Terraform:
    binary = shutil.which("terraform")
    if binary is None:
        pytest.skip("terraform is not on PATH; install version 1.11 or newer to run these checks")
    home = tmp_path_factory.mktemp("terraform-home")
    mirror = mirror_root()
    if mirror is None:
        installation = "  direct {}\n"
    else:
        installation = (
            f'  filesystem_mirror {{\n    path    = {json.dumps(str(mirror))}\n    include = ["{PROVIDER}"]\n  }}\n'
        )
    configuration = home / "terraform.rc"
    configuration.write_text(f"provider_installation {{\n{installation}}}\n", encoding="utf-8")
    cache = home / "plugins"
    cache.mkdir()
    kept = ("PATH", "TMPDIR", "LANG", "HTTPS_PROXY", "HTTP_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {
        "HOME": str(home),
        "TF_CLI_CONFIG_FILE": str(configuration),
        "TF_IN_AUTOMATION": "1",
        "TF_INPUT": "0",
        "CHECKPOINT_DISABLE": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    if mirror is None:
        # Every root would download the provider again.
        environment["TF_PLUGIN_CACHE_DIR"] = str(cache)
    return Terraform(binary, environment)


@pytest.fixture(scope="session")
def platform(terraform: Terraform, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The platform's root module, initialised."""
    root = copy_configuration(tmp_path_factory.mktemp("platform"))
    initialise(terraform, root)
    return root


@pytest.fixture(scope="session")
def aws_imitation() -> Iterator[str]:
    """An in-memory AWS on the loopback interface, in a process of its own."""
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
        # The database's monitoring role attaches one of AWS's own policies.
        env={**os.environ, "MOTO_IAM_LOAD_MANAGED_POLICIES": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stderr is not None
        said: list[str] = []
        address = None
        for line in server.stderr:
            said.append(line)
            if found := re.search(r"Running on (http://127\.0\.0\.1:\d+)", line):
                address = found[1]
                break
        if address is None:
            pytest.fail("the imitation of AWS did not start\n" + "".join(said), pytrace=False)
        # The request log would fill the pipe and stop the server.
        drain = subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
        try:
            yield address
        finally:
            server.terminate()
            server.wait(timeout=PATIENCE_S)
            drain.wait(timeout=PATIENCE_S)


@pytest.fixture(scope="session")
def started_apply(
    terraform: Terraform, aws_imitation: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Apply]:
    directory = tmp_path_factory.mktemp("apply")
    root = copy_configuration(directory) / "tests" / "moto"
    initialise(terraform, root)
    local = terraform.with_environment(AWS_ENDPOINT_URL=aws_imitation)
    log = directory / "apply.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [local.binary, "apply", "-auto-approve", "-no-color", "-parallelism=30"],
            cwd=root,
            env=dict(local.environment),
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Apply(local, root, aws_imitation, process, log)
    finally:
        if process.poll() is None:
            # The provider is a child of its own; the whole group has to go.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=PATIENCE_S)


@pytest.fixture(scope="session", autouse=True)
def _apply_while_others_run(request: pytest.FixtureRequest) -> None:
    """Start the apply with the first test here if any test is going to ask for it."""
    wanted = any("applied" in getattr(item, "fixturenames", ()) for item in request.session.items)
    if wanted:
        # Where it cannot start, the tests that need it say so; the others are none the worse.
        with contextlib.suppress(pytest.skip.Exception, pytest.fail.Exception):
            request.getfixturevalue("started_apply")


@pytest.fixture(scope="session")
def applied(started_apply: Apply) -> Apply:
    started_apply.finish()
    return started_apply
