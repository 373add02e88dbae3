"""The split at the seam: whatever is loaded when, an answer of two sources equals the readings themselves."""

import itertools
import uuid
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from router.clock import PrimaryClock
from router.database import DatabaseSource
from router.execute import Router
from router.outcome import Routed
from router.plan import Need, SourceKind
from router.questions import Aggregates, SeriesRange
from router.tiers import DegradedReason
from router.warehouse import WarehouseSource
from storage.aggregate.buckets import Bucket, BucketUnit, bucket_edges
from storage.aggregate.model import AggregateQuestion, Function, Selection
from storage.database import Pool
from storage.model import ValueType
from storage.reads.model import (
    MAX_TEXT_BYTES,
    EntityNotFound,
    EntityReplaced,
    Position,
    SeriesPage,
    SeriesPart,
    SeriesQuestion,
)
from storage.reads.pages import join_pages
from storage.reads.tenants import TenantDirectory
from tests.router.platform import ATTRIBUTES, DAY_US, DEVICES, HOUR_US, TENANT, TYPES, Platform, some_rows
from tests.waiting import PATIENCE_S

CRITICAL = Need(0)


async def all_pages(
    router: Router, question: SeriesQuestion, size: int, need: Need
) -> tuple[list[tuple[str, str, int, Any, int]], list[Routed[SeriesPage]]]:
    rows: list[tuple[str, str, int, Any, int]] = []
    pages = []
    after: Position | None = None
    while True:
        routed = await router.read(TENANT, SeriesRange(question, size, after), need, PATIENCE_S)
        pages.append(routed)
        page_rows = [
            (part.entity, part.attribute, int(t), v, int(r))
            for part in routed.answer.parts
            for t, v, r in zip(part.times_us, part.values.tolist(), part.revisions, strict=True)
        ]
        assert len(page_rows) <= size
        rows += page_rows
        after = routed.answer.last
        if after is None:
            return rows, pages


@pytest.mark.parametrize("seed", range(4))
async def test_a_split_answer_equals_the_readings(
    platform: Platform, router: tuple[Router, WarehouseSource], seed: int
) -> None:
    random = np.random.default_rng(seed)
    routing, source = router
    # A bound below the time since the last load, so that the warehouse alone is never fresh enough.
    need = Need(1)
    kinds = set()
    for round_ in range(4):
        # Readings of now, late ones, and corrections: hours are few, so that they meet.
        platform.write(some_rows(platform, random, 12, int(random.choice([6, 72, 400])) * HOUR_US))
        if round_ % 2 == 0:
            platform.load()
        elif random.random() < 0.3:
            # Some of them are in the warehouse and nobody has said so.
            platform.load(batches=1)
        await source.measure()
        question = SeriesQuestion(
            list(random.permutation(DEVICES)[: random.integers(1, 4)]),
            list(random.permutation(ATTRIBUTES)[: random.integers(1, 3)]),
            platform.now_us - 16 * DAY_US - int(random.integers(0, 3 * DAY_US)),
            platform.now_us + 1 - int(random.integers(0, 2)) * DAY_US,
            descending=bool(random.integers(0, 2)),
            limit_per_series=int(random.choice([0, 0, 1, 5])),
        )
        rows, pages = await all_pages(routing, question, int(random.integers(12, 60)), need)
        assert rows == platform.expected(question)
        kinds |= {page.proof.kind for page in pages}
    assert SourceKind.SPLIT in kinds


@pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
async def test_small_pages_with_a_limit_leave_no_series_out(
    platform: Platform, router: tuple[Router, WarehouseSource], descending: bool
) -> None:
    """The newer part fills a series up to its limit: pages go on behind what the older part has of it."""
    routing, source = router
    of_each = [(device, i) for device in DEVICES for i in range(4)]
    old_us, new_us = platform.now_us - 10 * DAY_US, platform.now_us - HOUR_US
    platform.write([(device, "temperature", old_us + i * HOUR_US, float(i)) for device, i in of_each])
    platform.load()
    platform.write([(device, "temperature", new_us + i, float(i)) for device, i in of_each])
    await source.measure()
    for limit, size in itertools.product((1, 3, 5), (1, 2, 3, 4)):
        question = SeriesQuestion(
            list(DEVICES), ["temperature"], platform.now_us - 15 * DAY_US, platform.now_us + 1,
            descending=descending, limit_per_series=limit,
        )  # fmt: skip
        rows, pages = await all_pages(routing, question, size, Need(1))
        assert {page.proof.kind for page in pages} == {SourceKind.SPLIT}
        assert rows == platform.expected(question), (limit, size)


