"""The write transaction when something is against it: moved devices, lost connections, refused rows, other writers."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import numpy as np
import psycopg
import pytest

from storage.commit import Writer
from storage.database import Connection
from storage.errors import DataRefused, NoPartition, StorageUnavailable
from storage.fence import fence_streams
from storage.model import BatchMessage, Outcome, Reason, RejectedReading, ValueType
from storage.outbox import ensure_outbox
from tests.storage.conftest import INGEST_LOGIN, Database
from tests.storage.test_commit import T0, Sent, Site, site_of
from tests.waiting import PATIENCE_S, until


@pytest.fixture
async def site(module_database: Database, request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    async with site_of(module_database, request.node.name) as made:
        yield made


@pytest.fixture
async def own_site(database: Database) -> AsyncIterator[Site]:
    """A site in a database of the test's own, whose tables it may change."""
    async with site_of(database, "acme") as made:
        yield made


# -- the fence


async def test_what_a_left_stream_still_holds_is_dropped(site: Site) -> None:
    """A holds message 5; the device moves to B, sends 5 again and a newer value in 6; then A writes."""
    session = uuid4()
    old, _ = site.hello("pump", session)
    held = site.batch(Sent("pump", [("d", T0, 1.0)], old, 5, session))
    new, committed = site.hello("pump", session)
    assert (new, committed) == (old + 1, 0)
    writer = site.writer()
    await writer.write(site.batch(Sent("pump", [("d", T0, 1.0)], new, 5, session)))
    await writer.write(site.batch(Sent("pump", [("d", T0, 2.0)], new, 6, session)))
    before = site.history(), site.latest(), site.outbox()
    written = await site.writer().write(held)
    assert written.outcomes == [Outcome.STALE]
    assert (site.history(), site.latest(), site.outbox()) == before


async def test_a_repeated_message_is_dropped_and_its_neighbour_is_not(site: Site) -> None:
    session = uuid4()
    epoch, _ = site.hello("pump", session)
    writer = site.writer()
    await writer.write(site.batch(Sent("pump", [("d", T0, 1.0)], epoch, 1, session)))
    await writer.write(site.batch(Sent("pump", [("d", T0, 2.0)], epoch, 2, session)))
    written = await writer.write(
        site.batch(
            Sent("pump", [("d", T0, 1.0)], epoch, 1, session, aside=[("d", 1, 1.0)]),
            Sent("pump", [("d", T0 + 1, 3.0)], epoch, 3, session),
        )
    )
    assert written.outcomes == [Outcome.REPEATED, Outcome.COMMITTED]
    assert site.history() == {("pump", "d", T0): (2.0, 1), ("pump", "d", T0 + 1): (3.0, 0)}
    assert site.quarantined() == []
    assert site.hello("pump", session)[1] == 3


async def test_a_stream_that_was_opened_by_nobody_is_stale(site: Site) -> None:
    written = await site.writer().write(site.batch(Sent("pump", [("d", T0, 1.0)], 1, 1, uuid4())))
    assert written.outcomes == [Outcome.STALE]
    assert site.history() == {}


async def test_every_session_has_a_sequence_of_its_own(site: Site) -> None:
    first, second = uuid4(), uuid4()
    writer = site.writer()
    epoch, _ = site.hello("pump", first)
    await writer.write(site.batch(Sent("pump", [("d", T0, 1.0)], epoch, 1, first)))
    epoch, committed = site.hello("pump", second)
    assert committed == 0
    written = await writer.write(site.batch(Sent("pump", [("d", T0 + 1, 1.0)], epoch, 1, second)))
    assert written.outcomes == [Outcome.COMMITTED]
    assert site.hello("pump", first)[1] == 1
    assert site.hello("pump", second)[1] == 1


