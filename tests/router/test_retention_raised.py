"""After a retention was raised, what only the warehouse has is still found, and outlives a rebuild."""

from collections.abc import Iterator

import pytest

from router.execute import Router
from router.plan import Need, SourceKind
from router.questions import Aggregates, SeriesRange
from router.warehouse import WarehouseSource
from storage.aggregate.model import AggregateQuestion, Function, Selection
from storage.loader.rebuild import LogEnd, rebuild_warehouse
from storage.maintenance import maintain
from storage.reads.model import SeriesQuestion
from tests.router.platform import DAY_US, TENANT, Platform
from tests.router.router_support import DATABASE
from tests.waiting import PATIENCE_S


@pytest.fixture(params=["rows", "range"])
def shared(platform: Platform, request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether a neighbour in the same customer partition keeps its readings for longer: then rows are deleted one by
    one. Else the whole range goes, for good, and so that comes second."""
    is_shared = request.param == "rows"
    if is_shared:
        statement = "INSERT INTO tenants (tenant_id, name) VALUES (%s, 'neighbour')"
        platform.owner.execute(statement, [platform.tenant + 1])
    yield is_shared
    platform.owner.execute("DELETE FROM tenants WHERE name = 'neighbour'")


async def test_what_the_warehouse_has_is_found_and_outlives_a_rebuild(
    platform: Platform, router: tuple[Router, WarehouseSource], shared: bool
) -> None:
    routing, source = router
    at = platform.now_us - 14 * DAY_US - int(shared)
    platform.write([("d0", "temperature", at, 7.0), ("d0", "temperature", platform.now_us - 1 - int(shared), 8.0)])
    platform.load()
    platform.owner.execute("UPDATE tenants SET window_past = '1 day', retention = '7 days' WHERE name = %s", [TENANT])
    report = await maintain(platform.server.dsn(DATABASE))
    assert bool(report.ranges_retired) is not shared
    platform.owner.execute("UPDATE tenants SET window_past = '60 days', retention = '60 days'")
    await source.measure()
    ends = (at + 1, platform.now_us)

    async def found(need: Need) -> list[tuple[SourceKind, int, int]]:
        """Where answers came from, with the readings in them: of the old one alone, and of all of them."""
        answers = []
        for end in ends:
            series = SeriesQuestion(["d0"], ["temperature"], at, end)
            page = await routing.read(TENANT, SeriesRange(series, 1000, None), need, PATIENCE_S)
            aggregate = AggregateQuestion(Selection(["d0"]), ["temperature"], at, end, [Function.COUNT])
            summed = await routing.read(TENANT, Aggregates(aggregate, None), need, PATIENCE_S)
            assert page.proof.kind is summed.proof.kind
            assert not [*page.proof.degraded, *summed.proof.degraded]
            ((count,),) = (one.columns[0].values for one in summed.answer.series)
            answers.append((page.proof.kind, sum(len(part.times_us) for part in page.answer.parts), count))
        return answers

    everything = len([t for t in platform.readings["d0", "temperature"] if at <= t < platform.now_us])
    for _ in range(2):
        assert await found(Need(0)) == [(SourceKind.SPLIT, 1, 1), (SourceKind.SPLIT, everything, everything)]
        assert await found(Need(900_000_000)) == [
            (SourceKind.WAREHOUSE, 1, 1),
            (SourceKind.WAREHOUSE, everything, everything),
        ]
        rebuild(platform)
        await source.measure()


def rebuild(platform: Platform) -> None:
    end = LogEnd("topic", {0: platform.offset})
    rebuild_warehouse(platform.server.dsn(DATABASE), platform.warehouse, lambda: end, lambda _: None)
