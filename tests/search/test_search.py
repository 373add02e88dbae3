"""Finding devices: the same as the evaluator on random filters, from latest values and from a projection."""

import math
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.metrics import MemoryMetrics
from storage.database import Pool
from storage.filter.bind import bind, needs_a_value
from storage.filter.evaluate import matches
from storage.filter.search import FindQuestion, SearchSource, find_entities
from storage.filter.syntax import parse
from storage.reads.model import AttributeNotFound, LatestNotKept
from storage.rollup.config import RollupConfig
from storage.rollup.declare import create_projection, find_projection
from storage.rollup.worker import Worker
from tests.search.conftest import OpenSession
from tests.search.filters import filters
from tests.search.fleet import TENANT, Fleet
from tests.storage.conftest import Database

FIRST: dict[str, Any] = {"page_size": 9, "after": "", "needed_as_of_us": None}
EXAMPLES = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def expected(fleet: Fleet, text: str) -> list[str]:
    tree = bind(parse(text), fleet.attributes)
    return [name for name, device in fleet.devices.items() if matches(tree, device)]


@pytest.fixture(scope="module")
async def projected(fleet: Fleet, worker_pool: Pool, fleet_database: Database) -> None:
    """A projection of all attributes that keep latest values, filled."""
    names = [a.name for a in fleet.attributes.values() if a.keeps_latest]
    await create_projection(worker_pool, fleet.tenant_id, "wide", names)
    worker = Worker(worker_pool, 1, RollupConfig(dsn=fleet_database()), MemoryMetrics())
    await worker.adopt()
    while (await find_projection(worker_pool, fleet.tenant_id, "wide")).status.state != "serving":
        await worker.turn()
    await worker.turn()


@EXAMPLES
@given(data=st.data())
@pytest.mark.parametrize("needed", [None, 0], ids=["latest", "projection"])
async def test_random_filters_find_what_the_evaluator_finds(
    fleet: Fleet, reading: OpenSession, projected: None, needed: int | None, data: st.DataObject
) -> None:
    text = data.draw(filters(list(fleet.attributes.values())))
    async with reading() as session:
        page = await find_entities(session, FindQuestion(text), page_size=1000, after="", needed_as_of_us=needed)
    assert sorted(d.entity.name for d in page.devices) == sorted(expected(fleet, text))
    can = needed is not None and needs_a_value(bind(parse(text), fleet.attributes))
    assert page.source is (SearchSource.PROJECTION if can else SearchSource.LATEST)


@pytest.mark.parametrize("needed", [None, 0], ids=["latest", "projection"])
async def test_pages_hold_everything_once_in_order_with_typed_values(
    fleet: Fleet, reading: OpenSession, projected: None, needed: int | None
) -> None:
    question = FindQuestion("temperature:* or count:*", ["status", "temperature", "count", "on"])
    seen: dict[str, Any] = {}
    after = ""
    while True:
        async with reading() as session:
            page = await find_entities(session, question, page_size=7, after=after, needed_as_of_us=needed)
        assert len(page.devices) <= 7
        for device in page.devices:
            assert device.entity.name not in seen
            seen[device.entity.name] = device
        if page.last is None:
            break
        after = page.last
    assert sorted(seen) == sorted(expected(fleet, question.filter))
    for name, device in seen.items():
        known = fleet.devices[name]
        want = {a: known.values[fleet.attributes[a].attribute_id] for a in question.attributes
                if fleet.attributes[a].attribute_id in known.values}  # fmt: skip
        got = {reading.attribute: reading.value for reading in device.values}
        assert got.keys() == want.keys()
        for key, value in got.items():
            assert type(value) is type(want[key])
            assert value == want[key] or (math.isnan(value) and math.isnan(want[key]))
        assert (device.entity.entity_type, device.entity.labels) == (known.entity_type, known.labels)


async def test_what_is_past_retention_is_no_value(
    owner: psycopg.Connection[Any], fleet: Fleet, reading: OpenSession, projected: None
) -> None:
    owner.execute("UPDATE tenants SET window_past = '1 minute', retention = '1 minute' WHERE name = %s", [TENANT])
    owner.execute("UPDATE latest_values SET ts = now() - interval '1 hour' WHERE entity_id = %s",
                  [fleet.entity_ids["device-0001"]])  # fmt: skip
    try:
        for needed in (None, 0):
            async with reading() as session:
                page = await find_entities(
                    session, FindQuestion("count:* temperature:* on:*", ["count"]), page_size=1000, after="",
                    needed_as_of_us=needed,
                )  # fmt: skip
            if needed is None:
                assert "device-0001" not in {d.entity.name for d in page.devices}
            assert all(r.time_us > session.as_of_us - 60_000_000 for d in page.devices for r in d.values)
    finally:
        owner.execute("UPDATE tenants SET retention = '40 days', window_past = '35 days' WHERE name = %s", [TENANT])
        owner.execute("UPDATE tenants SET kept_from = '-infinity'")


async def test_refusals(fleet: Fleet, reading: OpenSession) -> None:
    async with reading() as session:
        with pytest.raises(AttributeNotFound):
            await find_entities(session, FindQuestion("none > 3"), **FIRST)
        with pytest.raises(LatestNotKept):
            await find_entities(
                session, FindQuestion('"history only" > 3'), page_size=9, after="", needed_as_of_us=None
            )
        with pytest.raises(LatestNotKept):
            await find_entities(
                session, FindQuestion("", ["history only"]), page_size=9, after="", needed_as_of_us=None
            )
        page = await find_entities(
            session, FindQuestion("", only="device-0001"), page_size=9, after="", needed_as_of_us=None
        )
        assert [d.entity.name for d in page.devices] == ["device-0001"]