async def test_a_hello_waits_for_the_write_that_is_under_way(site: Site) -> None:
    """Else it would name a sequence that a moment later is not the last one any more."""
    session = uuid4()
    epoch, _ = site.hello("pump", session)
    batch = site.batch(Sent("pump", [("d", T0, 1.0)], epoch, 1, session))
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def fence(connection: Connection, messages: Sequence[BatchMessage]) -> list[Outcome]:
        outcomes = await fence_streams(connection, messages)
        inside.set()
        await go_on.wait()
        return outcomes

    writing = asyncio.create_task(site.writer().write(batch, fence=fence))
    await until(inside.is_set, "the write is under way", beside=writing)
    hello = asyncio.create_task(asyncio.to_thread(site.hello, "pump", session))
    await until(lambda: lock_waiters(site), "the hello waits", beside=hello)
    go_on.set()
    assert (await writing).outcomes == [Outcome.COMMITTED]
    assert await hello == (epoch + 1, 1)


async def lock_waiters(site: Site, count: int = 1) -> bool:
    [(found,)] = site.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    return bool(found >= count)


# -- lost connections


async def test_a_connection_lost_before_commit_leaves_nothing(site: Site) -> None:
    session = uuid4()
    epoch, _ = site.hello("pump", session)
    batch = site.batch(Sent("pump", [("d", T0, 1.0), ("s", T0, "x")], epoch, 1, session))

    async def fence(connection: Connection, messages: Sequence[BatchMessage]) -> list[Outcome]:
        outcomes = await fence_streams(connection, messages)
        site.execute("SELECT pg_terminate_backend(%s, %s)", connection.info.backend_pid, round(PATIENCE_S * 1000))
        return outcomes

    with pytest.raises(StorageUnavailable):
        await site.writer().write(batch, fence=fence)
    assert (site.history(), site.outbox()) == ({}, [])
    written = await retried(site.writer(), batch)
    assert written == [Outcome.COMMITTED]
    assert len(site.outbox()) == len(site.history()) == 2


async def retried(writer: Writer, batch: Any) -> list[Outcome]:
    """Written as a lane does it: until it succeeds. A pool hands out connections that died unnoticed."""
    for _ in range(10):
        try:
            return (await writer.write(batch)).outcomes
        except StorageUnavailable:
            continue
    raise AssertionError("the writer did not recover")


