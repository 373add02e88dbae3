"""A device stream driven by hand: what a client could send, good or bad, and what comes back."""

import asyncio
import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import grpc
from atlasco.telemetry.v1 import common_pb2, ingest_pb2

from tests.refusals import End, end_of
from tests.waiting import PATIENCE_S

METHOD = "/atlasco.telemetry.v1.IngestService/StreamTelemetry"

DOUBLE = common_pb2.ATTRIBUTE_TYPE_DOUBLE
INT64 = common_pb2.ATTRIBUTE_TYPE_INT64
BOOL = common_pb2.ATTRIBUTE_TYPE_BOOL
STRING = common_pb2.ATTRIBUTE_TYPE_STRING

# The dictionary most tests use.
D, I, B, S = 1, 2, 3, 4  # noqa: E741 - one letter per type
ALIASES = {D: ("temperature", DOUBLE), I: ("rpm", INT64), B: ("door_open", BOOL), S: ("firmware", STRING)}

# A column as written in tests: (alias, microseconds after the base, value).
Triples: TypeAlias = Iterable[tuple[int, int, Any]]


def now_us() -> int:
    return time.time_ns() // 1_000


def definitions(aliases: Mapping[int, tuple[str, Any]]) -> list[ingest_pb2.AliasDefinition]:
    return [ingest_pb2.AliasDefinition(alias=a, name=name, type=kind) for a, (name, kind) in aliases.items()]


def readings(
    base_us: int,
    *,
    doubles: Triples = (),
    int64s: Triples = (),
    bools: Triples = (),
    strings: Triples = (),
    historical: bool = False,
) -> ingest_pb2.Readings:
    made = ingest_pb2.Readings(base_time_us=base_us, historical=historical)
    for name, triples in (("doubles", doubles), ("int64s", int64s), ("bools", bools), ("strings", strings)):
        rows = list(triples)
        if rows:
            column = getattr(made, name)
            column.aliases.extend(row[0] for row in rows)
            column.time_deltas_us.extend(row[1] for row in rows)
            column.values.extend(row[2] for row in rows)
    return made


def device(tenant: str, name: str) -> tuple[tuple[str, str], ...]:
    return (("atlasco-tenant", tenant), ("atlasco-device", name))


def service(tenant: str, name: str = "test") -> tuple[tuple[str, str], ...]:
    return (("atlasco-tenant", tenant), ("atlasco-service", name))


def reason_name(rejection: Any) -> str:
    return ingest_pb2.RejectionReason.Name(rejection.reason).removeprefix("REJECTION_REASON_")


