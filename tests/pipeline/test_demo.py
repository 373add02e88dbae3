"""The demo ends by itself, with an audit that holds."""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from demo.audit import Audit
from demo.stack import Stack
from device.fleet import FleetStatistics
from tests.pipeline.conftest import need_pipeline

COUNTED = ("sent", "resent", "acked", "rejected", "stored", "lost", "duplicated")


def test_the_demo_ends_with_nothing_lost_and_nothing_twice(stack: Stack) -> None:
    with TemporaryDirectory(prefix="atlasco-demo-") as directory:
        command = [sys.executable, "-m", "cli.main", "demo", "--duration", "8", "--devices", "30"]
        result = subprocess.run(
            [*command, "--data-dir", directory], capture_output=True, text=True, timeout=160, check=False
        )
        assert (Path(directory) / "logs" / "gateway.log").exists()
    assert result.returncode == 0, result.stderr
    closing = json.loads(result.stdout.splitlines()[-1])
    if closing["loaded"] is None:
        need_pipeline(result.stderr)
    assert set(COUNTED) <= closing.keys()
    assert {"readings_per_s", "ack_p50_ms", "ack_p99_ms"} <= closing.keys()
    assert closing["lost"] == closing["duplicated"] == 0
    assert closing["resent"] > 0
    assert closing["acked"] == closing["stored"] == closing["loaded"] > 0
    assert closing["published"] >= closing["loaded"]


def test_the_exit_code_tells_what_the_audit_found() -> None:
    from cli.demo import exit_code

    def code(*, lost: int = 0, duplicated: int = 0, resent: int = 5, unacked: int = 0) -> int:
        statistics = FleetStatistics(1, 10, resent, 10, 0, {}, 1, unacked, 1, 0, 1.0, 1.0, 1.0, 1.0)
        return exit_code(statistics, Audit(10, 10 - lost, 10, 10, lost, duplicated))

    assert code() == 0
    assert code(lost=1) == 1
    assert code(duplicated=1) == 1
    assert code(resent=0) == 1, "nothing was sent again: the demo showed nothing"
    assert code(unacked=1) == 1
