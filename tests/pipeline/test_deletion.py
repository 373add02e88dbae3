"""A device is deleted with everything running: its readings and its name leave the warehouse, and the audit agrees."""

import json
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from demo.stack import Stack
from embedded.program import Program
from tests.device import turbofan_form
from tests.pipeline.conftest import Run
from tests.waiting import wait_until

TENANT = "leavers"


@pytest.fixture
def rollup_worker(stack: Stack) -> Iterator[Program]:
    """The process that carries deletions out, in the place of the stack's: with a short wait for writes under way."""
    stack.rollup.stop()
    process = Program(
        "rollup",
        ["cli.main", "rollup"],
        {"ATLASCO_DSN": stack.dsn, "ATLASCO_DELETION_SETTLE": "200ms"},
        stack.data_dir / "logs" / "rollup.log",
    )
    process.start()
    yield process
    process.stop()
    stack.rollup.start()


def test_a_deleted_device_leaves_every_store(
    stack: Stack, atlasco: Run, rollup_worker: Program, tmp_path: Path
) -> None:
    table = turbofan_form.rows(engines=2, cycles=8)
    file = turbofan_form.write(tmp_path / "engines.txt", table)
    atlasco("tenant", "create", TENANT, "--window-past", "365d", "--retention", "365d")
    assert atlasco("tenant", "device", "add", TENANT, "silent").returncode == 0
    replayed = atlasco(
        *("replay", str(file), "--columns", ",".join(turbofan_form.COLUMNS), "--tenant", TENANT),
        *("--device-column", "unit", "--cycle-column", "cycle", "--period", "1h", "--start", turbofan_form.START),
    )
    assert replayed.returncode == 0, replayed.stderr
    wait_until(lambda: sum(_readings(stack).values()) == len(table) * 24, "everything is loaded")
    before = _readings(stack)
    leaver, stayer = sorted(before)

    # Both at once: the one without readings is followed later, by giving the same order again.
    silent = ("device", "delete", TENANT, "silent", "--yes", "--operation", str(uuid4()))
    assert atlasco(*silent).returncode == 0
    deleted = atlasco("device", "delete", TENANT, leaver, "--yes", "--wait", "--timeout", "60s")
    assert deleted.returncode == 0, deleted.stderr
    # The operation ended, so the warehouse has it: nothing more is waited for.
    assert _readings(stack) == {stayer: before[stayer]}
    assert atlasco(*silent, "--wait", "--timeout", "60s").returncode == 0
    listed = [json.loads(line) for line in atlasco("device", "deletions", TENANT, "--json").stdout.splitlines()]
    assert [(row["device"], row["step"], row["readings_deleted"]) for row in listed] == [
        (leaver, "done", before[leaver]),
        ("silent", "done", 0),
    ]
    assert stack.pipeline is not None
    names = stack.pipeline.warehouse.query(
        "SELECT e.external_id FROM entities e JOIN tenants t ON t.tenant_id = e.tenant_id WHERE t.name = %s", [TENANT]
    )
    assert [row[0] for row in names.rows] == [stayer]
    audit = atlasco("verify", "--log", "--tenant", TENANT, "--json")
    assert audit.returncode == 0, audit.stdout + audit.stderr
    totals = [line for line in map(json.loads, audit.stdout.splitlines()) if "leftovers" in line]
    assert [(total["store"], total["different"], total["leftovers"]) for total in totals] == [
        ("warehouse", 0, 0),
        ("log", 0, 0),
    ]


def _readings(stack: Stack) -> dict[str, int]:
    """The devices that the warehouse names, and how many readings it has of each; of unnamed ones under ""."""
    assert stack.pipeline is not None
    answer = stack.pipeline.warehouse.query(
        "SELECT coalesce(e.external_id, '') AS name, count(*) FROM entity_attributes h "
        "JOIN tenants t ON t.tenant_id = h.tenant_id "
        "LEFT JOIN entities e ON e.tenant_id = h.tenant_id AND e.entity_id = h.entity_id "
        "WHERE t.name = %s GROUP BY 1",
        [TENANT],
    )
    return {row[0]: row[1] for row in answer.rows}
