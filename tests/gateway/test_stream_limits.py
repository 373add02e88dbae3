"""Rules that end a stream, and bounds that a client meets: each with its own status, none at another's expense."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import psycopg
import pytest
from atlasco.telemetry.v1 import ingest_pb2

from tests.gateway.patience_clock import PatienceClock
from tests.gateway.raw_stream import ALIASES, DOUBLE, B, D, RawStream, S, now_us, readings, reason_name
from tests.gateway.running_gateway import RunningGateway, new_channel, running_gateway
from tests.gateway.stored import values
from tests.refusals import End
from tests.storage.conftest import Database
from tests.waiting import until


@pytest.fixture
def t0() -> int:
    return now_us() - 60_000_000


@pytest.fixture(scope="module")
async def strict(module_database: Database) -> AsyncIterator[RunningGateway]:
    """A gateway whose limits are within reach of a test."""
    async with running_gateway(
        module_database,
        max_unconfirmed=20,
        max_aliases=50,
        credit_messages=4,
        throttle_after=0.1,
        tenant_queue_readings=1000,
        queue_readings=2000,
    ) as running:
        yield running


async def test_a_hello_that_never_comes(module_database: Database, tenant: str) -> None:
    async with running_gateway(module_database, hello_timeout=0.3) as hasty:
        stream = RawStream(hasty.channel, tenant, "d")
        assert await stream.ended() == End("DEADLINE_EXCEEDED", "HELLO_TIMEOUT")


async def test_a_stream_that_ends_before_its_hello(gateway: RunningGateway, tenant: str) -> None:
    stream = RawStream(gateway.channel, tenant, "d")
    assert await stream.half_close() == End("FAILED_PRECONDITION", "HELLO_REQUIRED")


async def test_a_message_before_hello(gateway: RunningGateway, module_database: Database, tenant: str, t0: int) -> None:
    stream = RawStream(gateway.channel, tenant, "d")
    await stream.send(1, readings(t0, doubles=[(D, 0, 1.0)]))
    assert await stream.ended() == End("FAILED_PRECONDITION", "HELLO_REQUIRED")
    assert not values(module_database, tenant, "d")


async def test_a_second_hello(gateway: RunningGateway, module_database: Database, tenant: str, t0: int) -> None:
    stream = RawStream(gateway.channel, tenant, "d")
    await stream.hello()
    await stream.send(1, readings(t0, doubles=[(D, 0, 1.0)]))
    await stream.say_hello()
    assert await stream.ended() == End("FAILED_PRECONDITION", "HELLO_REPEATED")
    assert stream.heard("ack")[-1].ack.committed_sequence == 1
    assert values(module_database, tenant, "d") == {("temperature", t0): 1.0}


@pytest.mark.parametrize("raw", [b"\xff\xff\xff", b"", b"\x9a\x06\x00"], ids=["noise", "empty", "unknown field"])
@pytest.mark.parametrize("greeted", [False, True], ids=["at once", "after hello"])
async def test_bytes_that_are_no_message(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int, raw: bytes, greeted: bool
) -> None:
    stream = RawStream(gateway.channel, tenant, "d")
    if greeted:
        await stream.hello()
        await stream.send(1, readings(t0, doubles=[(D, 0, 1.0)]))
    await stream.say(raw)
    end = await stream.ended()
    if greeted:
        assert end == End("INVALID_ARGUMENT", "MALFORMED_MESSAGE")
        assert values(module_database, tenant, "d") == {("temperature", t0): 1.0}
    else:
        assert end.reason in {"MALFORMED_MESSAGE", "HELLO_REQUIRED"}


@pytest.mark.parametrize(
    ("changes", "reason", "metadata"),
    [
        ({"protocol_version": 0}, "PROTOCOL_UNSUPPORTED", {"supported": "1"}),
        ({"protocol_version": 2}, "PROTOCOL_UNSUPPORTED", {"supported": "1"}),
        ({"session_id": b""}, "HELLO_INVALID", {"field": "session_id"}),
        ({"session_id": b"x" * 17}, "HELLO_INVALID", {"field": "session_id"}),
        ({"device_id": "x" * 129}, "HELLO_INVALID", {"field": "device_id"}),
        ({"device_id": "a\nb"}, "HELLO_INVALID", {"field": "device_id"}),
        ({"device_id": "a\u0085b"}, "HELLO_INVALID", {"field": "device_id"}),
        ({"device_id": ""}, "HELLO_INVALID", {"field": "device_id"}),
        ({"entity_type": "x" * 129}, "HELLO_INVALID", {"field": "entity_type"}),
        ({"entity_type": "a\0"}, "HELLO_INVALID", {"field": "entity_type"}),
        ({"labels": {"": "x"}}, "HELLO_INVALID", {"field": "labels"}),
        ({"labels": {"x": "a\0"}}, "HELLO_INVALID", {"field": "labels"}),
        ({"labels": {str(i): "x" for i in range(33)}}, "HELLO_INVALID", {"field": "labels"}),
        ({"client": "x" * 129}, "HELLO_INVALID", {"field": "client"}),
        ({"dictionary": ingest_pb2.Dictionary(id=b"short")}, "HELLO_INVALID", {"field": "dictionary.id"}),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)
async def test_a_hello_out_of_bounds(
    gateway: RunningGateway, tenant: str, changes: dict[str, object], reason: str, metadata: dict[str, str]
) -> None:
    stream = RawStream(gateway.channel, "acme", "d", as_service=True)
    await stream.say_hello(aliases={}, **changes)
    end = await stream.ended()
    assert (end.reason, end.metadata) == (reason, metadata)


async def test_a_device_names_only_itself(gateway: RunningGateway, tenant: str) -> None:
    stream = RawStream(gateway.channel, tenant, "d")
    await stream.say_hello(device_id="another")
    assert (await stream.ended()) == End("PERMISSION_DENIED", "DEVICE_MISMATCH")
    for named in ("", "d"):
        stream = RawStream(gateway.channel, tenant, "d")
        await stream.hello(device_id=named)
        stream.drop()


async def test_a_service_names_any_device(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    stream = RawStream(gateway.channel, tenant, "any", as_service=True)
    await stream.hello()
    await stream.send(1, readings(t0, doubles=[(D, 0, 1.0)]))
    await stream.acks_through(1)
    assert values(module_database, tenant, "any") == {("temperature", t0): 1.0}
    stream.drop()


async def test_a_peer_without_identity(gateway: RunningGateway) -> None:
    method: Any = gateway.channel.stream_stream("/atlasco.telemetry.v1.IngestService/StreamTelemetry", None, None)
    call = method()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_message_over_the_transports_limit(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    channel = new_channel(gateway.target)
    stream, other = RawStream(channel, tenant, "d"), RawStream(channel, tenant, "other")
    await stream.hello()
    await other.hello()
    await stream.send(1, readings(t0, doubles=[(D, 0, 1.0)]))
    await stream.acks_through(1)
    await stream.send(2, readings(t0, strings=[(S, 0, b"x" * (5 << 20))]))
    assert (await stream.ended()).code == "RESOURCE_EXHAUSTED"
    # Its neighbour on the connection does not notice.
    await other.send(1, readings(t0, doubles=[(D, 0, 1.0)]))
    await other.acks_through(1)
    other.drop()
    await channel.close()
    assert values(module_database, tenant, "d") == {("temperature", t0): 1.0}


@pytest.fixture
async def impatient(module_database: Database, patience_clock: PatienceClock) -> AsyncIterator[RunningGateway]:
    async with running_gateway(module_database, write_timeout=10.0, max_unconfirmed=100_000) as running:
        yield running


@pytest.mark.parametrize("resumes", [True, False], ids=["reads at last", "vanishes"])
async def test_a_client_that_does_not_read(
    impatient: RunningGateway,
    module_database: Database,
    patience_clock: PatienceClock,
    tenant: str,
    t0: int,
    resumes: bool,
    caplog: Any,
) -> None:
    caplog.set_level(logging.INFO, "gateway.stream")
    channel = new_channel(impatient.target)
    stream = RawStream(channel, tenant, "d")
    await stream.hello()
    # Each message earns an ack of many kilobytes, of which nothing is read: as many rejections as carry a text, and few
    # enough messages to stay below the bound of what may wait for its confirmation.
    bad = readings(0, doubles=[(D, -i, 1.0) for i in range(100)])

    async def flood() -> None:
        for sequence in range(1, 10_000):
            data = ingest_pb2.DataMessage(sequence=sequence, readings=bad)
            await stream.call.write(ingest_pb2.StreamTelemetryRequest(data=data).SerializeToString())

    def given_up() -> bool:
        # In steps, each of which leaves the transport time to take what it can.
        patience_clock.go_on(0.2)
        return "a client does not read its acks" in caplog.text

    flooding = asyncio.create_task(flood())
    await until(given_up, "the gateway gives up", beside=flooding)
    assert patience_clock.now_s >= 10.0
    # No more is taken from it, and others go on.
    received = impatient.metrics.value("atlasco_messages_received")
    other = RawStream(impatient.channel, tenant, "other")
    await other.hello()
    await other.send(1, readings(t0, doubles=[(D, 0, 1.0)]))
    await other.acks_through(1)
    other.drop()
    assert impatient.metrics.value("atlasco_messages_received") == received + 1
    if resumes:
        # With what status is for the gateway to say: a write under way when a call ends hides it from a Python client.
        await stream.ended()
    else:
        stream.drop()
    await until(lambda: impatient.metrics.value("atlasco_streams_open") == 0)
    flooding.cancel()
    await asyncio.wait({flooding})
    assert flooding.cancelled() or flooding.exception() is not None
    if resumes:
        assert ("SLOW_READER",) in impatient.metrics.values("atlasco_stream_closes")
    await channel.close()


async def test_credits_bound_what_the_gateway_reads(module_database: Database, tenant: str, t0: int) -> None:
    async with running_gateway(module_database, credit_messages=8, flush_age=3600.0) as held:
        stream = RawStream(held.channel, tenant, "d")
        welcome = await stream.hello()
        assert welcome.credits.messages == 8
        for sequence in range(1, 101):
            await stream.send(sequence, readings(t0, doubles=[(D, sequence, 1.0)]))
        await until(lambda: held.metrics.value("atlasco_messages_received") >= 8)
        # The transport has the rest; a message of another stream passes them by.
        other = RawStream(held.channel, tenant, "other")
        await other.hello()
        await other.send(1, readings(t0, doubles=[(D, 0, 1.0)]))
        await until(lambda: held.metrics.value("atlasco_messages_received") >= 9)
        assert held.metrics.value("atlasco_messages_received") == 9
        stream.drop()
        other.drop()
        assert await held.stop() == 0
    assert len(values(module_database, tenant, "d")) == 8


async def test_credit_bytes_bound_what_the_gateway_reads(module_database: Database, tenant: str, t0: int) -> None:
    async with running_gateway(module_database, credit_bytes=10_000, flush_age=0.05) as held:
        stream = RawStream(held.channel, tenant, "d")
        await stream.hello()
        for sequence in range(1, 41):
            await stream.send(sequence, readings(t0, strings=[(S, sequence, b"x" * 4000)]))
        await stream.acks_through(40)
        stream.drop()
    assert len(values(module_database, tenant, "d")) == 40


async def test_a_full_room_throttles_and_loses_nothing(module_database: Database, tenant: str, t0: int) -> None:
    async with running_gateway(
        module_database, tenant_queue_readings=100, queue_readings=150, throttle_after=0.05
    ) as small:
        stream, late = RawStream(small.channel, tenant, "d"), RawStream(small.channel, tenant, "late")
        other = RawStream(small.channel, f"{tenant}-other", "d")
        for one in (stream, late, other):
            await one.hello()
        with psycopg.connect(module_database()) as lock:
            lock.execute("LOCK TABLE outbox IN SHARE MODE")
            await stream.send(1, readings(t0, doubles=[(D, i, 1.0) for i in range(90)]))
            await until(lambda: small.metrics.value("atlasco_messages_received") == 1)
            await late.send(1, readings(t0, doubles=[(D, i, 1.0) for i in range(20)]))
            throttle = (await late.hear("throttle")).throttle
            assert throttle.limit == ingest_pb2.Throttle.LIMIT_TENANT_QUEUE
            assert (throttle.limit_value, throttle.retry_after_ms) == (100, 50)
            # Another tenant has room, until the whole gateway is full.
            await other.send(1, readings(t0, doubles=[(D, i, 1.0) for i in range(50)]))
            await until(lambda: small.metrics.value("atlasco_messages_received") == 3)
            await other.send(2, readings(t0, doubles=[(D, 100 + i, 1.0) for i in range(20)]))
            throttle = (await other.hear("throttle")).throttle
            assert throttle.limit == ingest_pb2.Throttle.LIMIT_GATEWAY_QUEUE
            lock.rollback()
        await late.acks_through(1)
        await other.acks_through(2)
        for one in (stream, late, other):
            one.drop()
    assert [len(values(module_database, tenant, name)) for name in ("d", "late")] == [90, 20]
    assert len(values(module_database, f"{tenant}-other", "d")) == 70


def unconfirmed_closes(gateway: RunningGateway) -> float:
    return gateway.metrics.values("atlasco_stream_closes").get(("UNCONFIRMED_REJECTIONS",), 0)


async def test_too_many_unconfirmed_rejections(
    strict: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    most = strict.config.max_unconfirmed
    session = b""
    told: set[int] = set()
    # However often a client that never confirms comes back, what is kept for it has a bound.
    for already in range(4):
        stream = RawStream(strict.channel, tenant, "d", session=session)
        session = stream.session
        welcome = await stream.hello()
        try:
            for sequence in range(welcome.committed_sequence + 1, welcome.committed_sequence + most + 10):
                await stream.send(sequence, readings(0, doubles=[(D, 0, 1.0)]))
                await stream.acks_through(sequence)
        except (EOFError, grpc.aio.AioRpcError):
            pass
        await until(lambda already=already: unconfirmed_closes(strict) == already + 1)  # type: ignore[misc]
        told |= {one.sequence for one in stream.told}
        assert len(told) <= most + strict.config.credit_messages
    assert len(told) > most
    # And every one of them is told when it listens at last.
    stream = RawStream(strict.channel, tenant, "d", session=session)
    welcome = await stream.hello()
    while {one.sequence for one in stream.told} != told:
        await stream.next_ack()
    await stream.confirm(max(told))
    await stream.send(welcome.committed_sequence + 1, readings(t0, doubles=[(D, 0, 1.0)]))
    await stream.acks_through(welcome.committed_sequence + 1)
    assert values(module_database, tenant, "d") == {("temperature", t0): 1.0}
    stream.drop()


async def test_more_than_the_most_aliases(
    strict: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    aliases = {i: (f"a{i}", DOUBLE) for i in range(1, 61)}
    stream = RawStream(strict.channel, tenant, "d")
    welcome = await stream.hello(aliases=aliases)
    assert welcome.limits.max_aliases == 50
    assert {error.alias for error in welcome.alias_errors} == set(range(51, 61))
    assert {reason_name(error) for error in welcome.alias_errors} == {"ATTRIBUTE_QUOTA_EXCEEDED"}
    assert await stream.define({61: ("a61", DOUBLE), 1: ("a1", DOUBLE)}) == [(61, "ATTRIBUTE_QUOTA_EXCEEDED")]
    await stream.send(1, readings(t0, doubles=[(i, 0, float(i)) for i in range(1, 62)]))
    assert await stream.rejected(1) == dict.fromkeys(range(50, 61), "ATTRIBUTE_QUOTA_EXCEEDED")
    assert len(values(module_database, tenant, "d")) == 50
    stream.drop()


async def test_a_client_that_defines_without_end_is_bounded(strict: RunningGateway, tenant: str) -> None:
    stream = RawStream(strict.channel, tenant, "d")
    await stream.hello()
    for round_ in range(30):
        errors = await stream.define({100_000 + round_ * 100 + i: ("x", DOUBLE) for i in range(100)})
        assert errors == [(100_000 + round_ * 100 + i, "ALIAS_OUT_OF_RANGE") for i in range(100)]
    stream.drop()


async def test_parts_of_the_protocol_that_are_not_served_are_said_and_ignored(
    gateway: RunningGateway, tenant: str, t0: int
) -> None:
    stream = RawStream(gateway.channel, tenant, "d")
    welcome = await stream.hello(aliases=ALIASES)
    assert {feature.support for feature in welcome.features} == {ingest_pb2.FeatureSupport.SUPPORT_UNIMPLEMENTED}
    request = ingest_pb2.StreamTelemetryRequest()
    request.reported_state.SetInParent()
    await stream.say(request)
    await stream.send(1, readings(t0, bools=[(B, 0, True)]))
    assert not await stream.acks_through(1)
    stream.drop()
