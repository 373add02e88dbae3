"""How the client behaves when the network, the server or another copy of it misbehaves."""

import asyncio
import time

import grpc
import pytest
from atlasco.telemetry.v1 import ingest_pb2

from device.buffer import Buffer
from device.dictionary import ValueType
from device.errors import (
    ClientClosedError,
    FlushTimeoutError,
    PermissionDeniedError,
    ProtocolError,
    SupersededError,
    UnauthenticatedError,
)
from tests.waiting import PATIENCE_S, until

NOW = time.time_ns() // 1000 - 60_000_000


def response(**parts):
    return ingest_pb2.StreamTelemetryResponse(**parts)


async def send_numbers(client, start, stop):
    client.define("n", ValueType.INT64)
    for i in range(start, stop):
        await client.send([("n", NOW + i, i)])


async def test_messages_cut_off_are_sent_again_with_the_same_numbers(server, connect):
    server.faults.cut_after = 5
    async with connect() as client:
        await send_numbers(client, 0, 10)
        await client.flush(PATIENCE_S)
    device = server.device("device-1")
    assert len({hello.session_id for hello in device.hellos}) == 1
    assert len(await server.readings("device-1")) == 10
    assert all(revision == 0 for _, revision in device.readings.values())
    assert client.statistics().resent_messages > 0
    assert client.statistics().sent_messages == 10


async def test_a_lost_ack_is_made_good_by_welcome(server, connect):
    server.faults.lose_acks = 1_000_000
    async with connect() as client:
        await send_numbers(client, 0, 3)
        await until(lambda: len(server.device("device-1").readings) == 3)
        assert client.statistics().acked_messages == 0
        server.faults.lose_acks = 0
        server.cut()
        await client.flush(PATIENCE_S)
    assert server.device("device-1").received == [1, 2, 3]
    assert client.statistics().resent_messages == 0


async def test_a_stream_without_progress_is_abandoned(server, connect):
    server.faults.lose_acks = 1
    async with connect(settings={"ack_timeout_s": 0.05}) as client:
        await send_numbers(client, 0, 1)
        await client.flush(PATIENCE_S)
    assert client.statistics().reconnects >= 1


async def test_credits_bound_what_is_out(server, connect):
    server.faults.hold_commits = True
    async with connect() as client:
        await send_numbers(client, 0, 100)
        await until(lambda: len(server.device("device-1").received) == 16)
        assert client.statistics().sent_messages == 16
        server.release()
        await client.flush(PATIENCE_S)
    assert server.device("device-1").most_out <= 16


async def test_a_message_larger_than_all_credit_bytes_goes_alone(server, connect):
    server.credits.bytes = 10
    async with connect() as client:
        await send_numbers(client, 0, 5)
        await client.flush(PATIENCE_S)
    assert server.device("device-1").most_out == 1


async def test_a_throttle_pauses_and_loses_nothing(server, connect):
    async with connect() as client:
        await send_numbers(client, 0, 1)
        await client.flush(PATIENCE_S)
        throttle = ingest_pb2.Throttle(limit=ingest_pb2.Throttle.LIMIT_STORAGE, retry_after_ms=300)
        told = time.monotonic()
        await server.tell("device-1", response(throttle=throttle))
        await until(lambda: client.statistics().throttled)
        # By the client's own clock: the machine may stand still before the next line.
        paused_until = client._session._paused_until
        assert paused_until >= told + 0.3
        await send_numbers(client, 1, 20)
        await client.flush(PATIENCE_S)
        assert time.monotonic() >= paused_until
    assert len(server.device("device-1").readings) == 20


async def test_a_notice_is_obeyed(server, connect):
    server.faults.hold_commits = True
    async with connect() as client:
        await send_numbers(client, 0, 3)
        device = server.device("device-1")
        await until(lambda: len(device.received) == 3)
        notice = ingest_pb2.ReconnectNotice(drain_ms=int(PATIENCE_S * 1000), min_delay_ms=1, max_delay_ms=20)
        await server.tell("device-1", response(reconnect_notice=notice))
        await until(lambda: client._session.leaving is not None)
        await send_numbers(client, 3, 6)
        server.release()
        await client.flush(PATIENCE_S)
    # What was out was waited for; what came later went to the next stream; nothing was sent twice.
    assert device.received == [1, 2, 3, 4, 5, 6]
    assert len(device.hellos) == 2
    assert client.statistics().resent_messages == 0


