"""Releasing readings from quarantine: by the rules of any write, once, and what cannot be released stays."""

import argparse
import asyncio
import json
import os
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from cli import tenant
from storage.administration import NotFound
from storage.errors import StorageError
from storage.quarantine import Kept, NotReleased, Released, Selection, release_quarantined
from tests.storage.conftest import Database
from tests.storage.test_commit import SECOND, T0, Sent, Site, plain, site_of

DAY = 86_400 * SECOND
OLD = T0 - 40 * DAY
"""Outside the window that a tenant has at first."""


@pytest.fixture
async def site(module_database: Database, request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    async with site_of(module_database, request.node.name) as made:
        yield made


@pytest.fixture
async def own_site(database: Database) -> AsyncIterator[Site]:
    async with site_of(database, "acme") as made:
        yield made


def widen(site: Site, days: int = 60) -> None:
    site.execute(f"UPDATE tenants SET window_past = '{days} days' WHERE tenant_id = %s", site.tenant_id)


async def set_aside(site: Site, *readings: tuple[str, int, Any], device: str = "pump") -> None:
    await site.writer().write(site.batch(Sent(device, [], aside=readings)))


async def release(site: Site, selection: Selection | None = None, rows_per_batch: int = 2_000) -> Released:
    return await release_quarantined(site.database(), site.tenant, selection, rows_per_batch=rows_per_batch)


async def test_every_type_becomes_history_and_moves_no_latest_value(site: Site) -> None:
    readings = [
        ("d", OLD, float("nan")), ("d", OLD + 1, -0.5), ("i", OLD, -(2**63)), ("b", OLD, False), ("s", OLD, ""),
        ("s", OLD + 1, "käse"),
    ]  # fmt: skip
    await set_aside(site, *readings)
    widen(site)
    result = await release(site, rows_per_batch=4)
    assert (result.released, result.changed, result.corrections, +result.kept) == (6, 6, 0, Counter())
    assert site.history() == {("pump", name, time): (plain(value), 0) for name, time, value in readings}
    assert site.replayed() == site.history()
    assert (site.quarantined(), site.latest()) == ([], {})
    result.check(site.tenant)


async def test_what_the_window_does_not_reach_stays_and_the_remedy_is_named(site: Site) -> None:
    await set_aside(site, ("d", OLD, 1.0), ("d", T0 - 3 * DAY, 2.0), ("d", T0 + 300 * DAY, 3.0))
    result = await release(site)
    assert result.released == 1
    assert +result.kept == Counter({Kept.TOO_OLD: 1, Kept.TOO_NEW: 1})
    assert list(site.history()) == [("pump", "d", T0 - 3 * DAY)]
    assert [time for _, _, time, _ in site.quarantined()] == [OLD, T0 + 300 * DAY]
    with pytest.raises(NotReleased, match=f"atlasco tenant set {site.tenant} --window-past 4[12]d"):
        result.check(site.tenant)
    widen(site, 42)
    again = await release(site)
    assert (again.released, +again.kept) == (1, Counter({Kept.TOO_NEW: 1}))


async def test_a_release_is_a_write_and_the_newest_write_wins(site: Site) -> None:
    await set_aside(site, ("d", OLD, 1.0), ("d", OLD + 1, 5.0))
    widen(site)
    async with site.pool.connection() as connection:
        await connection.execute(
            "SELECT ensure_history(%s, to_timestamp(%s), to_timestamp(%s))",
            [site.tenant_id, OLD // SECOND, OLD // SECOND + 60],
        )
    await site.writer().write(site.batch(Sent("pump", [("d", OLD, 2.0), ("d", OLD + 1, 5.0)])))
    result = await release(site)
    assert (result.released, result.changed, result.corrections) == (2, 1, 1)
    assert site.history() == {("pump", "d", OLD): (1.0, 1), ("pump", "d", OLD + 1): (5.0, 0)}
    # Latest held OLD + 1, which did not change.
    assert site.latest() == {("pump", "d"): (OLD + 1, 5.0)}
    assert site.replayed() == site.history()


async def test_a_correction_of_what_latest_holds_reaches_it(site: Site) -> None:
    await set_aside(site, ("d", T0, 9.0))
    await site.writer().write(site.batch(Sent("pump", [("d", T0, 2.0)])))
    await release(site)
    assert site.latest() == {("pump", "d"): (T0, 9.0)}


@pytest.mark.parametrize("rows_per_batch", [1, 3, 100])
async def test_of_two_values_for_one_key_the_last_one_set_aside_wins(site: Site, rows_per_batch: int) -> None:
    for value in (1.0, 2.0, 3.0):
        await set_aside(site, ("d", OLD, value))
    widen(site)
    result = await release(site, rows_per_batch=rows_per_batch)
    assert result.released == 3
    assert site.history()["pump", "d", OLD][0] == 3.0
    assert site.quarantined() == []
    assert site.replayed() == site.history()


async def test_a_release_can_be_limited(site: Site) -> None:
    await set_aside(site, ("d", OLD, 1.0), ("i", OLD, 1), ("d", T0 - 2000 * DAY, 0.0))
    [(now,)] = site.execute("SELECT clock_timestamp()")
    await set_aside(site, ("d", OLD, 3.0), ("d", OLD + 1, 4.0), device="fan")
    widen(site)
    for selection, expected in (
        (Selection(device="fan", limit=1), [("fan", "d", OLD)]),
        (Selection(attribute="i"), [("pump", "i", OLD)]),
        (Selection(received_before=now), [("pump", "d", OLD)]),
        (Selection(device="pump"), []),
        (Selection(limit=1), [("fan", "d", OLD + 1)]),
    ):
        before = set(site.history())
        await release(site, selection)
        assert set(site.history()) - before == set(expected)


@pytest.mark.parametrize("selection", [Selection(device="nobody"), Selection(attribute="nothing")], ids=str)
async def test_unknown_names_are_an_error(site: Site, selection: Selection) -> None:
    with pytest.raises(NotFound, match="list` shows them"):
        await release(site, selection)
    with pytest.raises(NotFound, match="there is no tenant"):
        await release_quarantined(site.database(), "nobody")


async def test_several_releases_at_once_write_every_reading_once(site: Site) -> None:
    readings = [("d", OLD + n % 60, float(n)) for n in range(120)]
    await set_aside(site, *readings)
    widen(site)
    results = await asyncio.gather(*(release(site, rows_per_batch=7) for _ in range(4)))
    assert sum(result.released for result in results) == 120
    assert site.quarantined() == []
    # The second value of each key came later, whoever wrote it.
    assert {key[2] - OLD: value for key, (value, _) in site.history().items()} == {n: float(n + 60) for n in range(60)}
    assert site.replayed() == site.history()


async def test_an_interrupted_release_is_started_again(site: Site) -> None:
    await set_aside(site, *(("d", OLD + n, float(n)) for n in range(10)))
    widen(site)

    def interrupt(so_far: Released) -> None:
        if so_far.released >= 6:
            raise KeyError

    with pytest.raises(KeyError):
        await release_quarantined(site.database(), site.tenant, rows_per_batch=3, progress=interrupt)
    assert (len(site.history()), len(site.quarantined())) == (6, 4)
    assert (await release(site)).released == 4
    assert len(site.outbox()) == 10


async def test_a_failure_leaves_the_readings_in_quarantine(own_site: Site) -> None:
    await set_aside(own_site, ("d", OLD, 1.0))
    widen(own_site)
    own_site.execute("ALTER TABLE outbox ADD CONSTRAINT test_refusal CHECK (lane < 0)")
    with pytest.raises(StorageError):
        await release(own_site)
    assert (own_site.history(), len(own_site.quarantined())) == ({}, 1)


async def test_a_refused_reading_stays_and_costs_no_other(own_site: Site) -> None:
    await set_aside(own_site, *(("d", OLD + n, float(n)) for n in range(9)))
    widen(own_site)
    own_site.execute("ALTER TABLE entity_attributes_double ADD CONSTRAINT test_refusal CHECK (value <> 4)")
    result = await release(own_site)
    assert (result.released, +result.kept) == (8, Counter({Kept.REFUSED: 1}))
    assert [value for *_, value in own_site.quarantined()] == [4.0]


async def test_a_retired_range_takes_nothing_back(own_site: Site) -> None:
    await set_aside(own_site, ("d", OLD, 1.0), ("d", T0 - DAY, 2.0))
    widen(own_site)
    own_site.execute(
        "SELECT ensure_history(%s, to_timestamp(%s), to_timestamp(%s))",
        own_site.tenant_id, OLD // SECOND, OLD // SECOND + 60,
    )  # fmt: skip
    own_site.execute("UPDATE history_partitions SET retired_at = now() WHERE ts_to < now() - interval '5 days'")
    result = await release(own_site)
    assert (result.released, +result.kept) == (1, Counter({Kept.RETIRED: 1}))
    assert len(own_site.quarantined()) == 1


async def test_readings_of_a_deleted_attribute_stay(own_site: Site) -> None:
    await set_aside(own_site, ("d", OLD, 1.0), ("i", OLD, 1))
    widen(own_site)
    own_site.execute("DELETE FROM attributes WHERE name = 'i'")
    assert +(await release(own_site)).kept == Counter({Kept.DELETED: 1})


# -- the command


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser(prog="atlasco")
    tenant.add_parser(parser.add_subparsers(required=True))
    arguments = parser.parse_args(["tenant", "quarantine", "release", *argv])
    return int(arguments.run(arguments))


async def test_the_command(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in os.environ if name.startswith(("ATLASCO_", "PG"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ATLASCO_DSN", site.database())
    await set_aside(site, ("d", OLD, 1.0), ("d", T0 - 2 * DAY, 2.0))
    assert await asyncio.to_thread(run, site.tenant, "--json", "--device", "pump", "--before", "2100-01-01") == 1
    said = capsys.readouterr()
    assert json.loads(said.out) == {"released": 1, "changed": 1, "corrections": 0, "kept": {"too_old": 1}}
    assert "--window-past" in said.err
    widen(site)
    assert await asyncio.to_thread(run, site.tenant, "--limit", "5") == 0
    assert "released 1 readings" in capsys.readouterr().out
    assert await asyncio.to_thread(run, "nobody") == 1
    for bad in (["--limit", "0"], ["--before", "soon"]):
        with pytest.raises(SystemExit):
            run(site.tenant, *bad)
