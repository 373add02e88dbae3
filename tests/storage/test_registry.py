"""Names become ids: found, registered on first sight where that is allowed, never twice, never beyond the quota."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest
from atlasco.telemetry.v1 import ingest_pb2

from storage.errors import StorageDefect, StorageUnavailable
from storage.model import Reason, RejectedReading, ValueType
from storage.registry import AttributeWanted, Registry, Tenant
from tests.manual_clock import ManualClock
from tests.storage.conftest import Database
from tests.storage.test_commit import Sent, Site, site_of


@pytest.fixture
async def site(module_database: Database, request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    async with site_of(module_database, request.node.name) as made:
        yield made


def registry_of(site: Site, *, register_tenants: bool = False, clock: ManualClock | None = None) -> Registry:
    return Registry(site.pool, register_tenants=register_tenants, clock=clock or ManualClock())


async def known(registry: Registry, name: str) -> Tenant:
    tenant = await registry.tenant(name)
    assert tenant is not None
    return tenant


def wanted(*names: str, value_type: ValueType = ValueType.DOUBLE) -> list[AttributeWanted]:
    return [AttributeWanted(name, value_type) for name in names]


async def test_the_fixed_settings(site: Site, database: Database) -> None:
    settings = await registry_of(site).settings()
    assert (settings.buckets, settings.lanes) == (16, 4)
    async with site_of(database, "acme") as bare:
        bare.execute("DELETE FROM settings")
        with pytest.raises(StorageDefect, match="atlasco migrate"):
            await registry_of(bare).settings()


# -- tenants


async def test_a_fleet_that_comes_back_reads_its_tenant_once(site: Site) -> None:
    await (first := registry_of(site)).attributes(await known(first, site.tenant), wanted("a"))
    registry = registry_of(site)
    read: list[str] = []
    rows = registry._rows

    async def counted(statement: str, parameters: Any) -> Any:
        read.append(statement)
        return await rows(statement, parameters)

    registry._rows = counted  # type: ignore[method-assign,assignment]
    hellos = [asyncio.create_task(registry.tenant(site.tenant)) for _ in range(50)]
    await asyncio.sleep(0)
    # Who began it is gone before it ends.
    hellos[0].cancel()
    found = await asyncio.gather(*hellos[1:])
    assert {tenant.name for tenant in found if tenant is not None} == {site.tenant}
    assert hellos[0].cancelled()
    assert read == ["attributes"]


async def test_a_reading_of_a_tenant_that_fails_fails_for_all_and_is_forgotten(site: Site) -> None:
    registry = registry_of(site)
    row, failures = registry._row, 1

    async def failing(statement: str, parameters: Any) -> Any:
        nonlocal failures
        await asyncio.sleep(0)
        if failures:
            failures -= 1
            raise StorageUnavailable("it is down")
        return await row(statement, parameters)

    registry._row = failing  # type: ignore[method-assign,assignment]
    found = await asyncio.gather(*(registry.tenant(site.tenant) for _ in range(3)), return_exceptions=True)
    assert [type(error) for error in found] == [StorageUnavailable] * 3
    assert (await known(registry, site.tenant)).name == site.tenant


async def test_an_unknown_tenant_is_registered_only_where_allowed(site: Site) -> None:
    name = f"{site.tenant} new"
    assert await registry_of(site).tenant(name) is None
    made = await known(registry_of(site, register_tenants=True), name)
    assert made == await known(registry_of(site), name)
    assert (made.window_past_us, made.window_future_us, made.quarantines) == (7 * 86_400_000_000, 600_000_000, False)


async def test_a_tenant_is_registered_once_by_two_at_once(site: Site) -> None:
    name = f"{site.tenant} new"
    found = await asyncio.gather(*(registry_of(site, register_tenants=True).tenant(name) for _ in range(6)))
    assert len({tenant.tenant_id for tenant in found if tenant}) == 1
    assert None not in found


async def test_what_an_operator_changes_is_noticed_within_the_refresh(site: Site) -> None:
    clock = ManualClock()
    registry = registry_of(site, clock=clock)
    before = await known(registry, site.tenant)
    [attribute] = (await registry.attributes(before, wanted("temperature"))).values()
    assert not isinstance(attribute, str)
    site.execute(
        "UPDATE tenants SET window_past = '1 day', retention = '36 hours', outside_window = 'quarantine' "
        "WHERE tenant_id = %s",
        site.tenant_id,
    )
    site.execute("UPDATE attributes SET keeps_latest = false WHERE tenant_id = %s", site.tenant_id)
    clock.now_s = 0.9
    assert await known(registry, site.tenant) is before
    clock.now_s = 1.1
    after = await known(registry, site.tenant)
    assert (after.window_past_us, after.quarantines) == (86_400_000_000, True)
    assert registry.attributes_by_id[attribute.attribute_id].keeps_latest, "ten thousand attributes, every second?"
    clock.now_s = 30.1
    await known(registry, site.tenant)
    assert not registry.attributes_by_id[attribute.attribute_id].keeps_latest
    [again] = (await registry.attributes(after, wanted("temperature"))).values()
    assert again == registry.attributes_by_id[attribute.attribute_id]


# -- attributes


async def test_an_attribute_keeps_the_type_it_was_registered_with(site: Site) -> None:
    first, second = registry_of(site), registry_of(site)
    tenant = await known(first, site.tenant)
    await known(second, site.tenant)
    made = await first.attributes(tenant, [AttributeWanted("speed", ValueType.BIGINT, "m/s")])
    assert await second.attributes(tenant, wanted("speed")) == made
    assert await first.attributes(tenant, wanted("speed")) == made
    [(kind, unit)] = site.execute("SELECT type::text, unit FROM attributes WHERE tenant_id = %s", site.tenant_id)
    assert (kind, unit) == ("bigint", "m/s")


async def test_unknown_attributes_are_refused_where_they_are_not_registered(site: Site) -> None:
    registry = registry_of(site)
    tenant = await known(registry, site.tenant)
    await registry.attributes(tenant, wanted("old"))
    site.execute("UPDATE tenants SET register_attributes = false WHERE tenant_id = %s", site.tenant_id)
    found = await registry.attributes(tenant, wanted("old", "new"))
    assert not isinstance(found["old"], str)
    assert found["new"] == "unknown"
    # A refusal is not remembered: an operator registers it by command, and it is known.
    site.execute("INSERT INTO attributes (tenant_id, name, type) VALUES (%s, 'new', 'text')", site.tenant_id)
    [late] = (await registry.attributes(tenant, wanted("new"))).values()
    assert not isinstance(late, str)


async def test_two_registrars_fill_the_quota_exactly(site: Site) -> None:
    site.execute("UPDATE tenants SET attribute_quota = 25 WHERE tenant_id = %s", site.tenant_id)
    registries = [registry_of(site) for _ in range(4)]
    tenants = [await known(registry, site.tenant) for registry in registries]
    asked = [[wanted(*(f"{n}-{step}-{i}" for i in range(3))) for step in range(6)] for n in range(len(registries))]

    async def register(place: int) -> list[object]:
        found: list[object] = []
        for part in asked[place]:
            found += (await registries[place].attributes(tenants[place], part)).values()
        return found

    results = [value for part in await asyncio.gather(*map(register, range(4))) for value in part]
    assert sum(value == "quota" for value in results) == 4 * 18 - 25
    assert site.execute("SELECT count(*) FROM attributes WHERE tenant_id = %s", site.tenant_id) == [(25,)]
    # What is registered stays usable at the quota.
    [(name,)] = site.execute("SELECT name FROM attributes WHERE tenant_id = %s LIMIT 1", site.tenant_id)
    assert not isinstance((await registries[0].attributes(tenants[0], wanted(name)))[name], str)


async def test_the_same_names_registered_at_once_are_the_same_attributes(site: Site) -> None:
    registries = [registry_of(site) for _ in range(5)]
    tenants = [await known(registry, site.tenant) for registry in registries]
    names = [f"a{n}" for n in range(20)]
    found = await asyncio.gather(
        *(
            r.attributes(t, wanted(*names[n:], *names[:n]))
            for n, (r, t) in enumerate(zip(registries, tenants, strict=True))
        )
    )
    assert all(one == found[0] for one in found)
    assert len({str(attribute) for attribute in found[0].values()}) == 20


# -- devices


async def test_devices_register_on_first_sight_where_the_tenant_allows_it(site: Site) -> None:
    registry = registry_of(site)
    tenant = await known(registry, site.tenant)
    made = await asyncio.gather(*(registry.entity(tenant, "pump", "pump", {"site": "berlin"}) for _ in range(6)))
    assert len(set(made)) == 1
    assert site.execute("SELECT entity_type, labels FROM entities WHERE tenant_id = %s", site.tenant_id) == [
        ("pump", {"site": "berlin"})
    ]
    site.execute("UPDATE tenants SET register_entities = false WHERE tenant_id = %s", site.tenant_id)
    assert await registry.entity(tenant, "pump", "", {}) == made[0]
    assert await registry.entity(tenant, "fan", "", {}) is None
    assert await registry.open_stream(tenant, "fan", "", {}, uuid4(), most_unconfirmed=1) is None


async def test_a_hello_raises_the_epoch_and_retells_what_is_unconfirmed(site: Site) -> None:
    registry = registry_of(site)
    tenant = await known(registry, site.tenant)
    session = uuid4()
    opened = await registry.open_stream(tenant, "pump", "", {}, session, most_unconfirmed=10)
    assert opened is not None
    assert (opened.committed_sequence, opened.unconfirmed) == (0, [])
    site.devices["pump"] = opened.entity_id
    writer = site.writer()
    for sequence in (1, 2, 3):
        told = [RejectedReading(sequence, Reason.TIMESTAMP_TOO_OLD, "late")]
        await writer.write(site.batch(Sent("pump", [], opened.epoch, sequence, session, rejections=told)))
    again = await registry.open_stream(tenant, "pump", "", {}, session, most_unconfirmed=2)
    assert again is not None
    assert (again.entity_id, again.epoch, again.committed_sequence) == (opened.entity_id, opened.epoch + 1, 3)
    assert [[r.index for r in ack.rejections] for ack in again.unconfirmed] == [[1], [2]]
    assert isinstance(again.unconfirmed[0], ingest_pb2.Ack)
    await registry.confirm_rejections(site.tenant_id, opened.entity_id, session, 2)
    # Another session, another device, another tenant: not theirs.
    await registry.confirm_rejections(site.tenant_id, opened.entity_id, uuid4(), 9)
    await registry.confirm_rejections(site.tenant_id + 1, opened.entity_id, session, 9)
    last = await registry.open_stream(tenant, "pump", "", {}, session, most_unconfirmed=10)
    assert last is not None
    assert [[r.index for r in ack.rejections] for ack in last.unconfirmed] == [[3]]


# -- dictionaries


async def test_a_dictionary_is_what_was_stored_first(site: Site) -> None:
    registry = registry_of(site)
    tenant = await known(registry, site.tenant)
    one, other = uuid4(), uuid4()
    assert await registry.find_dictionary(tenant, one) is None
    stored = await asyncio.gather(
        *(registry.store_dictionary(tenant, one, definition) for definition in (b"a", b"b", b"a"))
    )
    assert len(set(stored)) == 1
    assert (
        await registry.store_dictionary(tenant, one, b"z") == stored[0] == await registry.find_dictionary(tenant, one)
    )
    assert await registry.find_dictionary(tenant, other) is None


async def test_a_dictionary_that_is_used_is_kept_alive(site: Site) -> None:
    registry = registry_of(site)
    tenant = await known(registry, site.tenant)
    name = uuid4()
    await registry.store_dictionary(tenant, name, b"a")
    site.execute("UPDATE dictionaries SET last_used = current_date - 30 WHERE tenant_id = %s", site.tenant_id)
    await registry.find_dictionary(tenant, name)
    assert site.execute("SELECT current_date - last_used FROM dictionaries WHERE tenant_id = %s", site.tenant_id) == [
        (0,)
    ]


async def test_dictionaries_are_bounded_for_each_tenant(site: Site) -> None:
    registry = registry_of(site)
    tenant = await known(registry, site.tenant)
    site.execute(
        "INSERT INTO dictionaries (tenant_id, dictionary_id, definition) "
        "SELECT %s, gen_random_uuid(), '' FROM generate_series(1, 1000)",
        site.tenant_id,
    )
    name = uuid4()
    assert await registry.store_dictionary(tenant, name, b"works all the same") == b"works all the same"
    assert await registry.find_dictionary(tenant, name) is None
