"""A file, from the device stream to the warehouse, with the audit of the stores against each other."""

import json
from pathlib import Path

import psycopg

from demo.stack import Stack
from tests.device import turbofan_form
from tests.pipeline.conftest import Run

TENANT = "engines"


def test_a_replayed_file_arrives_in_every_store_once(stack: Stack, atlasco: Run, tmp_path: Path) -> None:
    table = turbofan_form.rows(engines=3, cycles=30)
    file = turbofan_form.write(tmp_path / "engines.txt", table)
    created = atlasco("tenant", "create", TENANT, "--window-past", "365d", "--retention", "365d")
    assert created.returncode == 0, created.stderr

    _replay(atlasco, file)
    _verify(atlasco, differences=0)
    assert _loaded(atlasco) == (len(table) * 24, 0)

    _replay(atlasco, file)
    _verify(atlasco, differences=0)
    assert _loaded(atlasco) == (len(table) * 24, 0), "the same file again changed something"

    table[7][6] = "999.25"
    _replay(atlasco, turbofan_form.write(tmp_path / "corrected.txt", table))
    _verify(atlasco, differences=0)
    assert _loaded(atlasco) == (len(table) * 24, 1), "one value changed: one correction"
    with psycopg.connect(stack.dsn) as connection:
        corrected = connection.execute(
            "SELECT value, revision FROM entity_attributes_double JOIN tenants USING (tenant_id) "
            "WHERE name = %s AND revision > 0",
            [TENANT],
        ).fetchall()
    assert corrected == [(999.25, 1)]


def test_verify_names_the_first_difference(stack: Stack, atlasco: Run, tmp_path: Path) -> None:
    tenant = "tampered"
    atlasco("tenant", "create", tenant, "--window-past", "365d", "--retention", "365d")
    file = turbofan_form.write(tmp_path / "engines.txt", turbofan_form.rows(engines=1, cycles=8))
    _replay(atlasco, file, tenant)
    _verify(atlasco, differences=0, tenant=tenant)
    with psycopg.connect(stack.dsn, autocommit=True) as connection:
        # Behind the platform's back: no outbox row tells anybody.
        connection.execute(
            "UPDATE entity_attributes_bigint SET value = -1 WHERE ctid = (SELECT min(h.ctid) FROM "
            "entity_attributes_bigint h JOIN tenants USING (tenant_id) WHERE name = %s) AND tenant_id = "
            "(SELECT tenant_id FROM tenants WHERE name = %s)",
            [tenant, tenant],
        )
    result = atlasco("verify", "--tenant", tenant, "--json")
    assert result.returncode == 1
    total = json.loads(result.stdout.splitlines()[-1])
    assert total["different"] == 1
    assert "PostgreSQL has -1, the warehouse has" in total["first_difference"]


def _replay(atlasco: Run, file: Path, tenant: str = TENANT) -> None:
    result = atlasco(
        *("replay", str(file), "--columns", ",".join(turbofan_form.COLUMNS), "--tenant", tenant),
        *("--device-column", "unit", "--cycle-column", "cycle", "--period", "1h", "--start", turbofan_form.START),
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["unacked"] == 0


def _verify(atlasco: Run, *, differences: int, tenant: str = TENANT) -> None:
    result = atlasco("verify", "--log", "--tenant", tenant, "--json")
    totals = [line for line in map(json.loads, result.stdout.splitlines()) if "different" in line]
    assert [total["store"] for total in totals] == ["warehouse", "log"], result.stderr
    assert [total["different"] for total in totals] == [differences] * 2
    assert totals[0]["readings"] > 0


def _loaded(atlasco: Run) -> tuple[int, int]:
    """Readings of the tenant in the warehouse, and how many of them were corrected."""
    result = atlasco(
        *("warehouse", "query", "--json"),
        "SELECT count(*) AS readings, count(CASE WHEN revision > 0 THEN 1 END) AS corrected FROM entity_attributes h "
        f"JOIN tenants t ON t.tenant_id = h.tenant_id WHERE t.name = '{TENANT}'",
    )
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout.splitlines()[0])
    return row["readings"], row["corrected"]