async def test_a_notice_without_acks_ends_after_the_drain(server, connect):
    server.faults.hold_commits = True
    async with connect() as client:
        await send_numbers(client, 0, 2)
        device = server.device("device-1")
        await until(lambda: len(device.received) == 2)
        notice = ingest_pb2.ReconnectNotice(drain_ms=20, min_delay_ms=0, max_delay_ms=0)
        await server.tell("device-1", response(reconnect_notice=notice))
        await until(lambda: client._session.leaving is not None)
        drain_until = client._session.leaving.drain_until
        await until(lambda: time.monotonic() > drain_until)
        server.release()
        await client.flush(PATIENCE_S)
    assert len(device.readings) == 2


async def test_a_forgotten_session_starts_anew_and_renumbers(server, connect):
    async with connect() as client:
        await send_numbers(client, 0, 4)
        await client.flush(PATIENCE_S)
        server.faults.hold_commits = True
        await send_numbers(client, 4, 7)
        device = server.device("device-1")
        await until(lambda: len(device.received) == 7)
        server.forget_sessions()
        server.cut()
        server.faults.hold_commits = False
        await client.flush(PATIENCE_S)
    assert device.received == [1, 2, 3, 4, 5, 6, 7, 1, 2, 3]
    assert len({hello.session_id for hello in device.hellos}) == 2
    assert len(device.readings) == 7
    assert client.statistics().new_sessions == 1


async def test_a_clean_end_is_not_an_ack(server, connect):
    server.faults.end_cleanly = 2
    async with connect() as client:
        await send_numbers(client, 0, 3)
        await client.flush(PATIENCE_S)
    assert len(server.device("device-1").readings) == 3


async def test_a_stream_that_breaks_before_it_is_open_is_given_up_at_once(server, connect):
    async with connect() as client:
        while client._stream is None:  # noqa: ASYNC110 - its very first moment
            await asyncio.sleep(0)
        for _ in range(3):
            client.disconnect()
            await asyncio.sleep(0)
        await send_numbers(client, 0, 1)
        # Well before the client's patience with a silent server ends.
        await client.flush(PATIENCE_S / 2)
    assert len(server.device("device-1").readings) == 1


async def test_an_unanswered_hello_is_given_up(server, connect):
    server.faults.silent = True
    async with connect(settings={"welcome_timeout_s": 0.3}) as client:
        await send_numbers(client, 0, 1)
        await until(lambda: len(server.device("device-1").hellos) >= 2)
        server.faults.silent = False
        await client.flush(PATIENCE_S)


@pytest.mark.parametrize(
    ("code", "reason", "error"),
    [
        pytest.param(grpc.StatusCode.INVALID_ARGUMENT, "HELLO_INVALID", ProtocolError, id="invalid"),
        pytest.param(grpc.StatusCode.FAILED_PRECONDITION, "PROTOCOL_UNSUPPORTED", ProtocolError, id="version"),
        pytest.param(grpc.StatusCode.PERMISSION_DENIED, "DEVICE_UNKNOWN", PermissionDeniedError, id="unknown"),
        pytest.param(grpc.StatusCode.UNAUTHENTICATED, "", UnauthenticatedError, id="unauthenticated"),
    ],
)
async def test_a_permanent_error_reaches_the_caller(server, connect, code, reason, error):
    server.faults.refuse = (code, reason)
    client = connect(buffer=Buffer(max_messages=1))
    client.define("n", ValueType.INT64)
    with pytest.raises(error) as caught:
        async with client:
            await client.send([("n", NOW, 1)])
            await client.send([("n", NOW, 2)])
    assert (caught.value.code, caught.value.reason, caught.value.retriable) == (code, reason, False)
    assert len(server.device("device-1").hellos) == 1


async def test_a_permanent_error_that_nobody_met_is_raised_on_leaving(server, connect):
    server.faults.refuse = (grpc.StatusCode.PERMISSION_DENIED, "DEVICE_UNKNOWN")
    with pytest.raises(PermissionDeniedError):
        async with connect() as client:
            await send_numbers(client, 0, 1)
            await until(lambda: client._failure is not None)