@pytest.mark.parametrize("seed", range(4))
async def test_small_pages_of_random_questions_equal_the_readings(
    platform: Platform, router: tuple[Router, WarehouseSource], seed: int
) -> None:
    random = np.random.default_rng(300 + seed)
    routing, source = router
    kinds: set[SourceKind] = set()
    for round_ in range(4):
        # The seam lies as far back as the oldest of these, until they are loaded.
        platform.write(some_rows(platform, random, 12, int(random.choice([6, 72, 400])) * HOUR_US))
        if round_ % 2 == 0:
            platform.load()
        await source.measure()
        for _ in range(3):
            question = SeriesQuestion(
                [str(d) for d in random.permutation(DEVICES)[: random.integers(1, 4)]],
                [str(a) for a in random.permutation(ATTRIBUTES)[: random.integers(1, 3)]],
                platform.now_us - 16 * DAY_US - int(random.integers(0, 3 * DAY_US)),
                platform.now_us + 1 - int(random.integers(0, 2)) * DAY_US,
                descending=bool(random.integers(0, 2)),
                limit_per_series=int(random.choice([0, 1, 2, 5, 9])),
            )
            size = int(random.integers(3, 12) if question.limit_per_series == 0 else random.integers(1, 6))
            rows, pages = await all_pages(routing, question, size, Need(1))
            assert rows == platform.expected(question), (question, size)
            kinds |= {page.proof.kind for page in pages}
    assert SourceKind.SPLIT in kinds


@pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
def test_a_page_of_two_parts_keeps_to_the_text_of_one(descending: bool) -> None:
    text = "x" * 4_096
    question = SeriesQuestion([f"d{i}" for i in range(600)], ["state"], 1, 100, descending=descending)

    def page(time_us: int) -> SeriesPage:
        """The first part's 2 MiB, of many devices."""
        numbers = list(range(512)) if not descending else list(range(599, 87, -1))
        parts = [
            SeriesPart(
                f"d{i}", "state", ValueType.TEXT, np.array([time_us]), np.array([text], object),
                np.zeros(1, np.int32), (i, 1),
            )
            for i in numbers
        ]  # fmt: skip
        return SeriesPage(0, parts, Position(numbers[-1], 0, time_us, numbers[-1]))

    joined = join_pages(question, page(10), page(20), 50_000, None)
    # Two texts of each device: half as many devices.
    ends_in = 599 - 255 if descending else 255
    assert joined.last == Position(ends_in, 0, 10 if descending else 20, ends_in)
    assert sum(len(value) for part in joined.parts for value in part.values) == MAX_TEXT_BYTES


async def test_the_older_part_really_comes_from_the_warehouse(
    platform: Platform, router: tuple[Router, WarehouseSource]
) -> None:
    routing, source = router
    platform.write([("d0", "temperature", platform.now_us - 15 * DAY_US - 7, 1.5)])
    platform.load()
    platform.write([("d0", "temperature", platform.now_us - 7, 2.5)])
    await source.measure()
    try:
        # Past the database's retention: only the warehouse has it now.
        platform.owner.execute("UPDATE tenants SET window_past = '1 day', retention = '10 days'")
        question = SeriesQuestion(["d0"], ["temperature"], platform.now_us - 16 * DAY_US, platform.now_us)
        rows, (page,) = await all_pages(routing, question, 1_000, CRITICAL)
        assert page.proof.kind is SourceKind.SPLIT
        assert not page.proof.degraded
        assert rows == platform.expected(question)
        (older, newer) = sorted(page.attempts[-2:], key=lambda a: a.start_us or 0)
        assert (older.kind, newer.kind) == (SourceKind.WAREHOUSE, SourceKind.PRIMARY)
        assert older.end_us == newer.start_us
    finally:
        platform.owner.execute("UPDATE tenants SET window_past = '60 days', retention = '60 days'")
        # Nothing was dropped meanwhile.
        platform.owner.execute("UPDATE tenants SET kept_from = '-infinity'")


