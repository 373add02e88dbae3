"""The demo ends by itself, with an audit that holds, and leaves nothing behind; then it goes on where it was."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psycopg
import pytest

from cli.demo import exit_code
from demo.audit import Audit
from demo.databases import DATABASE
from demo.questions import TIERS, QueryFigures, Questions, TierFigures
from demo.stack import Stack
from device.fleet import FleetStatistics
from embedded.postgres import EmbeddedPostgres
from tests.pipeline.conftest import need_pipeline
from tests.waiting import PATIENCE_S, until

COUNTED = ("sent", "resent", "acked", "rejected", "stored", "lost", "duplicated", "checked", "dishonest")


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    # Not below pytest's own folder, which the account that runs PostgreSQL cannot enter.
    with TemporaryDirectory(prefix="atlasco-demo-") as name:
        yield Path(name)


def command(directory: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "cli.main", "demo", "--devices", "30", "--data-dir", str(directory), *arguments]


def left_behind(directory: Path) -> list[str]:
    """Command lines of processes that work in the demo's directory, or were told of it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            where = str((entry / "cwd").readlink())
            told = (entry / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(directory) in where + words + told:
            found.append(words)
    return found


@pytest.mark.timeout(300)
def test_interrupted_while_it_runs_it_stops_everything(stack: Stack, directory: Path) -> None:
    with subprocess.Popen(command(directory), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stderr is not None
        # Declared: the stack runs, devices have registered, and questions are asked.
        for line in demo.stderr:
            if line.startswith("· declared"):
                break
        demo.send_signal(signal.SIGINT)
        output, said = demo.communicate(timeout=2 * PATIENCE_S)
    assert json.loads(output.splitlines()[-1])["lost"] == 0, said
    assert left_behind(directory) == []


@pytest.mark.timeout(300)
def test_the_demo_ends_with_nothing_lost_nothing_twice_and_no_lie(stack: Stack, directory: Path) -> None:
    # Long enough for some of everything, also where the machine stands still for the half of it.
    result = subprocess.run(
        command(directory, "--duration", "20"), capture_output=True, text=True, timeout=4 * PATIENCE_S, check=False
    )
    assert (directory / "logs" / "gateway.log").exists()
    assert result.returncode == 0, result.stderr
    assert "copying the primary" not in result.stderr, "the replica of the run before goes on"
    closing = json.loads(result.stdout.splitlines()[-1])
    if closing["loaded"] is None:
        need_pipeline(result.stderr)
    assert set(COUNTED) <= closing.keys()
    assert {"readings_per_s", "ack_p50_ms", "ack_p99_ms"} <= closing.keys()
    assert closing["lost"] == closing["duplicated"] == closing["dishonest"] == 0
    assert closing["resent"] > 0
    assert closing["acked"] == closing["stored"] == closing["loaded"] > 0
    assert closing["published"] >= closing["loaded"]
    answers: Mapping[str, Mapping[str, int]] = closing["answers"]
    assert set(answers) == set(TIERS)
    assert set(answers["critical"]) == {"primary"}
    assert answers["dashboard"].get("replica", 0) > 0
    assert {"rollup", "projection"} <= set(answers["report"])
    assert answers["analytics"].get("warehouse", 0) > 0
    assert closing["checked"] > 0
    assert left_behind(directory) == []


def test_it_leaves_one_slot_for_the_one_replica(directory: Path) -> None:
    with EmbeddedPostgres(directory / "postgres") as primary, psycopg.connect(primary.dsn(DATABASE)) as connection:
        rows = connection.execute("SELECT slot_name, active FROM pg_replication_slots").fetchall()
        declared = connection.execute("SELECT name FROM rollups UNION ALL SELECT name FROM projections").fetchall()
    assert [active for _, active in rows] == [False]
    assert sorted(declared) == [("climate",), ("cold_chain",), ("stamps",)], "once each, however often it starts"


async def test_every_tier_is_asked_also_while_no_device_has_come(stack: Stack) -> None:
    questions = Questions(stack.target, "nobody", progress=print)
    asking = asyncio.create_task(questions.run())

    def answered() -> bool:
        return all(tier.answers for tier in questions.figures().tiers.values())

    await until(answered, "an answer at every tier", beside=asking)
    asking.cancel()
    await asyncio.wait({asking})
    figures = questions.figures()
    assert figures.dishonest == 0 < figures.checked


def test_the_exit_code_tells_what_the_audit_found() -> None:
    def code(*, lost: int = 0, duplicated: int = 0, resent: int = 5, unacked: int = 0, **asked: Any) -> int:
        statistics = FleetStatistics(1, 10, resent, 10, 0, {}, 1, unacked, 1, 0, 1.0, 1.0, 1.0, 1.0)
        tiers = {tier: TierFigures(asked.get(tier, {"primary": 1}), 0.0, 0.0) for tier in TIERS}
        figures = QueryFigures(tiers, {}, 4, asked.get("dishonest", 0), "")
        return exit_code(statistics, Audit(10, 10 - lost, 10, 10, lost, duplicated), figures)

    assert code() == 0
    assert code(lost=1) == 1
    assert code(duplicated=1) == 1
    assert code(resent=0) == 1, "nothing was sent again: the demo showed nothing"
    assert code(unacked=1) == 1
    assert code(dishonest=1) == 1
    assert code(report={}) == 1, "a tier had no answer: the demo showed nothing of it"