async def test_a_passing_error_is_retried(server, connect):
    server.faults.refuse = (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_READER")
    async with connect() as client:
        await send_numbers(client, 0, 1)
        await until(lambda: len(server.device("device-1").hellos) >= 3)
        server.faults.refuse = None
        await client.flush(PATIENCE_S)


async def test_superseded_fails_where_that_is_set(server, connect):
    first = connect(settings={"superseded_delay_s": None})
    with pytest.raises(SupersededError):
        async with first:
            await send_numbers(first, 0, 1)
            await first.flush(PATIENCE_S)
            async with connect() as second:
                await until(lambda: first._failure is not None)
                await send_numbers(second, 1, 2)
                await second.flush(PATIENCE_S)
            await first.flush(PATIENCE_S)
            await send_numbers(first, 2, 3)


async def test_superseded_does_not_come_back_at_once(server, connect):
    async with connect(settings={"superseded_delay_s": 3600.0}) as first:
        await send_numbers(first, 0, 1)
        await first.flush(PATIENCE_S)
        async with connect() as second:
            await send_numbers(second, 1, 2)
            await second.flush(PATIENCE_S)
            await until(lambda: first._stream is None)
        assert len(server.device("device-1").hellos) == 2


async def test_rejections_told_again_are_handed_over_once(server, connect):
    rejected = []
    async with connect(on_rejections=rejected.extend) as client:
        device = server.device("device-1")
        client.define("n", ValueType.INT64)
        server.faults.lose_acks = 1
        await client.send([("n", 0, 1), ("n", NOW, 2)])
        await until(lambda: device.readings)
        server.cut()
        await client.flush(PATIENCE_S)
        await until(lambda: device.confirmations)
        [record] = device.sessions.values()
        # The confirmation is lost: the server tells the rejection again.
        record.unconfirmed = [
            ingest_pb2.Rejection(sequence=1, index=0, reason=ingest_pb2.REJECTION_REASON_TIMESTAMP_INVALID)
        ]
        server.cut()
        await send_numbers(client, 2, 4)
        await client.flush(PATIENCE_S)
        await until(lambda: not record.unconfirmed)
    assert [(one.ticket, one.index, one.reading) for one in rejected] == [(1, 0, ("n", 0, 1))]
    assert client.statistics().rejected_readings == 1


async def test_the_dictionary_goes_by_id_once_known(server, connect):
    async with connect() as client:
        await send_numbers(client, 0, 1)
        await client.flush(PATIENCE_S)
        await until(lambda: server.device("device-1").hellos)
        known = len(client.dictionary)
        server.cut()
        await send_numbers(client, 1, 2)
        await client.flush(PATIENCE_S)
        server.cut()
        await send_numbers(client, 2, 3)
        await client.flush(PATIENCE_S)
    hello = server.device("device-1").hellos[-1]
    assert known == 1
    assert len(hello.dictionary.id) == 16
    assert not hello.dictionary.aliases


async def test_an_unknown_dictionary_is_sent_before_data(server, connect):
    client = connect(settings={"dictionary_known": True})
    client.define("n", ValueType.INT64)
    async with client:
        await send_numbers(client, 0, 1)
        await client.flush(PATIENCE_S)
    device = server.device("device-1")
    assert not device.hellos[0].dictionary.aliases
    assert device.definitions == [[1]]
    assert len(device.readings) == 1


async def test_a_dictionary_conflict_costs_no_reading(server, connect):
    client = connect()
    client.define("n", ValueType.INT64)
    server.dictionaries[client.dictionary.id] = [b"something else"]
    async with client:
        await send_numbers(client, 0, 3)
        await client.flush(PATIENCE_S)
    assert len(server.device("device-1").readings) == 3
    assert client.statistics().rejected_readings == 0


async def test_a_server_that_comes_back_finds_everything(server, connect):
    async with connect() as client:
        await send_numbers(client, 0, 3)
        await client.flush(PATIENCE_S)
        await server.stop()
        await send_numbers(client, 3, 9)
        with pytest.raises(FlushTimeoutError):
            await client.flush(0.05)
        await server.start()
        await client.flush(PATIENCE_S)
    assert len(server.device("device-1").readings) == 9


async def test_leaving_with_unacked_messages_says_so(server, connect, tmp_path):
    server.faults.hold_commits = True
    with pytest.raises(FlushTimeoutError) as caught:
        async with connect(settings={"close_deadline_s": 0.05}) as client:
            await send_numbers(client, 0, 2)
    assert caught.value.messages_left == 2
    with pytest.raises(ClientClosedError):
        await client.send([("n", NOW, 1)])
    # A persistent buffer keeps them instead.
    buffer = Buffer.open(tmp_path / "buffer")
    async with connect("other", buffer=buffer, settings={"close_deadline_s": 0.05}) as client:
        await send_numbers(client, 0, 2)
    again = Buffer.open(tmp_path / "buffer")
    assert len(again) == 2
    again.close()


async def test_waiting_for_room_can_be_cancelled(server, connect):
    server.faults.hold_commits = True
    async with connect(buffer=Buffer(max_messages=2)) as client:
        await send_numbers(client, 0, 2)
        async with asyncio.TaskGroup() as tasks:
            waiting = [tasks.create_task(send_numbers(client, i, i + 1)) for i in (10, 20, 30)]
            await until(lambda: len(client._buffer._waiting) == 3)
            waiting[0].cancel()
            server.release()
        await client.flush(PATIENCE_S)
    assert {value for value, _ in server.device("device-1").readings.values()} == {0, 1, 20, 30}
