"""A device whose deletion was ordered is in no answer that is complete past the order, while nobody carries it out."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest

from router.execute import Router
from router.plan import Need, SourceKind
from router.questions import Aggregates, SeriesRange
from router.warehouse import WarehouseSource
from storage.aggregate import warehouse
from storage.aggregate.buckets import Bucket, BucketUnit
from storage.aggregate.model import AggregateQuestion, Function, Selection
from storage.aggregate.text_bound import TooMuchText
from storage.database import Pool, PoolSettings, Role, make_pool
from storage.deletion import order_deletion
from storage.reads.model import EntityNotFound, SeriesQuestion
from tests.router.platform import DAY_US, HOUR_US, TENANT, Platform
from tests.router.router_support import DATABASE
from tests.waiting import PATIENCE_S

CRITICAL, ANALYTICS = Need(0), Need(900_000_000)


@pytest.fixture
async def ingest_pool(platform: Platform) -> AsyncIterator[Pool]:
    dsn = platform.server.dsn(DATABASE, "test_ingest")
    async with make_pool(PoolSettings(dsn, Role.INGEST, max_size=1)) as opened:
        yield opened


async def test_no_answer_that_is_complete_past_the_order_shows_it(
    platform: Platform, router: tuple[Router, WarehouseSource], ingest_pool: Pool
) -> None:
    routing, source = router
    for name in ("doomed", "stays"):
        platform.ids[name] = platform.one("SELECT register_entity(%s, %s, '', '{}')", platform.tenant, name)
    at = platform.now_us - 12 * DAY_US - 77
    platform.write([("doomed", "temperature", at, 1.0), ("stays", "temperature", at, 1.0)])
    platform.load()
    await source.measure()

    async def counted(need: Need, *, by_entity: bool) -> tuple[SourceKind, int, dict[str, int]]:
        question = AggregateQuestion(
            Selection(), ["temperature"], at, at + 1, [Function.COUNT], by_entity=by_entity, by_attribute=True
        )
        answer = await routing.read(TENANT, Aggregates(question, None), need, PATIENCE_S)
        counts = {one.entity: one.columns[0].values[0] for one in answer.answer.series}
        return answer.proof.kind, answer.proof.as_of_us, counts

    kind, _, counts = await counted(ANALYTICS, by_entity=False)
    assert (kind, counts) == (SourceKind.WAREHOUSE, {"": 2})
    await order_deletion(ingest_pool, platform.tenant, "doomed", uuid4())
    ordered_us = platform.one("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")
    # The warehouse goes on; the worker that carries deletions out does not.
    platform.load()
    await source.measure()
    for need, expected in ((ANALYTICS, SourceKind.WAREHOUSE), (CRITICAL, SourceKind.PRIMARY)):
        for by_entity in (False, True):
            kind, as_of_us, counts = await counted(need, by_entity=by_entity)
            assert (kind, counts) == (expected, {"stays" if by_entity else "": 1})
            assert as_of_us >= ordered_us
        with pytest.raises(EntityNotFound):
            by_name = SeriesQuestion(["doomed"], ["temperature"], at, at + 1)
            await routing.read(TENANT, SeriesRange(by_name, 10, None), need, PATIENCE_S)


async def test_texts_of_a_device_that_goes_meanwhile_do_not_cut_an_answer_short(
    platform: Platform,
    router: tuple[Router, WarehouseSource],
    ingest_pool: Pool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It goes between the statement, which stops at the bound of texts, and the look-up of the devices' names."""
    routing, source = router
    at_us = (platform.now_us - 12 * DAY_US) // HOUR_US * HOUR_US
    for name in ("going", "staying"):
        platform.ids[name] = platform.one("SELECT register_entity(%s, %s, '', '{}')", platform.tenant, name)
    for hour in range(10):
        platform.write([("going", "state", at_us + hour * HOUR_US, "x" * 100)])
        platform.write([("staying", "state", at_us + hour * HOUR_US, f"{hour:010}")])
    platform.load()
    await source.measure()
    bucket = Bucket(BucketUnit.HOUR)
    question = AggregateQuestion(Selection(), ["state"], at_us, at_us + DAY_US, [Function.LAST], bucket, by_entity=True)
    loop, names = asyncio.get_running_loop(), warehouse._device_names

    def meanwhile(*arguments: Any) -> Any:
        ordering = order_deletion(ingest_pool, platform.tenant, "going", uuid4())
        asyncio.run_coroutine_threadsafe(ordering, loop).result(PATIENCE_S)
        platform.load()
        return names(*arguments)

    monkeypatch.setattr(warehouse, "_device_names", meanwhile)
    monkeypatch.setattr("storage.aggregate.text_bound.MAX_AGGREGATE_TEXT_BYTES", 500)
    with pytest.raises(TooMuchText):
        await routing.read(TENANT, Aggregates(question, None), ANALYTICS, PATIENCE_S)