class RawStream:
    """One stream. Messages go out as they are; nothing is checked, numbered or sent again by itself."""

    def __init__(
        self, channel: grpc.aio.Channel, tenant: str, name: str, *, as_service: bool = False, session: bytes = b""
    ) -> None:
        method: Any = channel.stream_stream(METHOD, None, ingest_pb2.StreamTelemetryResponse.FromString)
        self.name = name
        self.session = session or secrets.token_bytes(16)
        self.call = method(metadata=service(tenant) if as_service else device(tenant, name))
        self.acked = 0
        self.told: list[ingest_pb2.Rejection] = []
        self.welcome: ingest_pb2.Welcome | None = None
        self._heard: list[ingest_pb2.StreamTelemetryResponse] = []

    async def say(self, request: ingest_pb2.StreamTelemetryRequest | bytes) -> None:
        raw = request if isinstance(request, bytes) else request.SerializeToString()
        async with asyncio.timeout(PATIENCE_S):
            await self.call.write(raw)

    async def say_hello(self, **changes: Any) -> None:
        fields: dict[str, Any] = {"protocol_version": 1, "device_id": self.name, "session_id": self.session}
        aliases = changes.pop("aliases", ALIASES)
        hello = ingest_pb2.Hello(**{**fields, **changes})
        if aliases:
            hello.dictionary.aliases.extend(definitions(aliases))
        await self.say(ingest_pb2.StreamTelemetryRequest(hello=hello))

    async def hello(self, **changes: Any) -> ingest_pb2.Welcome:
        """Say hello and hear the welcome."""
        await self.say_hello(**changes)
        self.welcome = (await self.hear("welcome")).welcome
        self.acked = self.welcome.committed_sequence
        return self.welcome

    async def send(self, sequence: int, what: ingest_pb2.Readings) -> None:
        data = ingest_pb2.DataMessage(sequence=sequence, readings=what)
        await self.say(ingest_pb2.StreamTelemetryRequest(data=data))

    async def define(self, aliases: Mapping[int, tuple[str, Any]]) -> list[tuple[int, str]]:
        """Define more aliases; returns the errors."""
        request = ingest_pb2.DefineAliases(aliases=definitions(aliases))
        await self.say(ingest_pb2.StreamTelemetryRequest(define_aliases=request))
        answer = (await self.hear("aliases_defined")).aliases_defined
        return [(error.alias, reason_name(error)) for error in answer.errors]

    async def confirm(self, through: int) -> None:
        request = ingest_pb2.ConfirmRejections(through_sequence=through)
        await self.say(ingest_pb2.StreamTelemetryRequest(confirm_rejections=request))

    async def hear(self, kind: str, deadline_s: float = PATIENCE_S) -> ingest_pb2.StreamTelemetryResponse:
        """The next message of a kind; others are kept for later."""
        for position, held in enumerate(self._heard):
            if held.WhichOneof("message") == kind:
                return self._heard.pop(position)
        response: Any
        async with asyncio.timeout(deadline_s):
            while True:
                try:
                    response = await self.call.read()
                except grpc.aio.AioRpcError:
                    response = grpc.aio.EOF
                if response is grpc.aio.EOF:
                    raise EOFError(f"the stream ended with {await self.call.code()} before a {kind}")
                if response.WhichOneof("message") == kind:
                    found: ingest_pb2.StreamTelemetryResponse = response
                    return found
                self._heard.append(response)

    async def acks_through(self, sequence: int) -> list[ingest_pb2.Rejection]:
        """Read until a message is acked, if it is not yet; returns every rejection told meanwhile."""
        told: list[ingest_pb2.Rejection] = []
        while self.acked < sequence:
            told += await self.next_ack()
        return told

    async def next_ack(self) -> list[ingest_pb2.Rejection]:
        """Read one ack; returns its rejections."""
        ack = (await self.hear("ack")).ack
        assert ack.committed_sequence >= self.acked, "acks never go back"
        assert all(rejection.sequence <= ack.committed_sequence for rejection in ack.rejections)
        self.acked = ack.committed_sequence
        self.told += ack.rejections
        return list(ack.rejections)

    async def rejected(self, sequence: int) -> dict[int | None, str]:
        """Read until a message is acked; its rejections as index -> reason, each told once."""
        await self.acks_through(sequence)
        told = [one for one in self.told if one.sequence == sequence]
        found = {one.index if one.HasField("index") else None: reason_name(one) for one in told}
        assert len(found) == len(told), "a reading is rejected once"
        assert all(0 < len(one.text.encode()) <= 200 for one in told)
        return found

    async def ended(self, deadline_s: float = PATIENCE_S) -> End:
        """How the stream ends, once it does."""
        async with asyncio.timeout(deadline_s):
            try:
                while (response := await self.call.read()) is not grpc.aio.EOF:
                    self._heard.append(response)
            except grpc.aio.AioRpcError as error:
                return end_of(error)
            code = await self.call.code()
            if code is grpc.StatusCode.OK:
                return End("OK", "")
            trailing = grpc.aio.AioRpcError(
                code, await self.call.initial_metadata(), await self.call.trailing_metadata(), await self.call.details()
            )
            return end_of(trailing)

    async def half_close(self) -> End:
        await self.call.done_writing()
        return await self.ended()

    def heard(self, kind: str) -> list[ingest_pb2.StreamTelemetryResponse]:
        """What was read and not asked for yet."""
        return [held for held in self._heard if held.WhichOneof("message") == kind]

    def drop(self) -> None:
        """As if the network was lost."""
        self.call.cancel()
