"""Reads against a real database: equal to what is stored, whatever is asked; pruned; ended on time."""

import asyncio
import math
import os
import select
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any

import numpy as np
import psutil
import psycopg
import pytest

from storage.binary import Int4Array, Int8Array
from storage.database import Pool, PoolSettings, Role, bounded_connection, make_pool
from storage.errors import QueryCanceled, StorageBusy, StorageUnavailable
from storage.model import ValueType
from storage.reads.devices import read_attributes, read_entities, read_latest
from storage.reads.model import (
    AnswerTooLarge,
    AttributeNotFound,
    AttributePage,
    EntityNotFound,
    EntityPage,
    LatestAnswer,
    LatestNotKept,
    Position,
    SeriesPage,
    SeriesPart,
    SeriesQuestion,
)
from storage.reads.series import page_statement, read_page
from storage.reads.session import ReadSession, read_session
from storage.reads.tenants import TenantDirectory
from storage.reads.wire import Timestamp
from storage.statements import statements
from tests.gateway.faulty_link import FaultyLink
from tests.storage.reads_database import (
    DAY_US,
    HOUR_US,
    Known,
    known_database,
    register_attribute,
    register_entity,
    store,
)
from tests.waiting import PATIENCE_S, until, wait_until

EARLY_S = 30.0
"""Far less than what never ends; see `endless_driver`."""


class Reads:
    """Each question in a session of its own, which has `timeout_s` for it."""

    def __init__(self, pool: Pool, tenants: TenantDirectory, timeout_s: float = PATIENCE_S) -> None:
        self._pool = pool
        self._tenants = tenants
        self._timeout_s = timeout_s

    def _session(self, tenant: str) -> AbstractAsyncContextManager[ReadSession]:
        return read_session(self._pool, self._tenants, tenant, self._timeout_s)

    async def latest(self, tenant: str, entities: list[str], attributes: list[str]) -> LatestAnswer:
        async with self._session(tenant) as session:
            return await read_latest(session, entities, attributes)

    async def series(
        self, tenant: str, question: SeriesQuestion, *, page_size: int, after: Position | None
    ) -> SeriesPage:
        async with self._session(tenant) as session:
            return await read_page(session, question, page_size, after)

    async def entities(self, tenant: str, **asked: Any) -> EntityPage:
        async with self._session(tenant) as session:
            return await read_entities(session, **asked)

    async def attributes(self, tenant: str, **asked: Any) -> AttributePage:
        async with self._session(tenant) as session:
            return await read_attributes(session, **asked)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Known]:
    with known_database(tmp_path_factory.mktemp("reads")) as made:
        yield made


@pytest.fixture
async def pool(known: Known) -> AsyncIterator[Pool]:
    async with make_pool(PoolSettings(known.dsn("reader"), Role.QUERY, max_size=2)) as opened:
        # Or what a test gives a read would go by while the pool still connects.
        await opened.wait(PATIENCE_S)
        yield opened


