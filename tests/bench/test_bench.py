"""The benchmark works: every measure, at a size that says nothing about speed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.together import grows
from bench.workload import Messages, Shape

ROOT = Path(__file__).parents[2]
MEASURES = {
    "run",
    "parse",
    "decode",
    "arrange",
    "copy_rows",
    "encode_outbox",
    "query_latest",
    "query_series",
    "raw_limit",
    "ingest",
    "ack_latency",
    "idle_streams",
}
FAN_OUT = {"relay_drain", "load_drain", "together"}


def run(*only: str, environment: dict[str, str] | None = None) -> list[dict[str, Any]]:
    parts = [argument for part in only for argument in ("--only", part)]
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--size", "tiny", *parts],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    return run("parts", "ingest", "latency", "idle")


def test_prints_one_json_line_per_measure(lines: list[dict[str, Any]]) -> None:
    assert {line["measure"] for line in lines} == MEASURES
    assert lines[0]["measure"] == "run"


def test_says_that_the_server_is_durable(lines: list[dict[str, Any]]) -> None:
    shown = lines[0]["postgres"]
    assert [shown[name] for name in ("fsync", "full_page_writes", "synchronous_commit")] == ["on", "on", "on"]
    assert shown["wal_level"]


def test_ingest_is_told_with_its_raw_limit(lines: list[dict[str, Any]]) -> None:
    [ingest] = [line for line in lines if line["measure"] == "ingest"]
    assert ingest["readings_per_message"] == 100
    assert ingest["readings_per_s"] > 0
    assert ingest["raw_limit_per_s"] > 0
    assert ingest["ratio"] > 0
    for cost in ("gateway", "client", "postgres"):
        assert ingest[f"{cost}_cpu_s_per_million"] > 0
    assert 0 < ingest["ack_p50_ms"] <= ingest["ack_p99_ms"]


def test_the_fan_out_is_measured_and_nothing_is_lost_on_the_way() -> None:
    lines = {line["measure"]: line for line in run("fan_out")[1:]}
    assert lines.keys() == FAN_OUT
    if "skipped" in lines["together"]:
        if os.environ.get("CI") == "true":
            pytest.fail(lines["together"]["skipped"])
        pytest.skip(lines["together"]["skipped"])
    relay, load, together = lines["relay_drain"], lines["load_drain"], lines["together"]
    assert relay["readings"] == load["readings"] > 0
    assert relay["ratio"] == pytest.approx(relay["readings_per_s"] / relay["ingest_per_s"], rel=0.01)
    assert relay["met"] == (relay["ratio"] >= relay["floor"])
    assert load["met"] == (load["readings_per_s"] >= load["floor"])
    assert len(together["outbox_batches"]) == len(together["outbox_oldest_s"]) == 3
    assert together["loaded"] > 0
    assert 0 < together["warehouse_behind_p50_s"] <= together["warehouse_behind_max_s"]


def test_without_java_the_fan_out_is_skipped_and_says_so(tmp_path: Path) -> None:
    lines = run("fan_out", environment={"PATH": str(tmp_path), "JAVA_HOME": ""})
    assert {line["measure"] for line in lines} == {"run"} | FAN_OUT
    assert all("java" in line["skipped"] for line in lines[1:])


@pytest.mark.parametrize(
    ("batches", "found"),
    [([3, 4, 2], False), ([3, 300, 60], False), ([50, 120, 190], True), ([400, 200, 3], False)],
    ids=["short", "a pause", "behind more and more", "catching up"],
)
def test_an_outbox_grows_when_more_than_a_seconds_batches_were_added(batches: list[float], found: bool) -> None:
    assert grows(batches, batches_per_s=100) is found


@pytest.mark.parametrize("readings_per_message", [10, 100, 1000])
def test_messages_are_of_their_shape_and_no_key_repeats(readings_per_message: int) -> None:
    messages = Messages(Shape(readings_per_message), 3, 1_000_000)
    keys: list[tuple[int, int]] = []
    for _ in range(20):
        for column in messages.next_columns().values():
            keys += zip(column.aliases, column.times_us, strict=True)
    assert len(keys) == len(set(keys)) == 20 * readings_per_message
