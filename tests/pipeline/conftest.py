"""The whole stack as the demo starts it, once for the tests of this folder."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from demo.stack import Stack

Run = Callable[..., subprocess.CompletedProcess[str]]


def need_pipeline(missing: str) -> None:
    """Skip a test that needs Kafka on a machine that cannot run it; in CI that is a failure."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"Kafka could not be started: {missing}")
    pytest.skip(missing)


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    # Not below pytest's own folder, which the account that runs PostgreSQL cannot enter.
    with TemporaryDirectory(prefix="atlasco-pipeline-") as directory, Stack(Path(directory), progress=print) as stack:
        if stack.pipeline is None:
            need_pipeline(stack.missing)
        yield stack


@pytest.fixture(scope="session")
def atlasco(stack: Stack) -> Run:
    """Runs an `atlasco` command against the stack."""
    assert stack.pipeline is not None
    environment = {
        **os.environ,
        "ATLASCO_DSN": stack.dsn,
        "ATLASCO_TARGET": stack.target,
        "KAFKA_BOOTSTRAP_SERVERS": stack.pipeline.kafka.bootstrap_servers,
        "ATLASCO_WAREHOUSE_DIR": str(stack.data_dir / "warehouse"),
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cli.main", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)

    return run