@pytest.fixture
def endless_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's own way to give up a statement takes seconds on a server that hangs; here it takes for ever, so
    that how long a read took tells which way it went."""

    async def for_ever(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(psycopg.AsyncConnection, "_try_cancel", for_ever)


@pytest.fixture
async def directory() -> TenantDirectory:
    return TenantDirectory()


@pytest.fixture
def reads(pool: Pool, directory: TenantDirectory) -> Reads:
    return Reads(pool, directory)


@pytest.fixture
def owner(known: Known) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(known.dsn(), autocommit=True) as connection:
        yield connection


def same(a: Any, b: Any) -> bool:
    """Equal in type and value, NaN to NaN and -0.0 to -0.0 only."""
    if isinstance(a, float) and isinstance(b, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return type(a) is type(b) and bool(a == b)


def rows_of(parts: list[SeriesPart]) -> list[tuple[str, str, int, Any, int]]:
    return [
        (part.entity, part.attribute, *row)
        for part in parts
        for row in zip(part.times_us.tolist(), part.values.tolist(), part.revisions.tolist(), strict=True)
    ]


def expected_rows(known: Known, question: SeriesQuestion, tenant: str = "acme") -> list[tuple[str, str, int, Any, int]]:
    """The answer by brute force."""
    oldest = known.now_us - 8 * DAY_US
    rows = []
    step = -1 if question.descending else 1
    for entity in known.names(tenant)[::step]:
        for attribute in known.names(tenant, "attributes")[::step]:
            if entity in question.entities and attribute in question.attributes:
                found = known.readings.get((tenant, entity, attribute), {})
                rows += [
                    (entity, attribute, time_us, *found[time_us])
                    for time_us in sorted(found, reverse=question.descending)
                    if max(question.start_us, oldest) <= time_us < question.end_us
                ]
    return rows


async def all_pages(
    reads: Reads, question: SeriesQuestion, page_size: int, tenant: str = "acme"
) -> list[list[tuple[str, str, int, Any, int]]]:
    pages = []
    after: Position | None = None
    while True:
        page = await reads.series(tenant, question, page_size=page_size, after=after)
        pages.append(rows_of(list(page.parts)))
        after = page.last
        if after is None:
            return pages


@pytest.mark.parametrize("seed", range(24))
async def test_random_questions_get_what_is_stored(known: Known, reads: Reads, seed: int) -> None:
    random = np.random.default_rng(seed)

    def some(names: list[str]) -> list[str]:
        return [str(n) for n in random.permutation(names)[: random.integers(1, len(names) + 1)]]

    start = known.now_us - int(random.integers(0, 10 * DAY_US))
    question = SeriesQuestion(
        some(known.names("acme")),
        some(known.names("acme", "attributes")),
        start,
        start + int(random.integers(1, 10 * DAY_US)),
        descending=bool(seed % 2),
        limit_per_series=int(random.choice([1, 2, 5, 1000])) if seed >= 12 else 0,
    )
    page_size = int(random.integers(1, 200))
    seen: Counter[tuple[str, str]] = Counter()
    expected = []
    for row in expected_rows(known, question):
        seen[row[:2]] += 1
        if not question.limit_per_series or seen[row[:2]] <= question.limit_per_series:
            expected.append(row)
    # The edge of the retention moves on while the test runs.
    pages = await all_pages(reads, question, page_size)
    rows = [row for page in pages for row in page]
    assert len(rows) == len(expected)
    assert all(same(x, y) for got, want in zip(rows, expected, strict=True) for x, y in zip(got, want, strict=True))
    # Full to the last one, and none of them empty when there was something to give.
    assert [len(p) for p in pages[:-1]] == [page_size] * (len(pages) - 1)
    assert pages[-1] or not expected


async def test_latest_values_are_the_newest_readings(known: Known, reads: Reads) -> None:
    names = known.names("acme")
    answer = await reads.latest("acme", [names[3], "ghost", names[0]], [])
    assert list(answer.entities) == [names[3], names[0]]
    assert answer.missing == ["ghost"]
    for name, readings in answer.entities.items():
        expected = {
            attribute: max(found.items())
            for (tenant, entity, attribute), found in known.readings.items()
            if (tenant, entity) == ("acme", name) and max(found) >= known.now_us - 8 * DAY_US
        }
        kept = [a for a in sorted(expected) if a.startswith("attribute-")]
        assert [r.attribute for r in readings] == kept
        for reading in readings:
            time_us, (value, _) = expected[reading.attribute]
            assert reading.time_us == time_us
            assert same(reading.value, value)
    one = await reads.latest("acme", [names[0]], ["attribute-2"])
    everything = answer.entities[names[0]]
    assert [*one.entities[names[0]]] == [r for r in everything if r.attribute == "attribute-2"]


async def test_as_of_is_the_servers_clock_before_the_snapshot(reads: Reads, owner: psycopg.Connection[Any]) -> None:
    def clock() -> int:
        row = owner.execute("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint").fetchone()
        assert row is not None
        return int(row[0])

    before = clock()
    answer = await reads.entities("acme", page_size=1)
    assert before <= answer.as_of_us <= clock()


async def test_attributes_without_latest_value(known: Known, reads: Reads, owner: psycopg.Connection[Any]) -> None:
    entity = known.names("acme")[0]
    register_attribute(owner, known, "acme", "zz-history-only", "double", keeps_latest=False)
    store(owner, known, "acme", entity, "zz-history-only", {known.now_us: (1.5, 0)})
    with pytest.raises(LatestNotKept) as caught:
        await reads.latest("acme", [entity], ["zz-history-only"])
    assert caught.value.name == "zz-history-only"
    answer = await reads.latest("acme", [entity], [])
    assert "zz-history-only" not in [r.attribute for r in answer.entities[entity]]


async def test_what_is_not_there_is_named(known: Known, reads: Reads) -> None:
    entity, attribute = known.names("acme")[0], known.names("acme", "attributes")[0]
    with pytest.raises(AttributeNotFound) as no_attribute:
        await reads.latest("acme", [entity], [attribute, "nope"])
    assert no_attribute.value.name == "nope"
    for entities, attributes, error in (
        ([entity, "ghost"], [attribute], EntityNotFound),
        ([entity], ["nope"], AttributeNotFound),
    ):
        with pytest.raises(error):
            await all_pages(reads, SeriesQuestion(entities, attributes, 1, known.now_us), 10)


async def test_a_tenant_that_never_wrote_has_nothing(known: Known, reads: Reads) -> None:
    assert not (await reads.entities("nobody", page_size=10)).entities
    assert not (await reads.attributes("nobody", page_size=10)).attributes
    assert (await reads.latest("nobody", ["device-1"], [])).missing == ["device-1"]
    with pytest.raises(EntityNotFound):
        await all_pages(reads, SeriesQuestion(["device-1"], ["attribute-0"], 1, known.now_us), 10, "nobody")


async def test_tenants_see_their_own_readings(known: Known, reads: Reads) -> None:
    question = SeriesQuestion(["device-1", "device-2"], ["attribute-0", "attribute-1"], 1, known.now_us)
    for tenant in ("acme", "rival"):
        rows = [row for page in await all_pages(reads, question, 1000, tenant) for row in page]
        assert [r[:3] for r in rows] == [r[:3] for r in expected_rows(known, question, tenant)]


async def test_entities_by_type_and_label_in_pages(known: Known, reads: Reads) -> None:
    for kind, labels in (("", {}), ("pump", {}), ("", {"site": "s1"}), ("fan", {"site": "s2", "line": "south"})):
        found: list[str] = []
        after: str | None = ""
        while after is not None:
            page = await reads.entities("acme", entity_type=kind, labels=labels, page_size=2, after=after)
            found += [e.name for e in page.entities]
            after = page.last
        assert found == sorted(
            name
            for (tenant, name), (its_kind, its_labels) in known.entities.items()
            if tenant == "acme" and kind in ("", its_kind) and labels.items() <= its_labels.items()
        )
    only = await reads.entities("acme", only="device-3", page_size=10)
    assert [e.name for e in only.entities] == ["device-3"]


async def test_attributes_in_pages(known: Known, reads: Reads) -> None:
    first = await reads.attributes("rival", page_size=5)
    assert first.last is not None
    second = await reads.attributes("rival", page_size=5, after=first.last)
    assert second.last is None
    assert {a.name: str(a.type) for a in (*first.attributes, *second.attributes)} == {
        name: kind for (tenant, name), kind in known.attributes.items() if tenant == "rival"
    }


async def test_a_page_of_long_texts_ends_by_bytes(known: Known, reads: Reads, owner: psycopg.Connection[Any]) -> None:
    register_entity(owner, known, "acme", "talker")
    register_attribute(owner, known, "acme", "zz-speech", "text")
    start = known.now_us - HOUR_US
    store(owner, known, "acme", "talker", "zz-speech", {start + n: (f"{n:04}" * 1000, 0) for n in range(1500)})
    for descending in (False, True):
        question = SeriesQuestion(["talker"], ["zz-speech"], start, known.now_us, descending)
        pages = await all_pages(reads, question, 50_000)
        assert [len(p) for p in pages] == [525, 525, 450]
        assert [r for page in pages for r in page] == expected_rows(known, question)


async def test_latest_values_that_fit_no_message(known: Known, reads: Reads, owner: psycopg.Connection[Any]) -> None:
    register_attribute(owner, known, "acme", "zz-essay", "text")
    for number in range(3):
        register_entity(owner, known, "acme", f"writer-{number}")
        store(owner, known, "acme", f"writer-{number}", "zz-essay", {known.now_us: ("x" * 1_000_000, 0)})
    with pytest.raises(AnswerTooLarge):
        await reads.latest("acme", [f"writer-{n}" for n in range(3)], ["zz-essay"])


def plan(owner: psycopg.Connection[Any], known: Known, days: float, *types: ValueType, descending: bool = False) -> str:
    """The plan of a page of all devices over the last `days`, as the query role gets it."""
    tenant = known.tenants["acme"]
    with psycopg.connect(known.dsn("reader"), options="-c search_path=tenant_data,public") as connection:
        cursor = connection.cursor()
        cursor.execute(statements("reads.sql")["enter_tenant"], {"tenant": str(tenant), "timeout_ms": "10000"})
        cursor.execute(statements("reads.sql")["plan_series"])
        cursor.execute(
            psycopg.sql.SQL("EXPLAIN (COSTS OFF) {}").format(page_statement(types, descending=descending)),
            {
                "tenant": tenant,
                "entities": Int8Array([1, 2, 3]),
                **{f"{t}_attributes": Int4Array([1, 2, 3]) for t in types},
                "start": Timestamp(known.now_us - int(days * DAY_US)),
                "end": Timestamp(known.now_us),
                "limit": 1000,
                "bytes": 1000,
            },
        )
        return "\n".join(row[0] for row in cursor.fetchall())


@pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
def test_a_page_reads_only_the_partitions_of_its_range(
    known: Known, owner: psycopg.Connection[Any], descending: bool
) -> None:
    text = plan(owner, known, 1.5, ValueType.DOUBLE, ValueType.BIGINT, descending=descending)
    slot = f"s{known.tenants['acme'] >> 20:03}"
    other = f"s{known.tenants['rival'] >> 20:03}"
    scans = [line for line in text.splitlines() if "Scan" in line and " on entity_attributes_" in line]
    leaves = {line.split(" on ")[1].split()[0] for line in scans if "_20" in line}
    assert slot != other
    # 1.5 days touch two or three calendar days, in each of two typed tables.
    assert 4 <= len(leaves) <= 6, text
    assert all(slot in leaf for leaf in leaves), text
    assert all("Index Scan" in line for line in scans if "_20" in line), text


def test_a_page_is_read_in_key_order(known: Known, owner: psycopg.Connection[Any]) -> None:
    barrier = owner.execute(
        "SELECT 'security_barrier=true' = ANY (reloptions) FROM pg_class "
        "WHERE oid = 'tenant_data.entity_attributes_double'::regclass"
    ).fetchone()
    if barrier is not None and barrier[0]:
        pytest.skip("no order of an index reaches through a security barrier: a page sorts its range")
    for descending in (False, True):
        text = plan(owner, known, 5, ValueType.DOUBLE, ValueType.TEXT, descending=descending)
        assert not [line for line in text.splitlines() if line.strip(" ->") == "Sort"], text


async def test_the_deadline_ends_the_statement_in_the_database(
    known: Known, pool: Pool, directory: TenantDirectory, owner: psycopg.Connection[Any]
) -> None:
    with pytest.raises(QueryCanceled):
        async with read_session(pool, directory, "acme", 0.3) as session:
            await session.run_text("SELECT 'marked', pg_sleep(60)")
    assert_nothing_runs(owner)
    await assert_pool_is_whole(pool, directory)


@pytest.mark.parametrize("attempt", range(5))
async def test_a_cancelled_caller_ends_the_statement_in_the_database(
    known: Known,
    pool: Pool,
    directory: TenantDirectory,
    owner: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
    attempt: int,
) -> None:
    # However long the cancellation takes: a connection that is cut leaves its statement to its own timeout.
    monkeypatch.setattr("storage.reads.session._LONGEST_CANCEL_S", PATIENCE_S)

    # Several times: the cancellation meets the statement while it is prepared, or while it runs.
    async def read() -> None:
        async with read_session(pool, directory, "acme", PATIENCE_S) as session:
            await session.run_text("SELECT 'marked', pg_sleep(60)")

    task = asyncio.create_task(read())
    async with asyncio.timeout(PATIENCE_S):
        # Without a pause in between, or it would never be met while it is prepared.
        while not running(owner):  # noqa: ASYNC110 - the database sends no event
            await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert_nothing_runs(owner)
    await assert_pool_is_whole(pool, directory)


@pytest.mark.parametrize("begun", [True, False])
async def test_a_server_that_hangs_does_not_hold_its_caller(
    known: Known, pool: Pool, directory: TenantDirectory, endless_driver: None, begun: bool
) -> None:
    async with pool.connection() as one, pool.connection() as two:
        backends = [one.info.backend_pid, two.info.backend_pid]
    try:
        if not begun:
            hang(backends)
        with pytest.raises(QueryCanceled):
            async with asyncio.timeout(EARLY_S), read_session(pool, directory, "acme", 1.0) as session:
                assert begun
                hang(backends)
                await session.run_text("SELECT 1")
    finally:
        for backend in backends:
            # One whose read took too long to begin is gone with its connection.
            with suppress(ProcessLookupError):
                os.kill(backend, signal.SIGCONT)
    await assert_pool_is_whole(pool, directory)


async def test_a_connection_that_the_server_ended_is_not_given_out(
    known: Known, pool: Pool, directory: TenantDirectory, owner: psycopg.Connection[Any]
) -> None:
    async with pool.connection() as one, pool.connection() as two:
        backends = [one.info.backend_pid, two.info.backend_pid]
    for backend in backends:
        owner.execute("SELECT pg_terminate_backend(%s, %s)", [backend, round(PATIENCE_S * 1000)])
    await assert_pool_is_whole(pool, directory)
    assert pool.get_stats()["connections_lost"] == 2


async def test_an_idle_connection_that_said_something_is_asked_nothing(
    known: Known, owner: psycopg.Connection[Any], endless_driver: None
) -> None:
    """As a server's last word: the answer to a question might never come."""
    given = psycopg.conninfo.conninfo_to_dict(known.dsn("reader"))
    async with FaultyLink.to(str(given["host"]), int(str(given["port"]))) as link:
        dsn = psycopg.conninfo.make_conninfo(known.dsn("reader"), host="127.0.0.1", port=link.port)
        async with make_pool(PoolSettings(dsn, Role.QUERY, max_size=1)) as through:
            async with bounded_connection(through, wait_s=PATIENCE_S, use_s=PATIENCE_S) as connection:
                await connection.set_autocommit(True)
                await connection.execute("LISTEN word")
            owner.execute("NOTIFY word")
            arrived = select.poll()
            arrived.register(connection.fileno(), select.POLLIN)
            await until(lambda: arrived.poll(0), "the word arrives")
            link.stall()
            with pytest.raises(StorageBusy):
                async with asyncio.timeout(EARLY_S), bounded_connection(through, wait_s=0.5, use_s=0.5):
                    raise AssertionError("it was given out")
            link.resume()