async def test_without_the_warehouse_a_cut_range_is_marked(platform: Platform, pool: Pool) -> None:
    clock = PrimaryClock()
    alone = Router(DatabaseSource(pool, TenantDirectory(), clock), clock)
    question = SeriesQuestion(["d0"], ["temperature"], platform.now_us - 90 * DAY_US, platform.now_us)
    _, (page,) = await all_pages(alone, question, 50_000, CRITICAL)
    assert [d.reason for d in page.proof.degraded] == [DegradedReason.RANGE_CUT]
    _, (page,) = await all_pages(alone, question, 50_000, Need(900_000_000))
    assert {d.reason for d in page.proof.degraded} == {DegradedReason.RANGE_CUT, DegradedReason.NO_WAREHOUSE}


async def test_analytics_are_answered_by_the_warehouse_alone(
    platform: Platform, router: tuple[Router, WarehouseSource]
) -> None:
    routing, source = router
    platform.load()
    await source.measure()
    question = SeriesQuestion(DEVICES, ATTRIBUTES, platform.now_us - 19 * DAY_US, platform.now_us + 1)
    rows, pages = await all_pages(routing, question, 40, Need(900_000_000))
    assert {page.proof.kind for page in pages} == {SourceKind.WAREHOUSE}
    assert rows == platform.expected(question)
    as_of_us = pages[0].proof.as_of_us
    assert all(page.staleness_us >= 0 and page.proof.as_of_us == as_of_us for page in pages)


def summed_up(platform: Platform, question: AggregateQuestion, devices: list[str]) -> dict[tuple[str, str, int], Any]:
    """(device, attribute, bucket) -> count, first and last, and of numbers the mean and the deviation."""
    edges = (
        bucket_edges(question.bucket, question.start_us, question.end_us) if question.bucket else [question.start_us]
    )
    found: dict[tuple[str, str, int], list[tuple[int, Any]]] = {}
    for device in devices:
        for attribute in question.attributes:
            for time_us, (value, _) in platform.readings.get((device, attribute), {}).items():
                if question.start_us <= time_us < question.end_us:
                    at_us = max(edge for edge in edges if edge <= time_us)
                    found.setdefault((device, attribute, at_us), []).append((time_us, value))
    results = {}
    for key, readings in found.items():
        values = [value for _, value in sorted(readings)]
        results[key] = [len(values), values[0], values[-1]]
        if TYPES[key[1]] == "double":
            deviation = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
            results[key] += [float(np.mean(values)), deviation]
    return results


