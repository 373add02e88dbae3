"""A device whose deletion was ordered is in no answer that is complete past the order, while nobody carries it out."""

from collections.abc import AsyncIterator
from uuid import uuid4

import pytest

from router.execute import Router
from router.plan import Need, SourceKind
from router.questions import Aggregates, SeriesRange
from router.warehouse import WarehouseSource
from storage.aggregate_model import AggregateQuestion, Function, Selection
from storage.database import Pool, PoolSettings, Role, make_pool
from storage.deletion import order_deletion
from storage.read_model import EntityNotFound, SeriesQuestion
from tests.router.platform import DAY_US, TENANT, Platform
from tests.router.router_support import DATABASE

TIMEOUT_S = 20.0
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
        answer = await routing.read(TENANT, Aggregates(question, None), need, TIMEOUT_S)
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
            await routing.read(TENANT, SeriesRange(by_name, 10, None), need, TIMEOUT_S)
