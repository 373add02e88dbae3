"""`atlasco device` as an operator runs it: not by slip, the same order once, followed to its end, listed."""

import argparse
import asyncio
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from cli import device
from storage.database import Pool
from storage.deletion import list_operations
from storage.rollup.worker import Worker
from tests.rollup.conftest import Write, settle
from tests.search.fleet import TENANT, Fleet
from tests.storage.conftest import Database
from tests.waiting import PATIENCE_S, until

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "device-0001"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, database: Database, fleet: Fleet) -> None:
    for name in [name for name in os.environ if name.startswith(("ATLASCO_", "PG"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ATLASCO_DSN", database())


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser(prog="atlasco")
    device.add_parser(parser.add_subparsers(required=True))
    arguments = parser.parse_args(["device", *argv])
    return int(arguments.run(arguments))


def devices(owner: psycopg.Connection[Any]) -> int:
    row = owner.execute("SELECT count(*) FROM entities WHERE external_id = %s", [DEVICE]).fetchone()
    owner.commit()
    assert row is not None
    return int(row[0])


def test_an_order_is_given_once_and_listed(owner: psycopg.Connection[Any], capsys: pytest.CaptureFixture[str]) -> None:
    operation = str(uuid4())
    for _ in range(2):
        assert run("delete", TENANT, DEVICE, "--yes", "--operation", operation) == 0
        assert capsys.readouterr().out.split() == [operation]
    assert devices(owner) == 0
    assert run("delete", TENANT, "device-0002", "--yes") == 0
    second = capsys.readouterr().out.strip()
    UUID(second)
    assert run("deletions", TENANT, "--json") == 0
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["operation"], row["device"], row["step"], row["readings_deleted"]) for row in listed] == [
        (second, "device-0002", "database", 0), (operation, DEVICE, "database", 0),
    ]  # fmt: skip
    assert [(row["problem"], row["started_at"], row["ended_at"]) for row in listed] == [("", None, None)] * 2
    assert run("deletions", TENANT) == 0
    assert operation in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        pytest.param([TENANT, DEVICE], 2, "--yes", id="nobody-to-ask"),
        pytest.param([TENANT, "device-9999", "--yes"], 1, "device-9999", id="no-such-device"),
        pytest.param(["stranger", DEVICE, "--yes"], 1, "stranger", id="no-such-tenant"),
        pytest.param([TENANT, DEVICE, "--yes", "--timeout", "1s"], 2, "--wait", id="timeout-without-wait"),
    ],
)
def test_what_is_refused_changes_nothing(
    owner: psycopg.Connection[Any], capsys: pytest.CaptureFixture[str], words: list[str], code: int, text: str
) -> None:
    assert run("delete", *words) == code
    found = capsys.readouterr()
    assert (found.out, text in found.err) == ("", True)
    assert devices(owner) == 1


def test_an_operations_id_is_of_one_device(owner: psycopg.Connection[Any], capsys: pytest.CaptureFixture[str]) -> None:
    operation = str(uuid4())
    assert run("delete", TENANT, "device-0002", "--yes", "--operation", operation) == 0
    assert run("delete", TENANT, DEVICE, "--yes", "--operation", operation) == 1
    assert operation in capsys.readouterr().err
    assert devices(owner) == 1


@pytest.mark.parametrize(("typed", "code", "left"), [(DEVICE, 0, 0), ("yes", 1, 1), ("", 1, 1)])
def test_a_person_types_the_name(owner: psycopg.Connection[Any], typed: str, code: int, left: int) -> None:
    ours, theirs = pty.openpty()
    try:
        os.write(ours, f"{typed}\n".encode())
        command = [sys.executable, "-m", "cli.main", "device", "delete", TENANT, DEVICE]
        done = subprocess.run(
            command, cwd=ROOT, stdin=theirs, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert (done.returncode, bool(done.stdout)) == (code, not left)
    assert DEVICE in done.stderr
    assert "cannot be undone" in done.stderr
    assert devices(owner) == left


async def test_it_is_followed_to_its_end(
    fleet: Fleet, write: Write, worker: Worker, admin_pool: Pool, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(device, "_POLL_S", 0.01)
    write(DEVICE, "count", {fleet.now_us - i: i for i in range(7)})
    waiting = asyncio.create_task(asyncio.to_thread(run, "delete", TENANT, DEVICE, "--yes", "--wait"))

    async def ordered() -> bool:
        return bool(await list_operations(admin_pool, fleet.tenant_id, limit=1))

    await until(ordered, "the deletion is ordered", beside=waiting)
    async with asyncio.timeout(PATIENCE_S):
        await settle(worker)
        assert await waiting == 0
    found = capsys.readouterr()
    UUID(found.out.strip())
    assert found.err.splitlines()[0] == "database: 0 readings deleted"
    assert found.err.splitlines()[-1] == "done: 7 readings deleted"


async def test_what_does_not_end_in_time_says_so(
    admin_pool: Pool, fleet: Fleet, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_NOBODY_S", 0.0)
    assert await asyncio.to_thread(run, "delete", TENANT, DEVICE, "--yes", "--wait", "--timeout", "50ms") == 1
    found = capsys.readouterr()
    assert found.out.strip() in found.err
    assert "does `atlasco rollup` run?" in found.err
    (ordered,) = await list_operations(admin_pool, fleet.tenant_id, limit=1)
    assert (str(ordered.operation_id), ordered.step) == (found.out.strip(), "database")