@pytest.mark.parametrize("seed", range(4))
async def test_a_split_aggregate_equals_the_readings(
    platform: Platform, router: tuple[Router, WarehouseSource], seed: int
) -> None:
    random = np.random.default_rng(100 + seed)
    routing, source = router
    kinds: list[SourceKind] = []
    for round_ in range(6):
        platform.write(some_rows(platform, random, 12, int(random.choice([6, 72, 400])) * HOUR_US))
        if round_ % 2 == 0:
            platform.load()
        await source.measure()
        attribute = str(random.choice(ATTRIBUTES))
        functions = [Function.COUNT, Function.FIRST, Function.LAST]
        if TYPES[attribute] == "double":
            functions += [Function.MEAN, Function.STDDEV]
        by_type = bool(random.integers(0, 2))
        devices = [str(d) for d in random.permutation(DEVICES)[: random.integers(1, 4)]]
        question = AggregateQuestion(
            # A filter that only a database can apply, or names.
            Selection(filter='name starts with "d"') if by_type else Selection(devices),
            [attribute],
            platform.now_us - 16 * DAY_US - int(random.integers(0, 3 * DAY_US)),
            platform.now_us + 1,
            functions,
            [None, Bucket(BucketUnit.DAY), Bucket(BucketUnit.HOUR, 6, "Europe/Berlin")][int(random.integers(3))],
            by_entity=True,
            by_attribute=True,
        )
        need = Need(1 if round_ < 4 else 900_000_000)
        routed = await routing.read(TENANT, Aggregates(question, None), need, PATIENCE_S)
        kinds.append(routed.proof.kind)
        found = {
            (series.entity, series.attribute, at_us): [column.values[place] for column in series.columns]
            for series in routed.answer.series
            for place, at_us in enumerate(series.bucket_times_us)
        }
        if routed.proof.kind is SourceKind.WAREHOUSE and round_ % 2:
            # Complete up to its as_of, which lies before what was written since.
            assert routed.proof.as_of_us < platform.one(
                "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
            )
            continue
        wanted = summed_up(platform, question, list(DEVICES) if by_type else devices)
        assert found.keys() == wanted.keys()
        for key, results in found.items():
            assert results == [
                pytest.approx(w, rel=1e-9, nan_ok=True) if isinstance(w, float) else w for w in wanted[key]
            ]
    assert {SourceKind.SPLIT, SourceKind.WAREHOUSE} <= set(kinds)


async def test_a_percentile_is_split_between_buckets_alone(
    platform: Platform, router: tuple[Router, WarehouseSource]
) -> None:
    routing, source = router
    day_us = platform.now_us - platform.now_us % DAY_US
    platform.write([("d1", "temperature", day_us - 9 * DAY_US + hour * HOUR_US, float(hour)) for hour in range(20)])
    platform.load()
    # Within the day that began nine days ago: nothing from that day's beginning on is known to be loaded.
    platform.write([("d1", "temperature", day_us - 9 * DAY_US + 5 * HOUR_US + 7, 100.0)])
    await source.measure()
    question = AggregateQuestion(
        Selection(["d1"]), ["temperature"], day_us - 15 * DAY_US, day_us, [Function.PERCENTILE, Function.COUNT],
        Bucket(BucketUnit.DAY), [50.0],
    )  # fmt: skip
    routed = await routing.read(TENANT, Aggregates(question, None), Need(1), PATIENCE_S)
    assert routed.proof.kind is SourceKind.SPLIT
    (older,) = [a for a in routed.attempts if a.kind is SourceKind.WAREHOUSE]
    assert older.end_us == day_us - 9 * DAY_US
    (series,) = routed.answer.series
    medians = dict(zip(series.bucket_times_us, series.columns[0].values, strict=True))
    of_day = sorted(
        value
        for time_us, (value, _) in platform.readings["d1", "temperature"].items()
        if day_us - 9 * DAY_US <= time_us < day_us - 8 * DAY_US
    )
    assert medians[day_us - 9 * DAY_US] == pytest.approx(float(np.median(of_day)))
    alone = replace(question, bucket=None)
    routed = await routing.read(TENANT, Aggregates(alone, None), Need(1), PATIENCE_S)
    assert routed.proof.kind is SourceKind.PRIMARY