async def test_no_free_connection_is_busy_not_slow(known: Known, pool: Pool, directory: TenantDirectory) -> None:
    async def is_busy() -> bool:
        try:
            await Reads(pool, directory, timeout_s=0.5).entities("acme", page_size=1)
        except StorageUnavailable:
            return True
        except QueryCanceled:
            # The machine stood still for longer than the rest of its time.
            return False
        raise AssertionError("there is no connection")

    async with pool.connection(), pool.connection():
        await until(is_busy, "it says that no connection is free")
    await assert_pool_is_whole(pool, directory)


async def test_reads_cannot_write(pool: Pool, directory: TenantDirectory) -> None:
    async with read_session(pool, directory, "acme", PATIENCE_S) as session:
        cursor = await session.run_text(
            "SELECT current_setting('transaction_read_only'), current_setting('transaction_isolation')"
        )
        assert await cursor.fetchone() == ("on", "repeatable read")


def hang(backends: list[int]) -> None:
    for backend in backends:
        os.kill(backend, signal.SIGSTOP)
    processes = [psutil.Process(backend) for backend in backends]
    wait_until(lambda: all(each.status() == psutil.STATUS_STOPPED for each in processes), "they stand still")


def running(owner: psycopg.Connection[Any]) -> list[Any]:
    return owner.execute(
        "SELECT pid FROM pg_stat_activity WHERE query LIKE '%''marked''%' AND state = 'active' "
        "AND pid <> pg_backend_pid()"
    ).fetchall()


def assert_nothing_runs(owner: psycopg.Connection[Any]) -> None:
    """Not even for a moment after the caller has its error."""
    assert running(owner) == []


async def assert_pool_is_whole(pool: Pool, directory: TenantDirectory) -> None:
    reads = Reads(pool, directory)
    results = await asyncio.gather(*(reads.entities("acme", page_size=1) for _ in range(6)))
    assert all(result.entities for result in results)
    assert pool.get_stats()["pool_available"] >= 1
