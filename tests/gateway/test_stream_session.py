"""Sequences, sessions, and who may write for a device: what is committed once stays so, and the newest stream wins."""

import asyncio

import psycopg
import pytest
from atlasco.telemetry.v1 import ingest_pb2

from tests.gateway.raw_stream import D, I, RawStream, now_us, readings
from tests.gateway.running_gateway import RunningGateway, new_channel, running_gateway
from tests.gateway.stored import changes, history, rows, values, waiting_hellos, waiting_writes
from tests.refusals import End
from tests.storage.conftest import Database
from tests.waiting import until


@pytest.fixture
def t0() -> int:
    return now_us() - 60_000_000


def one(t0: int, value: float) -> ingest_pb2.Readings:
    return readings(t0, doubles=[(D, 0, value)])


async def test_a_gap_ends_the_stream_and_what_came_before_is_acked(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    stream = RawStream(gateway.channel, tenant, "d")
    await stream.hello()
    await stream.send(1, one(t0, 1.0))
    await stream.send(3, one(t0 + 1, 3.0))
    assert await stream.ended() == End("OUT_OF_RANGE", "SEQUENCE_GAP", {"expected": "2"})
    assert stream.heard("ack")[-1].ack.committed_sequence == 1
    again = RawStream(gateway.channel, tenant, "d", session=stream.session)
    assert (await again.hello()).committed_sequence == 1
    await again.send(2, one(t0 + 1, 2.0))
    await again.acks_through(2)
    assert values(module_database, tenant, "d") == {("temperature", t0): 1.0, ("temperature", t0 + 1): 2.0}
    again.drop()


async def test_a_repeat_changes_nothing_and_is_acked_again(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    stream = RawStream(gateway.channel, tenant, "d")
    await stream.hello()
    await stream.send(1, one(t0, 1.0))
    await stream.acks_through(1)
    await stream.send(2, one(t0, 2.0))
    await stream.acks_through(2)
    # The number counts, not the content: a repeat with another value is a client's bug and must not undo message 2.
    await stream.send(1, one(t0, 99.0))
    assert not await stream.next_ack()
    assert stream.acked == 2
    await stream.send(3, one(t0 + 1, 3.0))
    await stream.acks_through(3)
    assert history(module_database, tenant, "d") == {
        ("temperature", t0): (2.0, 1),
        ("temperature", t0 + 1): (3.0, 0),
    }
    stream.drop()


async def test_a_repeat_of_a_message_that_is_on_its_way(module_database: Database, tenant: str, t0: int) -> None:
    async with running_gateway(module_database, flush_age=0.3) as slow:
        stream = RawStream(slow.channel, tenant, "d")
        await stream.hello()
        for sequence in (1, 2, 1, 2, 1):
            await stream.send(sequence, one(t0 + sequence, float(sequence)))
        await stream.acks_through(2)
        stream.drop()
    assert values(module_database, tenant, "d") == {("temperature", t0 + 1): 1.0, ("temperature", t0 + 2): 2.0}
    assert len(changes(module_database, tenant)) == 2


async def test_sequence_zero(gateway: RunningGateway, tenant: str, t0: int) -> None:
    stream = RawStream(gateway.channel, tenant, "d")
    await stream.hello()
    await stream.send(0, one(t0, 1.0))
    assert await stream.ended() == End("INVALID_ARGUMENT", "SEQUENCE_INVALID")


async def test_the_largest_sequence(gateway: RunningGateway, tenant: str, t0: int) -> None:
    stream = RawStream(gateway.channel, tenant, "d")
    await stream.hello()
    await stream.send(2**64 - 1, one(t0, 1.0))
    assert (await stream.ended()).reason == "SEQUENCE_GAP"


async def test_a_session_never_seen_starts_at_zero(gateway: RunningGateway, tenant: str, t0: int) -> None:
    stream = RawStream(gateway.channel, tenant, "d")
    assert (await stream.hello()).committed_sequence == 0
    # As of a client whose server lost its memory: it must renumber.
    await stream.send(5, one(t0, 1.0))
    assert await stream.ended() == End("OUT_OF_RANGE", "SEQUENCE_GAP", {"expected": "1"})


async def test_sessions_of_a_device_are_remembered_side_by_side(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    epochs = []
    first = RawStream(gateway.channel, tenant, "d")
    second = RawStream(gateway.channel, tenant, "d")
    for expected_first, expected_second in ((0, 0), (1, 1), (2, 2)):
        for stream, expected in ((first, expected_first), (second, expected_second)):
            again = RawStream(gateway.channel, tenant, "d", session=stream.session)
            welcome = await again.hello()
            assert welcome.committed_sequence == expected
            epochs.append(welcome.epoch)
            await again.send(expected + 1, one(t0 + expected, float(expected)))
            await again.acks_through(expected + 1)
            assert (await again.half_close()).code == "OK"
    assert epochs == sorted(set(epochs))
    assert values(module_database, tenant, "d") == {("temperature", t0 + i): float(i) for i in range(3)}
    assert len(changes(module_database, tenant)) == 3


async def test_half_close_waits_for_the_last_ack(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    stream = RawStream(gateway.channel, tenant, "d")
    await stream.hello()
    for sequence in range(1, 31):
        await stream.send(sequence, one(t0 + sequence, 1.0))
    assert (await stream.half_close()).code == "OK"
    assert stream.heard("ack")[-1].ack.committed_sequence == 30
    assert len(values(module_database, tenant, "d")) == 30


async def test_the_newer_stream_wins_and_the_older_is_told(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    older = RawStream(gateway.channel, tenant, "d")
    await older.hello()
    await older.send(1, one(t0, 1.0))
    await older.acks_through(1)
    newer = RawStream(gateway.channel, tenant, "d", session=older.session)
    assert (await newer.hello()).committed_sequence == 1
    assert await older.ended() == End("ABORTED", "STREAM_SUPERSEDED")
    await newer.send(2, one(t0 + 1, 2.0))
    await newer.acks_through(2)
    assert values(module_database, tenant, "d") == {("temperature", t0): 1.0, ("temperature", t0 + 1): 2.0}
    newer.drop()


async def test_of_many_hellos_at_once_the_newest_epoch_stays(gateway: RunningGateway, tenant: str, t0: int) -> None:
    channels = [new_channel(gateway.target) for _ in range(8)]
    streams = [RawStream(channel, tenant, "d") for channel in channels]
    await asyncio.gather(*(stream.say_hello() for stream in streams))

    async def outcome(stream: RawStream) -> int:
        """The epoch of a stream that was welcomed, once it knows it; 0 for one that never was."""
        try:
            return (await stream.hear("welcome")).welcome.epoch
        except EOFError:
            return 0

    epochs = await asyncio.gather(*map(outcome, streams))
    winner = streams[epochs.index(max(epochs))]
    ends = await asyncio.gather(*(stream.ended() for stream in streams if stream is not winner))
    assert ends == [End("ABORTED", "STREAM_SUPERSEDED")] * 7
    await winner.send(1, one(t0, 1.0))
    await winner.acks_through(1)
    winner.drop()
    for channel in channels:
        await channel.close()


async def test_a_stream_of_another_gateway_is_told_at_its_next_message(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    async with running_gateway(module_database) as other:
        older = RawStream(gateway.channel, tenant, "d")
        await older.hello()
        newer = RawStream(other.channel, tenant, "d")
        await newer.hello()
        await newer.send(1, one(t0, 2.0))
        await newer.acks_through(1)
        await older.send(1, one(t0, 1.0))
        assert await older.ended() == End("ABORTED", "STREAM_SUPERSEDED")
        newer.drop()
    assert history(module_database, tenant, "d") == {("temperature", t0): (2.0, 0)}


async def test_a_gateway_that_still_holds_a_message_cannot_undo_a_newer_one(
    module_database: Database, tenant: str, t0: int
) -> None:
    async with running_gateway(module_database) as b:
        session = RawStream(b.channel, tenant, "d").session
        first = RawStream(b.channel, tenant, "d", session=session)
        await first.hello()
        for sequence in range(1, 5):
            await first.send(sequence, one(t0 + sequence, float(sequence)))
        await first.acks_through(4)
        await first.half_close()
        # A holds what it receives until three readings wait in a lane.
        async with running_gateway(module_database, flush_age=3600.0, flush_readings=3) as a:
            moved = RawStream(a.channel, tenant, "d", session=session)
            assert (await moved.hello()).committed_sequence == 4
            await moved.send(5, readings(t0, doubles=[(D, 0, 1.0)], int64s=[(999, 0, 1)]))
            await until(lambda: lane_readings(a) == 2)
            back = RawStream(b.channel, tenant, "d", session=session)
            assert (await back.hello()).committed_sequence == 4
            await back.send(5, one(t0, 1.0))
            await back.acks_through(5)
            await back.send(6, one(t0, 2.0))
            await back.acks_through(6)
            others = [RawStream(a.channel, tenant, f"other-{i}") for i in range(16)]
            for other in others:
                await other.hello()
                await other.send(1, readings(t0, doubles=[(D, 0, 0.0), (D, 1, 0.0)]))
            assert await moved.ended() == End("ABORTED", "STREAM_SUPERSEDED")
            for other in others:
                other.drop()
        await back.send(7, one(t0 + 7, 7.0))
        assert not await back.acks_through(7)
        back.drop()
    stored = history(module_database, tenant, "d")
    assert stored["temperature", t0] == (2.0, 1)
    assert len(stored) == 6
    told = [change for change in changes(module_database, tenant) if change[0] == "d" and change[2] == t0]
    assert told == [("d", "temperature", t0, 1.0, 0), ("d", "temperature", t0, 2.0, 1)]
    statement = """SELECT count(*) FROM stream_rejections r JOIN tenants t USING (tenant_id) WHERE t.name = %s"""
    assert rows(module_database, statement, tenant) == [(0,)]


async def test_a_hello_waits_for_the_write_that_is_under_way_elsewhere(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    async with running_gateway(module_database) as other:
        stream = RawStream(gateway.channel, tenant, "d")
        await stream.hello()
        with psycopg.connect(module_database()) as lock:
            # Behind the fence and the history, before the outbox and the commit.
            lock.execute("LOCK TABLE outbox IN SHARE MODE")
            await stream.send(1, one(t0, 1.0))
            await until(lambda: waiting_writes(module_database) == 1)
            moved = RawStream(other.channel, tenant, "d", session=stream.session)
            await moved.say_hello()
            await until(lambda: waiting_hellos(module_database) == 1)
            lock.rollback()
        # Message 5 of the story is committed before B knows the device: B says so, and it is not sent again.
        assert (await moved.hear("welcome")).welcome.committed_sequence == 1
        stream.drop()
        moved.drop()
    assert history(module_database, tenant, "d") == {("temperature", t0): (1.0, 0)}


async def test_devices_do_not_wait_for_each_other(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    streams = [RawStream(gateway.channel, tenant, f"d{i}") for i in range(40)]
    await asyncio.gather(*(stream.hello() for stream in streams))

    async def run(stream: RawStream) -> None:
        for sequence in range(1, 21):
            await stream.send(sequence, readings(t0, doubles=[(D, sequence, 1.0)], int64s=[(I, sequence, sequence)]))
        await stream.acks_through(20)
        assert (await stream.half_close()).code == "OK"

    await asyncio.gather(*map(run, streams))
    assert len(changes(module_database, tenant)) == 40 * 20 * 2


def lane_readings(gateway: RunningGateway) -> float:
    lanes = range(4)
    return sum(gateway.metrics.value("atlasco_lane_queue_readings", lane=str(lane)) for lane in lanes)
