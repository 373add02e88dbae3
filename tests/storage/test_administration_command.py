"""`atlasco migrate`, `maintain` and `tenant` as an operator runs them."""

import argparse
import json
import os
import signal
import subprocess
import sys

import pytest

from cli import maintain, migrate, tenant
from tests.storage.conftest import Database
from tests.waiting import PATIENCE_S


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("ATLASCO_", "PG"))]:
        monkeypatch.delenv(name)


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser(prog="atlasco")
    commands = parser.add_subparsers(required=True)
    for module in (migrate, maintain, tenant):
        module.add_parser(commands)
    arguments = parser.parse_args(argv)
    return int(arguments.run(arguments))


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_from_an_empty_database_to_a_served_tenant(
    empty_database: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ATLASCO_DSN", empty_database())
    assert run("migrate", "--check") == 1
    assert lines(capsys)[0] == "pending  0001_initial"
    assert run("migrate", "--dry-run") == 0
    empty_database.postgres.ensure_login("command_gateway")
    assert run("migrate", "--grant-ingest", "command_gateway") == 0
    assert "command_gateway is now a member of atlasco_ingest" in lines(capsys)
    assert run("migrate", "--check") == 0
    assert run("migrate") == 0
    assert "the schema is up to date" in lines(capsys)
    assert run("migrate", "--list") == 0
    assert lines(capsys)[0] == "applied  0001_initial"

    assert run("tenant", "create", "acme", "--retention", "365d", "--window-past", "2d", "--no-register-entities") == 0
    assert any(line.startswith("retention") and "365d" in line for line in lines(capsys))
    assert run("tenant", "device", "add", "acme", "pump-1", "pump-2", "--type", "pump", "--label", "site=berlin") == 0
    assert run("tenant", "attribute", "add", "acme", "temperature", "double", "--unit", "Cel") == 0
    assert run("tenant", "attribute", "set", "acme", "temperature", "--no-latest") == 0
    lines(capsys)
    assert run("tenant", "show", "acme", "--json") == 0
    shown = json.loads(lines(capsys)[0])
    assert (shown["devices"], shown["attributes"], shown["retention_s"]) == (2, 1, 365 * 86400)
    assert not shown["register_entities"]
    assert run("tenant", "device", "list", "acme", "--json") == 0
    assert [json.loads(line)["external_id"] for line in lines(capsys)] == ["pump-1", "pump-2"]
    for command in (
        ("list",),
        ("device", "list", "acme"),
        ("attribute", "list", "acme"),
        ("quarantine", "list", "acme"),
    ):
        assert run("tenant", *command) == 0
    assert run("tenant", "quarantine", "discard", "acme", "--all") == 0
    assert lines(capsys)[-1] == "discarded 0 readings"

    assert run("maintain", "--json", "--ahead", "1d") == 0
    report = json.loads(lines(capsys)[-1])
    assert report["ranges_made"] in (3, 4)
    assert report["problems"] == []
    assert run("maintain") == 0
    assert any(line.startswith("ranges of history made") for line in lines(capsys))


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        pytest.param(["migrate"], 2, "ATLASCO_DSN", id="no-dsn"),
        pytest.param(["migrate", "--dsn", "secret nonsense"], 2, "--dsn", id="not-a-dsn"),
        pytest.param(["migrate", "--dsn", "host=127.0.0.1 port=1"], 3, "cannot be reached", id="no-server"),
        pytest.param(["maintain", "--dsn", "host=127.0.0.1 port=1"], 3, "cannot be reached", id="maintain-no-server"),
        pytest.param(["maintain", "--dsn", "host=x", "--ahead", "40d"], 2, "39 days", id="too-far-ahead"),
        pytest.param(["tenant", "list", "--dsn", "host=127.0.0.1 port=1"], 3, "cannot be reached", id="tenant"),
    ],
)
def test_errors_are_a_line_and_an_exit_code(
    argv: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*argv) == code
    said = capsys.readouterr().err
    assert text in said
    assert "secret" not in said
    assert all(line.startswith("atlasco: ") for line in said.splitlines())


def test_a_refusal_says_what_to_do_next(database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tenant", "show", "nobody", "--dsn", database()) == 1
    assert "atlasco tenant create" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        pytest.param(["tenant", "create", "x", "--retention", "5"], id="no-unit"),
        pytest.param(["tenant", "device", "add", "x", "d", "--label", "novalue"], id="label"),
        pytest.param(["tenant", "attribute", "add", "x", "a", "float"], id="type"),
        pytest.param(["tenant", "quarantine", "discard", "x"], id="discard-what"),
        pytest.param(["maintain", "--every", "soon"], id="every"),
    ],
)
def test_arguments_out_of_bounds_end_with_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*argv)
    assert caught.value.code == 2


def test_a_table_cannot_be_forged(capsys: pytest.CaptureFixture[str]) -> None:
    tenant.print_table(("name", "count"), [("a\x1b[2Jb\nc", 1234), ("d", 5)])
    assert lines(capsys) == [
        "name          count",
        "------------  -----",
        r"a\x1b[2Jb\nc  1,234",
        "d                 5",
    ]


def test_every_repeats_until_it_is_told_to_stop(database: Database) -> None:
    program = "import sys; from cli.maintain import *; p = argparse.ArgumentParser(); add_parser(p.add_subparsers());"
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            program + "a = p.parse_args(); sys.exit(a.run(a))",
            "maintain",
            "--every",
            "1ms",
            "--json",
        ],
        env={**os.environ, "ATLASCO_DSN": database()},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    reports = [json.loads(process.stdout.readline()) for _ in range(3)]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert [report["outbox_partitions_made"] > 0 for report in reports] == [True, False, False]