async def test_a_device_that_is_being_deleted_is_in_neither_part(
    platform: Platform, router: tuple[Router, WarehouseSource]
) -> None:
    routing, source = router
    doomed = platform.one("SELECT register_entity(%s, 'doomed', '', '{}')", platform.tenant)
    at_us = platform.now_us - 12 * DAY_US
    platform.ids["doomed"] = doomed
    platform.write([("doomed", "temperature", at_us, 1.0), ("d0", "temperature", at_us + 1, 2.0)])
    platform.load()
    platform.write([("d0", "temperature", platform.now_us - 3, 3.0)])
    await source.measure()
    everything = AggregateQuestion(
        Selection(), ["temperature"], at_us, at_us + 2, [Function.COUNT], by_entity=True, by_attribute=True
    )
    named = replace(everything, selection=Selection(["doomed", "d0"]))
    before = await routing.read(TENANT, Aggregates(everything, None), Need(1), PATIENCE_S)
    assert (before.proof.kind, [s.entity for s in before.answer.series]) == (SourceKind.SPLIT, ["d0", "doomed"])
    assert platform.one("SELECT delete_entity(%s, 'doomed', %s)", platform.tenant, uuid.uuid4()) == "created"
    after = await routing.read(TENANT, Aggregates(everything, None), Need(1), PATIENCE_S)
    assert (after.proof.kind, [s.entity for s in after.answer.series]) == (SourceKind.SPLIT, ["d0"])
    with pytest.raises(EntityNotFound):
        await routing.read(TENANT, Aggregates(named, None), Need(1), PATIENCE_S)
    series = SeriesQuestion(["doomed"], ["temperature"], at_us, at_us + 2)
    with pytest.raises(EntityNotFound):
        await routing.read(TENANT, SeriesRange(series, 10, None), Need(1), PATIENCE_S)


async def test_pages_of_a_split_do_not_go_on_behind_a_device_that_was_replaced(
    platform: Platform, router: tuple[Router, WarehouseSource]
) -> None:
    routing, source = router
    platform.ids["brief"] = platform.one("SELECT register_entity(%s, 'brief', '', '{}')", platform.tenant)
    old_us = platform.now_us - 12 * DAY_US
    platform.write([("brief", "temperature", old_us + i, float(i)) for i in range(4)])
    platform.load()
    platform.write([("brief", "temperature", platform.now_us - 3, 3.0)])
    await source.measure()
    question = SeriesQuestion(["brief"], ["temperature"], old_us, platform.now_us)
    page = await routing.read(TENANT, SeriesRange(question, 2, None), Need(1), PATIENCE_S)
    assert page.answer.last is not None
    assert platform.one("SELECT delete_entity(%s, 'brief', %s)", platform.tenant, uuid.uuid4()) == "created"
    platform.owner.execute("UPDATE entity_deletions SET step = 'done', ended_at = now()")
    platform.ids["brief"] = platform.one("SELECT register_entity(%s, 'brief', '', '{}')", platform.tenant)
    following = SeriesRange(question, 2, page.answer.last)
    for need in (CRITICAL, Need(1)):
        with pytest.raises(EntityReplaced):
            await routing.read(TENANT, following, need, PATIENCE_S)
    # The warehouse as it is goes on with the old one, as of before; when it knows both, a database is asked.
    stale = await routing.read(TENANT, following, Need(900_000_000), PATIENCE_S)
    assert stale.answer.parts[0].entity == "brief"
    platform.write([("brief", "temperature", platform.now_us - 3, 4.0)])
    platform.load()
    await source.measure()
    with pytest.raises(EntityReplaced):
        await routing.read(TENANT, following, Need(900_000_000), PATIENCE_S)


async def test_texts_that_only_a_part_has_are_not_the_answer_s(
    platform: Platform, router: tuple[Router, WarehouseSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    routing, source = router
    platform.ids["wordy"] = platform.one("SELECT register_entity(%s, 'wordy', '', '{}')", platform.tenant)
    older_us, newer_us = platform.now_us - 10 * DAY_US, platform.now_us - HOUR_US
    platform.write([("wordy", "state", older_us, "x" * 400)])
    platform.load()
    platform.write([("wordy", "state", newer_us, "y")])
    await source.measure()
    question = AggregateQuestion(Selection(["wordy"]), ["state"], older_us, platform.now_us + 1, [Function.LAST])
    kinds = []
    for limit in (1_000, 100):
        monkeypatch.setattr("storage.aggregate.text_bound.MAX_AGGREGATE_TEXT_BYTES", limit)
        routed = await routing.read(TENANT, Aggregates(question, None), Need(1), PATIENCE_S)
        assert [column.values for column in routed.answer.series[0].columns] == [["y"]]
        kinds.append(routed.proof.kind)
    assert kinds == [SourceKind.SPLIT, SourceKind.PRIMARY]
