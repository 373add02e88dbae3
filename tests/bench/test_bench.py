"""The benchmark works: every measure, at a size that says nothing about speed."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from bench.fleet import Fleet
from bench.history import SAMPLE_US, History
from bench.kept import kept_databases
from bench.query_load import Span
from bench.query_measures import Latencies, percentile
from bench.sizes import SIZES
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
QUERIES = {"query_data", "get_latest", "growth", "dashboard", "aggregate_day", "find_entities"}
FAN_OUT = {"relay_drain", "load_drain", "together"}


def run(*only: str, environment: dict[str, str] | None = None, options: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    parts = [*(argument for part in only for argument in ("--only", part)), *options]
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


@pytest.fixture(scope="module")
def histories() -> Iterator[Path]:
    """Not pytest's own temporary directory, which is closed to the account that the server runs under."""
    with TemporaryDirectory(prefix="atlasco-test-") as directory:
        yield Path(directory) / "histories"


@pytest.fixture(scope="module")
def queries(histories: Path) -> list[dict[str, Any]]:
    return run("queries", options=("--history-directory", str(histories)))[1:]


def test_every_query_is_measured_with_what_it_costs(queries: list[dict[str, Any]]) -> None:
    assert {line["measure"] for line in queries} == QUERIES
    for line in queries:
        if line["measure"] in {"get_latest", "dashboard", "aggregate_day", "find_entities"}:
            assert not line["failed"]
            assert 0 < line["p50_ms"] <= line["p99_ms"] <= line["max_ms"]
            # CPU is counted in hundredths of a second, which is more than a tiny run may take.
            assert line["gateway_cpu_s_per_1000"] + line["postgres_cpu_s_per_1000"] >= 0


def test_queries_are_held_against_bare_statements_and_their_limit(queries: list[dict[str, Any]]) -> None:
    judged = [line for line in queries if "limit_ms" in line]
    assert {line["limit_ms"] for line in judged} == {10.0, 50.0}
    for line in judged:
        assert line["ratio"] == pytest.approx(line["p50_ms"] / line["bare_p50_ms"], rel=0.01)
        kept_up = line["answered_per_s"] >= 0.97 * line["offered_per_s"]
        assert line["met"] == (line["p99_ms"] <= line["limit_ms"] and kept_up)


def test_growth_compares_the_same_query_on_a_tenth(queries: list[dict[str, Any]]) -> None:
    [data] = [line for line in queries if line["measure"] == "query_data"]
    assert data["readings"] == 10 * data["shorter_readings"]
    growth = [line for line in queries if line["measure"] == "growth"]
    assert [(line["query"], line["case"]) for line in growth] == [
        (line["measure"], line["case"]) for line in queries if line["measure"] in {"get_latest", "dashboard"}
    ]
    for line in growth:
        assert line["ratio"] == pytest.approx(line["p50_ms"] / line["shorter_p50_ms"], rel=0.01)
        assert line["met"] == (max(line["ratio"], line["ratio_p99"]) <= line["limit"])


def test_a_finished_history_is_used_again_and_a_broken_one_is_not(
    histories: Path, queries: list[dict[str, Any]]
) -> None:
    size = SIZES["tiny"].query
    whole, broken = History(size.readings, size.devices), Fleet(size.fleet)
    (histories / f"{broken.database}.json").unlink()
    said: list[str] = []
    with kept_databases(histories, [whole, broken], said.append) as (stack, kept):
        with stack.admin(whole.database) as connection:
            stored = connection.execute("SELECT count(*) FROM entity_attributes").fetchone()
        assert stored == (whole.readings,)
        assert kept[0].facts["end_us"] - kept[0].facts["start_us"] == whole.samples * SAMPLE_US
    assert [text for text in said if text.startswith("building")] == [
        f"building {broken.database} in {histories}, once"
    ]


def test_turns_are_put_together_and_refusals_are_no_answers() -> None:
    told = Latencies()
    told.add(Span([1.0, 2.0, 30.0, 4.0], [0.1], {"UNAVAILABLE": 1}, 0.5, []))
    assert (percentile(told.times, 50), percentile(told.times, 99)) == (4.0, 30.0)
    assert told.answered_per_s == 8.0


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
