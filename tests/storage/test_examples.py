"""The example queries for psql run as they are, and show what they promise."""

import subprocess
from importlib import resources
from pathlib import Path

import psycopg
import pytest

from embedded.binaries import bin_dir, clean_environment
from tests.storage.conftest import Database
from tests.waiting import PATIENCE_S

EXAMPLES = Path(str(resources.files("storage").joinpath("sql", "examples.sql")))


@pytest.fixture(scope="module")
def filled(module_database: Database) -> Database:
    with psycopg.connect(module_database()) as connection:
        row = connection.execute("SELECT register_tenant('acme')").fetchone()
        assert row
        tenant = row[0]
        connection.execute("SELECT ensure_history(%s, now() - interval '5 days', now() + interval '1 hour')", [tenant])
        connection.execute("SELECT ensure_rollups(now() - interval '1 day', now())")
        connection.execute("SELECT register_entity(%s, 'pump-1', 'pump', '{}')", [tenant])
        connection.execute(
            "SELECT register_attributes(%s, '{temperature,pressure}', '{double,double}', '{Cel,bar}')", [tenant]
        )
        connection.execute(
            "INSERT INTO entity_attributes_double (tenant_id, attribute_id, entity_id, ts, value)"
            " SELECT %s, a.attribute_id, e.entity_id, now() - g * interval '10 minutes', 90 + g"
            "   FROM entities e, attributes a, generate_series(1, 200) g WHERE a.name = 'temperature'",
            [tenant],
        )
        connection.execute(
            "INSERT INTO latest_values (tenant_id, attribute_id, entity_id, ts, double_value)"
            " SELECT %s, a.attribute_id, e.entity_id, now(), CASE a.name WHEN 'temperature' THEN 91 ELSE 2 END"
            "   FROM entities e, attributes a",
            [tenant],
        )
        connection.execute(
            "INSERT INTO rollup_hour_double SELECT %s, attribute_id, entity_id, date_trunc('hour', now(), 'UTC'),"
            " 2, 1, 3, 4, 2, now(), 1, now(), 3 FROM latest_values",
            [tenant],
        )
    return module_database


def psql(database: Database, *arguments: str) -> str:
    where = {
        "PGHOST": "127.0.0.1",
        "PGPORT": str(database.postgres.port),
        "PGUSER": "postgres",
        "PGPASSWORD": database.postgres.password,
        "PGDATABASE": database.name,
    }
    variables = {"tenant": "acme", "device": "pump-1", "attribute": "temperature", "other": "pressure"}
    done = subprocess.run(
        [
            str(bin_dir() / "psql"), "--no-psqlrc", "-At",
            *(part for name, value in variables.items() for part in ("-v", f"{name}={value}")), *arguments,
        ],
        env=clean_environment(where), capture_output=True, text=True, check=False, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_runs_and_finds_something(filled: Database) -> None:
    parts = psql(filled, "-f", str(EXAMPLES)).split("-- ")[1:]
    found = {part.split(":")[0]: part.splitlines()[1:] for part in parts}
    assert list(found) == ["latest", "search", "series", "mixed", "buckets", "rollup", "freshness", "pruning"]
    assert [line.split("|")[0] for line in found["latest"]] == ["pressure", "temperature"]
    assert found["search"] == ["pump-1|pump|91|2"]
    assert len(found["series"]) == 143
    assert len(found["mixed"]) == 5
    assert sum(int(line.split("|")[1]) for line in found["buckets"]) == 200
    assert found["rollup"][0].endswith("|1|3")
    # One day of one tenant: one table is scanned.
    scans = [line for line in found["pruning"] if "Scan" in line]
    assert len(scans) == 1, found["pruning"]
    assert "entity_attributes_double_s" in scans[0]
