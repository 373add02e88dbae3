"""What operators do with tenants, devices and attributes."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from storage.administration import (
    Administration,
    AlreadyThere,
    NotFound,
    QuotaReached,
    SettingRefused,
    TenantSettings,
)
from storage.errors import StorageUnavailable
from storage.model import ValueType
from tests.storage.conftest import Database

DAY = 86400.0


@pytest.fixture
async def administration(database: Database) -> AsyncIterator[Administration]:
    async with Administration(database()) as opened:
        yield opened


def execute(database: Database, query: str, *parameters: object) -> list[tuple[object, ...]]:
    with psycopg.connect(database(), autocommit=True) as connection:
        cursor = connection.execute(query.encode(), parameters)
        return cursor.fetchall() if cursor.description else []


# -- tenants


async def test_a_tenant_is_made_with_its_settings(administration: Administration) -> None:
    settings = TenantSettings(
        retention_s=365 * DAY,
        window_past_s=30 * DAY,
        window_future_s=60.0,
        outside_window="quarantine",
        attribute_quota=5,
        register_entities=False,
        register_attributes=False,
    )
    made = await administration.create_tenant("acme", settings)
    assert made == await administration.tenant("acme")
    assert not made.dedicated
    assert (made.retention_s, made.window_past_s, made.window_future_s) == (365 * DAY, 30 * DAY, 60.0)
    assert (made.outside_window, made.attribute_quota) == ("quarantine", 5)
    assert (made.register_entities, made.register_attributes) == (False, False)


async def test_a_dedicated_tenant_has_a_partition_of_its_own(administration: Administration) -> None:
    assert (await administration.create_tenant("large", dedicated=True)).tenant_id >= 1 << 30


async def test_what_is_not_given_stays(administration: Administration) -> None:
    made = await administration.create_tenant("acme")
    changed = await administration.set_tenant("acme", TenantSettings(attribute_quota=7))
    assert changed.attribute_quota == 7
    assert (changed.retention_s, changed.window_past_s) == (made.retention_s, made.window_past_s) == (90 * DAY, 7 * DAY)
    assert [row.name for row in await administration.tenants()] == ["acme"]


async def test_a_tenant_is_made_once_and_wholly_or_not_at_all(administration: Administration) -> None:
    with pytest.raises(SettingRefused):
        await administration.create_tenant("acme", TenantSettings(retention_s=1.0))
    assert await administration.tenants() == []
    await administration.create_tenant("acme")
    with pytest.raises(AlreadyThere, match="tenant set"):
        await administration.create_tenant("acme")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        pytest.param(TenantSettings(retention_s=DAY), "retention must be at least window-past", id="together"),
        pytest.param(TenantSettings(window_past_s=1.0), "window-past must be", id="window-past"),
        pytest.param(TenantSettings(window_future_s=8 * DAY), "window-future must be", id="window-future"),
        pytest.param(TenantSettings(retention_s=200 * 366 * DAY), "100 years", id="retention"),
        pytest.param(TenantSettings(attribute_quota=-1), "attribute-quota", id="quota"),
        pytest.param(TenantSettings(attribute_quota=1 << 40), "out of range", id="quota-too-large"),
    ],
)
async def test_settings_out_of_bounds_say_which(
    administration: Administration, settings: TenantSettings, text: str
) -> None:
    before = await administration.create_tenant("acme")
    with pytest.raises(SettingRefused, match=text):
        await administration.set_tenant("acme", settings)
    assert await administration.tenant("acme") == before


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 129], ids=["empty", "control", "long"])
async def test_names_out_of_bounds(administration: Administration, name: str) -> None:
    with pytest.raises(SettingRefused, match="128 bytes"):
        await administration.create_tenant(name)
    await administration.create_tenant("acme")
    with pytest.raises(SettingRefused, match="128 bytes"):
        await administration.add_device("acme", name)
    with pytest.raises(SettingRefused, match="128 bytes"):
        await administration.add_attribute("acme", name, ValueType.TEXT)


async def test_an_unknown_tenant_says_what_to_do(administration: Administration) -> None:
    for work in (
        administration.tenant("nobody"),
        administration.set_tenant("nobody", TenantSettings()),
        administration.add_device("nobody", "x"),
        administration.devices("nobody"),
        administration.add_attribute("nobody", "x", ValueType.TEXT),
        administration.set_attribute("nobody", "x"),
        administration.attributes("nobody"),
        administration.quarantined("nobody"),
        administration.discard_quarantined("nobody"),
    ):
        with pytest.raises(NotFound, match="tenant create"):
            await work


# -- devices and attributes


async def test_devices_are_registered_by_command_and_listed_in_pages(administration: Administration) -> None:
    await administration.create_tenant("acme", TenantSettings(register_entities=False))
    for number in range(5):
        await administration.add_device("acme", f"pump-{number}", entity_type="pump", labels={"site": "berlin"})
    await administration.add_device("acme", "fan-1", entity_type="fan")
    first = await administration.devices("acme", limit=4)
    rest = await administration.devices("acme", after=first[-1].external_id, limit=4)
    assert [row.external_id for row in first + rest] == ["fan-1", *(f"pump-{number}" for number in range(5))]
    assert first[1].labels == {"site": "berlin"}
    assert [row.external_id for row in await administration.devices("acme", entity_type="fan")] == ["fan-1"]
    with pytest.raises(AlreadyThere):
        await administration.add_device("acme", "fan-1")


async def test_attributes_are_registered_by_command_up_to_the_quota(administration: Administration) -> None:
    await administration.create_tenant("acme", TenantSettings(register_attributes=False, attribute_quota=2))
    await administration.add_attribute("acme", "temperature", ValueType.DOUBLE, unit="Cel")
    await administration.add_attribute("acme", "raw", ValueType.TEXT, keeps_latest=False)
    with pytest.raises(AlreadyThere, match="double"):
        await administration.add_attribute("acme", "temperature", ValueType.BIGINT)
    with pytest.raises(QuotaReached, match="attribute-quota"):
        await administration.add_attribute("acme", "third", ValueType.BIGINT)
    with pytest.raises(SettingRefused, match="32 bytes"):
        await administration.set_attribute("acme", "raw", unit="x" * 33)
    rows = await administration.attributes("acme")
    assert [(row.name, row.type, row.unit, row.keeps_latest) for row in rows] == [
        ("raw", ValueType.TEXT, "", False),
        ("temperature", ValueType.DOUBLE, "Cel", True),
    ]


async def test_switching_latest_values_removes_what_would_go_stale(
    database: Database, administration: Administration
) -> None:
    tenant = (await administration.create_tenant("acme")).tenant_id
    ids = [await administration.add_attribute("acme", name, ValueType.DOUBLE) for name in ("speed", "heat")]
    for attribute in ids:
        execute(
            database,
            "INSERT INTO latest_values SELECT %s, %s, n, now(), 1 FROM generate_series(1, 20) n",
            tenant,
            attribute,
        )
    assert await administration.set_attribute("acme", "speed", keeps_latest=True) == 0
    assert await administration.set_attribute("acme", "speed", keeps_latest=False) == 20
    execute(database, "INSERT INTO latest_values VALUES (%s, %s, 1, now(), 1)", tenant, ids[0])
    assert await administration.set_attribute("acme", "speed", keeps_latest=True) == 1
    assert execute(database, "SELECT DISTINCT attribute_id, count(*) FROM latest_values GROUP BY 1") == [(ids[1], 20)]
    with pytest.raises(NotFound, match="attribute list"):
        await administration.set_attribute("acme", "colour", keeps_latest=True)


# -- quarantine


@pytest.fixture
async def set_aside(database: Database, administration: Administration) -> list[int]:
    """Four readings of acme, one of every type and an hour apart, newest last, and one of another tenant."""
    for name in ("acme", "globex"):
        tenant = (await administration.create_tenant(name)).tenant_id
        entity = await administration.add_device(name, "pump")
        attribute = await administration.add_attribute(name, "speed", ValueType.DOUBLE)
        for hours, column, value in (
            (3, "double_value", "1.5"),
            (2, "bigint_value", "9007199254740993"),
            (1, "boolean_value", "false"),
            (0, "text_value", "'x'"),
        ):
            execute(
                database,
                f"INSERT INTO quarantine (tenant_id, entity_id, attribute_id, ts, {column}, reason, received_at)"
                f" VALUES (%s, %s, %s, '2001-01-01Z', {value}, 'TOO_OLD', now() - make_interval(hours => %s))",
                tenant,
                entity,
                attribute,
                hours,
            )
    return [row.quarantine_id for row in await administration.quarantined("acme")]


async def test_what_was_set_aside_is_listed_with_its_values(
    administration: Administration, set_aside: list[int]
) -> None:
    rows = await administration.quarantined("acme")
    assert [row.value for row in rows] == [1.5, 9007199254740993, False, "x"]
    assert {(row.device, row.attribute, row.reason) for row in rows} == {("pump", "speed", "TOO_OLD")}
    assert await administration.quarantined("acme", after=set_aside[1], limit=1) == [rows[2]]
    assert (await administration.tenant("acme")).quarantined == 4


async def test_discarding_takes_what_was_named_and_nothing_of_others(
    administration: Administration, set_aside: list[int]
) -> None:
    others = [row.quarantine_id for row in await administration.quarantined("globex")]
    assert await administration.discard_quarantined("acme", ids=[set_aside[3], others[0]]) == 1
    cut = datetime.now(UTC) - timedelta(minutes=150)
    assert await administration.discard_quarantined("acme", received_before=cut) == 1
    assert [row.quarantine_id for row in await administration.quarantined("acme")] == set_aside[1:3]
    assert await administration.discard_quarantined("acme") == 2
    assert len(await administration.quarantined("globex")) == 4


# -- faults


async def test_no_server_is_unavailable() -> None:
    with pytest.raises(StorageUnavailable):
        async with Administration("host=127.0.0.1 port=1 dbname=x user=x"):
            pass


async def test_after_a_refusal_the_connection_still_works(administration: Administration) -> None:
    for _ in range(3):
        with pytest.raises(SettingRefused):
            await administration.create_tenant("")
    await administration.create_tenant("acme")


async def test_of_two_who_make_a_tenant_one_is_told(database: Database) -> None:
    async with Administration(database()) as one, Administration(database()) as two:
        results = await asyncio.gather(one.create_tenant("acme"), two.create_tenant("acme"), return_exceptions=True)
        assert len(await one.tenants()) == 1
    assert any(not isinstance(result, BaseException) for result in results)
