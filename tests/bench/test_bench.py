"""The benchmark works: every measure, at a size that says nothing about speed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--size", "tiny"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


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


@pytest.mark.parametrize("readings_per_message", [10, 100, 1000])
def test_messages_are_of_their_shape_and_no_key_repeats(readings_per_message: int) -> None:
    messages = Messages(Shape(readings_per_message), 3, 1_000_000)
    keys: list[tuple[int, int]] = []
    for _ in range(20):
        for column in messages.next_columns().values():
            keys += zip(column.aliases, column.times_us, strict=True)
    assert len(keys) == len(set(keys)) == 20 * readings_per_message