@contextmanager
def commits_that_hang(database: Database) -> Iterator[None]:
    """Every COMMIT is carried out and then answered to nobody: it waits for a standby that does not exist."""

    def configure(statement: bytes) -> None:
        with psycopg.connect(database(), autocommit=True) as connection:
            connection.execute("SET synchronous_commit = local")
            connection.execute(statement)
            connection.execute("SELECT pg_reload_conf()")

    configure(b"ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    try:
        yield
    finally:
        configure(b"ALTER SYSTEM RESET synchronous_standby_names")


async def test_a_commit_that_was_never_answered_is_written_once(site: Site) -> None:
    session = uuid4()
    epoch, _ = site.hello("pump", session)
    told = [RejectedReading(5, Reason.TIMESTAMP_TOO_OLD, "late")]
    sent = Sent("pump", [("d", T0, 1.0), ("d", T0, 2.0)], epoch, 1, session, aside=[("d", 1, 9.0)], rejections=told)
    batch = site.batch(sent)
    writer = site.writer()

    async def hanging() -> list[tuple[Any, ...]]:
        return site.execute(
            "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND usename = %s", INGEST_LOGIN
        )

    with commits_that_hang(site.database):
        writing = asyncio.create_task(writer.write(batch))
        await until(hanging, "the commit waits for its standby", beside=writing)
        for (pid,) in await hanging():
            site.execute("SELECT pg_terminate_backend(%s)", pid)
        with pytest.raises(StorageUnavailable):
            await writing
    # Committed, and nobody was told; what the batch says of its message is as it was.
    before = site.history(), site.latest(), site.outbox(), site.quarantined()
    assert before[0] == {("pump", "d", T0): (2.0, 0)}
    assert batch.messages[0].rejections == told
    assert await retried(writer, batch) == [Outcome.REPEATED]
    assert (site.history(), site.latest(), site.outbox(), site.quarantined()) == before
    # The device is told all the same.
    assert [(r.index, r.reason) for r in batch.messages[0].rejections] == [
        (5, Reason.TIMESTAMP_TOO_OLD),
        (0, Reason.SUPERSEDED_IN_MESSAGE),
    ]


async def test_a_repeated_message_is_not_rejected_by_todays_window(site: Site) -> None:
    """It was stored whole when it came first; what it would be rejected for now is not true of it."""
    session = uuid4()
    epoch, _ = site.hello("pump", session)
    writer = site.writer()
    await writer.write(site.batch(Sent("pump", [("d", T0, 1.0)], epoch, 1, session)))
    again = site.batch(
        Sent("pump", [], epoch, 1, session, rejections=[RejectedReading(0, Reason.TIMESTAMP_TOO_OLD, "late")])
    )
    assert (await writer.write(again)).outcomes == [Outcome.REPEATED]
    assert again.messages[0].rejections == []


# -- refused rows


def refuse(site: Site, table: str, condition: str) -> None:
    site.execute(f"ALTER TABLE {table} ADD CONSTRAINT test_refusal CHECK ({condition})")


@pytest.mark.parametrize("offenders", [[], [0], [49], [3, 4, 31], list(range(50))], ids=str)
async def test_halving_finds_exactly_the_offenders(own_site: Site, offenders: list[int]) -> None:
    refuse(own_site, "entity_attributes_double", "value < 1000")
    refuse(own_site, "entity_attributes_text", "value <> 'bad'")
    readings = [("d", T0 + n, 2000.0 + n if n in offenders else float(n)) for n in range(50)]
    batch = own_site.batch(Sent("pump", [*readings, ("s", T0, "good"), ("s", T0 + 1, "bad"), ("i", T0, 1)]))
    writer = own_site.writer()
    if offenders:
        with pytest.raises(DataRefused) as refusal:
            await writer.write(batch)
        assert not isinstance(refusal.value, NoPartition)
    found = await writer.find_refused(batch)
    assert sorted(position for position, _ in found.get(ValueType.DOUBLE, [])) == offenders
    assert [position for position, _ in found[ValueType.TEXT]] == [1]
    assert all("test_refusal" in text for part in found.values() for _, text in part)
    assert ValueType.BIGINT not in found
    assert (own_site.history(), own_site.outbox(), own_site.latest()) == ({}, [], {})
    for value_type, part in found.items():
        columns = batch.readings[value_type]
        bad = np.isin(np.arange(len(columns)), [position for position, _ in part])
        batch.readings[value_type] = columns.take(~bad)
    written = await writer.write(batch)
    assert written.changes == 50 - len(offenders) + 2
    assert own_site.history() == own_site.replayed()


async def test_a_refused_row_is_found_among_readings_that_are_there_already(own_site: Site) -> None:
    writer = own_site.writer()
    await writer.write(own_site.batch(Sent("pump", [("d", T0 + n, 1.0) for n in range(4)])))
    refuse(own_site, "entity_attributes_double", "value < 1000")
    batch = own_site.batch(Sent("pump", [("d", T0, 1.0), ("d", T0 + 1, 5000.0), ("d", T0 + 9, 2.0)]))
    assert [p for p, _ in (await writer.find_refused(batch))[ValueType.DOUBLE]] == [1]
    assert {value for value, _ in own_site.history().values()} == {1.0}


async def test_a_reading_without_a_partition_is_known_as_such(site: Site) -> None:
    batch = site.batch(Sent("pump", [("d", T0, 1.0), ("d", T0 - 400 * 86_400 * 1_000_000, 1.0)]))
    for _ in range(2):
        with pytest.raises(NoPartition):
            await site.writer().write(batch)
    [(position, _)] = (await site.writer().find_refused(batch))[ValueType.DOUBLE]
    assert position == 1
    assert site.history() == {}


async def test_an_outbox_without_a_partition_loses_nothing(own_site: Site) -> None:
    """The failure comes in the pipeline that ends with COMMIT: nothing is committed, and the reason is seen."""
    for (leaf,) in own_site.execute(
        "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'outbox'::regclass"
    ):
        own_site.execute(f"DROP TABLE {leaf}")
    batch = own_site.batch(Sent("pump", [("d", T0, 1.0)]))
    writer = own_site.writer()
    with pytest.raises(NoPartition):
        await writer.write(batch)
    assert (own_site.history(), own_site.latest()) == ({}, {})
    await ensure_outbox(own_site.pool)
    assert (await writer.write(batch)).outcomes == [Outcome.COMMITTED]
    assert own_site.history() == own_site.replayed()


@pytest.mark.parametrize("table", ["latest_values", "quarantine", "stream_rejections"])
async def test_a_refusal_in_the_last_step_undoes_all(own_site: Site, table: str) -> None:
    session = uuid4()
    epoch, _ = own_site.hello("pump", session)
    refuse(own_site, table, "tenant_id < 0")
    told = [RejectedReading(1, Reason.STRING_INVALID, "x")]
    batch = own_site.batch(Sent("pump", [("d", T0, 1.0)], epoch, 1, session, aside=[("d", 1, 1.0)], rejections=told))
    with pytest.raises(DataRefused, match="test_refusal"):
        await own_site.writer().write(batch)
    assert (own_site.history(), own_site.outbox()) == ({}, [])
    assert own_site.hello("pump", session)[1] == 0


# -- other writers


async def test_latest_values_are_locked_in_one_order_also_for_corrections(site: Site) -> None:
    """A raises the second value and corrects the first; B raises both. Neither may hold one and wait for the other."""
    first, second = site.attribute("d-first"), site.attribute("d-second")
    assert first.attribute_id < second.attribute_id
    await site.writer().write(site.batch(Sent("pump", [("d-first", T0, 1.0), ("d-second", T0, 1.0)])))
    one = site.batch(Sent("pump", [("d-first", T0, 2.0)], historical=True), Sent("pump", [("d-second", T0 + 3, 2.0)]))
    other = site.batch(Sent("pump", [("d-first", T0 + 5, 3.0), ("d-second", T0 + 5, 3.0)]))
    async with await psycopg.AsyncConnection.connect(site.database()) as blocker:
        await blocker.execute("SELECT FROM latest_values WHERE attribute_id = %s FOR UPDATE", [first.attribute_id])
        async with asyncio.TaskGroup() as writers:
            writers.create_task(site.writer().write(other))
            await until(lambda: lock_waiters(site), "one waits")
            writers.create_task(site.writer().write(one))
            await until(lambda: lock_waiters(site, 2), "both wait")
            await blocker.rollback()
    assert site.latest() == {("pump", "d-first"): (T0 + 5, 3.0), ("pump", "d-second"): (T0 + 5, 3.0)}


async def test_writers_of_overlapping_keys_do_not_deadlock(site: Site) -> None:
    """Batches name devices, types and times in any order, as streams, back-fills and unary writes do."""
    random_ = random.Random(5)
    devices = [f"device-{n}" for n in range(12)]
    attributes = ["d", "i", "s", "b"]
    values: dict[str, list[Any]] = {"d": [1.0, 2.0, 3.0], "i": [1, 2, 3], "s": ["a", "b", "c"], "b": [True, False]}
    for device in devices:
        site.device(device)
    for attribute in attributes:
        site.attribute(attribute)

    def some_batch() -> Any:
        sent = []
        for device in random_.sample(devices, 8):
            readings = [
                (attribute, T0 + random_.randrange(6), random_.choice(values[attribute]))
                for attribute in random_.choices(attributes, k=6)
            ]
            sent.append(Sent(device, readings, historical=random_.random() < 0.4))
        batch = site.batch(*sent)
        batch.readings = dict(sorted(batch.readings.items(), key=lambda _: random_.random()))
        return batch

    work = [[some_batch() for _ in range(25)] for _ in range(6)]

    async def run(batches: list[Any]) -> None:
        writer = site.writer()
        for batch in batches:
            # A deadlock would be raised as TransactionConflict.
            await writer.write(batch)

    await asyncio.gather(*(run(batches) for batches in work))
    assert site.history() == site.replayed()
    history = site.history()
    for (device, attribute), (time_us, value) in site.latest().items():
        assert history[device, attribute, time_us][0] == value
