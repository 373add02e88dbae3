"""The script that the migration Job runs first, against a real PostgreSQL."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from embedded.postgres import EmbeddedPostgres
from tests.k8s.manifests import K8S, Manifests
from tests.waiting import PATIENCE_S

SCRIPT = K8S / "base" / "migrate" / "logins.py"


@pytest.fixture(scope="module")
def postgres() -> Iterator[EmbeddedPostgres]:
    # Not in pytest's own directory: as root the server runs under another account, which cannot enter there.
    with (
        TemporaryDirectory(prefix="atlasco-logins-") as directory,
        EmbeddedPostgres(Path(directory) / "data") as server,
    ):
        server.ensure_login("test_owner")
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            # As a managed database gives it: no superuser.
            connection.execute("ALTER ROLE test_owner CREATEROLE")
            connection.execute("CREATE DATABASE telemetry OWNER test_owner")
        yield server


def secret(directory: Path, owner: str, **purposes: str) -> Path:
    (directory / "owner-dsn").write_text(owner, encoding="utf-8")
    for purpose, dsn in purposes.items():
        (directory / f"{purpose}-dsn").write_text(dsn, encoding="utf-8")
    return directory


def run(directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), str(directory)], capture_output=True, text=True, check=False)


def stored(postgres: EmbeddedPostgres, user: str) -> tuple[bool, str]:
    with psycopg.connect(postgres.dsn()) as connection:
        row = connection.execute(
            "SELECT rolcanlogin, coalesce(rolpassword, '') FROM pg_authid WHERE rolname = %s", [user]
        ).fetchone()
    assert row is not None
    return row[0], row[1]


def test_makes_rotates_and_repeats(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    owner = postgres.dsn("telemetry", "test_owner")
    directory = secret(
        tmp_path,
        owner,
        ingest="user='login_a' password='one'",
        relay="user=login_a password=one",
        query="user=login_b password=two",
    )
    first = run(directory)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines() == ["login_a: made", "login_b: made"]
    can_login, verifier = stored(postgres, "login_a")
    assert can_login
    assert verifier.startswith("SCRAM-SHA-256$")

    secret(tmp_path, owner, query="user=login_b password=three")
    before = stored(postgres, "login_b")[1]
    second = run(directory)
    assert second.returncode == 0
    assert second.stdout.splitlines() == ["login_a: password set", "login_b: password set"]
    assert stored(postgres, "login_b")[1] != before
    for text in (first.stdout, first.stderr, second.stdout, second.stderr):
        assert "three" not in text


def test_group_role_that_cannot_log_in_becomes_one_that_can(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    # The migration makes its groups without LOGIN; a deployment may call its login the same.
    owner = postgres.dsn("telemetry", "test_owner")
    with psycopg.connect(owner, autocommit=True) as connection:
        connection.execute("CREATE ROLE group_c NOLOGIN")
    assert run(secret(tmp_path, owner, ingest="user=group_c password=x")).returncode == 0
    assert stored(postgres, "group_c")[0]


def test_migration_follows(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    """The Job as a whole, as the manifests have it: logins, then the schema and the grants."""
    import asyncio

    from storage.migrations import grant_logins, migrate, schema_state

    owner = postgres.dsn("telemetry", "test_owner")
    purposes = ("ingest", "query", "relay", "loader", "rollup")
    passwords = {purpose: f"user=atlasco_{purpose} password={purpose}" for purpose in purposes}
    assert run(secret(tmp_path, owner, **passwords)).returncode == 0

    async def job() -> None:
        await migrate(owner)
        await grant_logins(owner, {purpose: [f"atlasco_{purpose}"] for purpose in purposes})

    asyncio.run(job())
    # What the init containers ask, each as its own process, with the password that was set.
    for purpose in purposes:
        login = make_conninfo(postgres.dsn("telemetry", f"atlasco_{purpose}"), password=purpose)
        assert asyncio.run(schema_state(login)).pending == (), purpose
        with psycopg.connect(login) as connection:
            for group in purposes:
                row = connection.execute("SELECT pg_has_role(%s, 'MEMBER')", [f"atlasco_{group}"]).fetchone()
                # Nobody's rights but one's own: a stolen password of the relay writes no readings.
                assert row == (group == purpose,), (purpose, group)


def atlasco(environment: dict[str, str], *arguments: str) -> int:
    program = Path(sys.executable).parent / "atlasco"
    return subprocess.run(
        [program, *arguments], env=environment, capture_output=True, timeout=PATIENCE_S, check=False
    ).returncode


def test_connection_strings_without_an_address(postgres: EmbeddedPostgres) -> None:
    """User and password in the secret, the rest in libpq's variables; then what the pods wait for."""
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE fresh OWNER test_owner")
    given = conninfo_to_dict(postgres.dsn("fresh", "test_owner"))
    environment = {
        "PATH": os.environ["PATH"],
        "PGHOST": str(given["host"]),
        "PGPORT": str(given["port"]),
        "PGDATABASE": "fresh",
        "PGSSLMODE": "prefer",
        "ATLASCO_DSN": make_conninfo("", user=given["user"], password=given["password"]),
    }
    assert atlasco(environment, "migrate", "--check") == 1
    assert atlasco(environment, "migrate") == 0
    assert atlasco(environment, "migrate", "--check") == 0
    assert atlasco(environment, "maintain", "--json") == 0
    assert atlasco({**environment, "PGPORT": "1"}, "migrate", "--check") == 3
    assert atlasco({**environment, "ATLASCO_DSN": ""}, "migrate", "--check") == 2


@pytest.mark.parametrize(
    ("answers", "code"),
    [pytest.param("1 3 0", 0, id="waits"), pytest.param("1 2 0", 2, id="gives up on a configuration")],
)
def test_waiting_for_the_schema(prod: Manifests, tmp_path: Path, answers: str, code: int) -> None:
    """The init container's script, with a program that answers as told."""
    gateway = prod.get("Deployment", "atlasco-gateway")["spec"]["template"]["spec"]["initContainers"][0]
    (tmp_path / "answers").write_text(answers.replace(" ", "\n") + "\n", encoding="utf-8")
    for name, script in {
        "atlasco": 'code=$(head -n1 answers); sed -i 1d answers; exit "$code"',
        "sleep": "exit 0",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [*gateway["command"], *gateway["args"]],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == code
    assert (tmp_path / "answers").read_text(encoding="utf-8").split() == ([] if code == 0 else ["0"])


@pytest.mark.parametrize(
    ("purposes", "complaint"),
    [
        pytest.param({"ingest": "user=test_owner password=x"}, "names the owner", id="the owner"),
        pytest.param({"ingest": "user=a"}, "needs a user and a password", id="no password"),
        pytest.param({"ingest": "a=b=c hunter2"}, "is not a connection string", id="no connection string"),
        pytest.param(
            {"ingest": "user=a password=hunter2", "query": "user=a password=y"}, "another password", id="two passwords"
        ),
        pytest.param({}, "holds no connection strings", id="nothing"),
    ],
)
def test_refuses(tmp_path: Path, purposes: dict[str, str], complaint: str) -> None:
    done = run(secret(tmp_path, "user=test_owner host=127.0.0.1 port=1", **purposes))
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "hunter2" not in done.stderr


def test_says_when_the_database_is_away(tmp_path: Path) -> None:
    done = run(secret(tmp_path, "user=o host=127.0.0.1 port=1", ingest="user=a password=x"))
    assert done.returncode == 3
