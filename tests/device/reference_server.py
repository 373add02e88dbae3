"""A small in-memory server that keeps the rules of ingest.proto, and breaks the world around them on demand.

It is the client's counterpart in tests: sessions with a committed sequence, rejections told again until confirmed,
credits, throttle, reconnect notice, one stream per device. Its faults never break a promise of the protocol; they
are what a network, an overload or a second copy of a client does.
"""

import asyncio
import math
import time
from dataclasses import dataclass, field

import grpc
from atlasco.telemetry.v1 import common_pb2, ingest_pb2, ingest_pb2_grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

Key = tuple[str, int]
DOUBLE, INT64 = common_pb2.ATTRIBUTE_TYPE_DOUBLE, common_pb2.ATTRIBUTE_TYPE_INT64
BOOL, STRING = common_pb2.ATTRIBUTE_TYPE_BOOL, common_pb2.ATTRIBUTE_TYPE_STRING
YEAR_10000_US = 253_402_300_800_000_000


@dataclass
class SessionRecord:
    committed: int = 0
    unconfirmed: list[ingest_pb2.Rejection] = field(default_factory=list)


@dataclass
class DeviceRecord:
    sessions: dict[bytes, SessionRecord] = field(default_factory=dict)
    # (attribute, time) -> (value, revision)
    readings: dict[Key, tuple[object, int]] = field(default_factory=dict)
    epoch: int = 0
    hellos: list[ingest_pb2.Hello] = field(default_factory=list)
    confirmations: list[int] = field(default_factory=list)
    definitions: list[list[int]] = field(default_factory=list)
    received: list[int] = field(default_factory=list)
    most_out: int = 0


@dataclass
class Faults:
    """What goes wrong next. Each field says what it does; the defaults do nothing."""

    # Messages wait uncommitted (and so unacked) while set.
    hold_commits: bool = False
    # This many acks are lost after their commit.
    lose_acks: int = 0
    # The connection breaks when this many more data messages have arrived; the last one is not committed.
    cut_after: int | None = None
    # Every Hello is refused with this status and reason.
    refuse: tuple[grpc.StatusCode, str] | None = None
    # The next stream ends cleanly right after Hello.
    end_cleanly: int = 0
    # Hello stays unanswered.
    silent: bool = False


class ReferenceServer:
    """`async with ReferenceServer() as server:` listens on `server.target`, on loopback."""

    def __init__(
        self,
        *,
        credit_messages: int = 16,
        credit_bytes: int = 1 << 20,
        limits: ingest_pb2.Limits | None = None,
        store: bool = True,
    ) -> None:
        self.credits = ingest_pb2.Credits(messages=credit_messages, bytes=credit_bytes)
        self.limits = limits or ingest_pb2.Limits(
            max_message_bytes=1 << 20,
            max_readings_per_message=10_000,
            max_string_bytes=100,
            max_aliases=16383,
            window_past_us=100 * 365 * 86_400 * 10**6,
            window_future_us=600 * 10**6,
        )
        self.faults = Faults()
        self.devices: dict[str, DeviceRecord] = {}
        self.dictionaries: dict[bytes, list[bytes]] = {}
        self.streams: dict[str, ServerStream] = {}
        self.store = store
        self.readings_received = 0
        self.target = ""
        self._server: grpc.aio.Server | None = None

    async def __aenter__(self) -> "ReferenceServer":
        await self.start()
        return self

    async def start(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        ingest_pb2_grpc.add_IngestServiceServicer_to_server(_Servicer(self), self._server)
        port = self._server.add_insecure_port(self.target or "127.0.0.1:0")
        self.target = f"127.0.0.1:{port}"
        await self._server.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        if self._server is not None:
            for stream in list(self.streams.values()):
                stream.end(grpc.StatusCode.UNAVAILABLE, "", "stopping")
            await self._server.stop(0)
            self._server = None

    # -- what tests look at and do ------------------------------------------------------------------------------

    def device(self, device_id: str) -> DeviceRecord:
        return self.devices.setdefault(device_id, DeviceRecord())

    async def readings(self, device_id: str) -> dict[Key, object]:
        return {key: value for key, (value, _) in self.device(device_id).readings.items()}

    def cut(self) -> None:
        """Break every stream."""
        for stream in list(self.streams.values()):
            stream.end(grpc.StatusCode.UNAVAILABLE, "", "cut on request")

    async def interrupt(self) -> None:
        self.cut()

    def forget_sessions(self) -> None:
        for device in self.devices.values():
            device.sessions.clear()

    def release(self) -> None:
        """Let held commits go on."""
        self.faults.hold_commits = False
        for stream in self.streams.values():
            stream.changed.set()

    async def tell(self, device_id: str, response: ingest_pb2.StreamTelemetryResponse) -> None:
        await self.streams[device_id].tell(response)


class _Ended(Exception):
    pass


class ServerStream:
    """One device's stream at the server: a reader, and a committer that acks what it has stored."""

    def __init__(self, server: ReferenceServer, context: grpc.aio.ServicerContext) -> None:
        self._server = server
        self._context = context
        self._status: tuple[grpc.StatusCode, str, str, dict[str, str]] | None = None
        self._ended = asyncio.Event()
        self.changed = asyncio.Event()
        self._writing = asyncio.Lock()
        self._pending: list[ingest_pb2.DataMessage] = []
        self._aliases: dict[int, ingest_pb2.AliasDefinition] = {}
        self._last = 0

    def end(self, code: grpc.StatusCode, reason: str, text: str, **metadata: str) -> None:
        if self._status is None:
            self._status = (code, reason, text, metadata)
        self._ended.set()

    async def tell(self, response: ingest_pb2.StreamTelemetryResponse) -> None:
        async with self._writing:
            await self._context.write(response)

    async def run(self) -> None:
        work = asyncio.create_task(self._work())
        ended = asyncio.create_task(self._ended.wait())
        try:
            await asyncio.wait([work, ended], return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            work.cancel()
            await asyncio.wait([work, ended])
        if not work.cancelled() and (error := work.exception()) is not None:
            raise error
        if self._status is not None:
            await self._abort(*self._status)

    async def _abort(self, code: grpc.StatusCode, reason: str, text: str, metadata: dict[str, str]) -> None:
        if code is grpc.StatusCode.OK:
            return
        if not reason:
            await self._context.abort(code, text)
        detail = any_pb2.Any()
        detail.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="telemetry.atlasco", metadata=metadata))
        status = status_pb2.Status(code=code.value[0], message=text, details=[detail])
        await self._context.abort_with_status(rpc_status.to_status(status))

    # -- Hello --------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        first = await self._context.read()
        if first is grpc.aio.EOF:
            return
        if first.WhichOneof("message") != "hello":
            return self.end(grpc.StatusCode.FAILED_PRECONDITION, "HELLO_REQUIRED", "Hello comes first")
        hello, faults = first.hello, self._server.faults
        self.device_id = hello.device_id
        device = self._server.device(hello.device_id)
        device.hellos.append(hello)
        if faults.refuse is not None:
            return self.end(*faults.refuse, "refused on request")
        if faults.silent:
            await self._ended.wait()
        if faults.end_cleanly:
            faults.end_cleanly -= 1
            return None
        if len(hello.session_id) != 16:
            return self.end(grpc.StatusCode.INVALID_ARGUMENT, "HELLO_INVALID", "session_id is not 16 bytes")
        older = self._server.streams.get(hello.device_id)
        if older is not None:
            older.end(grpc.StatusCode.ABORTED, "STREAM_SUPERSEDED", "a newer stream took over")
        self._server.streams[hello.device_id] = self
        device.epoch += 1
        self._device = device
        self._session = device.sessions.setdefault(hello.session_id, SessionRecord())
        self._last = self._session.committed
        dictionary_status, errors = self._take_dictionary(hello)
        try:
            await self.tell(
                ingest_pb2.StreamTelemetryResponse(
                    welcome=ingest_pb2.Welcome(
                        committed_sequence=self._session.committed,
                        dictionary=dictionary_status,
                        alias_errors=errors,
                        limits=self._server.limits,
                        credits=self._server.credits,
                        epoch=device.epoch,
                        server_time_us=time.time_ns() // 1000,
                    )
                )
            )
            if self._session.unconfirmed:
                await self._ack(self._session.unconfirmed)
            async with asyncio.TaskGroup() as tasks:
                committer = tasks.create_task(self._commit_all())
                await self._read_all()
                await self._drained()
                committer.cancel()
        finally:
            if self._server.streams.get(hello.device_id) is self:
                del self._server.streams[hello.device_id]

    def _take_dictionary(
        self, hello: ingest_pb2.Hello
    ) -> tuple[ingest_pb2.Welcome.DictionaryStatus, list[ingest_pb2.AliasError]]:
        sent = hello.dictionary
        if not sent.id and not sent.aliases:
            return ingest_pb2.Welcome.DICTIONARY_STATUS_UNSPECIFIED, []
        encoded = [alias.SerializeToString() for alias in sent.aliases]
        if sent.id and not encoded:
            if sent.id not in self._server.dictionaries:
                return ingest_pb2.Welcome.DICTIONARY_STATUS_UNKNOWN, []
            encoded = self._server.dictionaries[sent.id]
        elif sent.id and self._server.dictionaries.setdefault(sent.id, encoded) != encoded:
            conflict = ingest_pb2.REJECTION_REASON_DICTIONARY_CONFLICT
            return ingest_pb2.Welcome.DICTIONARY_STATUS_DEFINED, [
                ingest_pb2.AliasError(alias=alias.alias, reason=conflict) for alias in sent.aliases
            ]
        errors = self._define([ingest_pb2.AliasDefinition.FromString(one) for one in encoded])
        return ingest_pb2.Welcome.DICTIONARY_STATUS_DEFINED, errors

    def _define(self, aliases: list[ingest_pb2.AliasDefinition]) -> list[ingest_pb2.AliasError]:
        errors = []
        for alias in aliases:
            if not alias.name:
                errors.append(
                    ingest_pb2.AliasError(alias=alias.alias, reason=ingest_pb2.REJECTION_REASON_ATTRIBUTE_NAME_INVALID)
                )
            elif self._aliases.setdefault(alias.alias, alias) != alias:
                errors.append(
                    ingest_pb2.AliasError(alias=alias.alias, reason=ingest_pb2.REJECTION_REASON_ALIAS_REDEFINED)
                )
        return errors

    # -- reading ------------------------------------------------------------------------------------------------

    async def _read_all(self) -> None:
        while True:
            request = await self._context.read()
            if request is grpc.aio.EOF:
                return
            match request.WhichOneof("message"):
                case "data":
                    if not await self._take(request.data):
                        return
                case "define_aliases":
                    self._device.definitions.append([alias.alias for alias in request.define_aliases.aliases])
                    errors = self._define(list(request.define_aliases.aliases))
                    await self.tell(
                        ingest_pb2.StreamTelemetryResponse(aliases_defined=ingest_pb2.AliasesDefined(errors=errors))
                    )
                case "confirm_rejections":
                    through = request.confirm_rejections.through_sequence
                    self._device.confirmations.append(through)
                    self._session.unconfirmed = [one for one in self._session.unconfirmed if one.sequence > through]
                case "hello":
                    return self.end(grpc.StatusCode.FAILED_PRECONDITION, "HELLO_REPEATED", "a second Hello")
                case _:
                    pass

    async def _take(self, data: ingest_pb2.DataMessage) -> bool:
        faults = self._server.faults
        if data.sequence == 0:
            self.end(grpc.StatusCode.INVALID_ARGUMENT, "SEQUENCE_INVALID", "sequence 0")
            return False
        if data.sequence > self._last + 1:
            self.end(grpc.StatusCode.OUT_OF_RANGE, "SEQUENCE_GAP", "a gap", expected=str(self._last + 1))
            return False
        self._device.received.append(data.sequence)
        if faults.cut_after is not None:
            faults.cut_after -= 1
            if faults.cut_after < 0:
                faults.cut_after = None
                self.end(grpc.StatusCode.UNAVAILABLE, "", "cut after messages")
                return False
        if data.sequence == self._last + 1:
            self._last = data.sequence
            self._pending.append(data)
            self._device.most_out = max(self._device.most_out, self._last - self._session.committed)
            self.changed.set()
        return True

    # -- committing ---------------------------------------------------------------------------------------------

    async def _drained(self) -> None:
        while self._pending:  # noqa: ASYNC110
            await asyncio.sleep(0)

    async def _commit_all(self) -> None:
        while True:
            await self.changed.wait()
            self.changed.clear()
            if self._server.faults.hold_commits or not self._pending:
                continue
            batch, self._pending = self._pending, []
            rejections: list[ingest_pb2.Rejection] = []
            for data in batch:
                rejections += self._store(data)
            self._session.unconfirmed += rejections
            self._session.committed = batch[-1].sequence
            if self._server.faults.lose_acks:
                self._server.faults.lose_acks -= 1
            else:
                await self._ack(rejections)

    async def _ack(self, rejections: list[ingest_pb2.Rejection]) -> None:
        await self.tell(
            ingest_pb2.StreamTelemetryResponse(
                ack=ingest_pb2.Ack(committed_sequence=self._session.committed, rejections=rejections)
            )
        )

    def _store(self, data: ingest_pb2.DataMessage) -> list[ingest_pb2.Rejection]:
        readings, rejections, limits = data.readings, [], self._server.limits
        columns = ((DOUBLE, readings.doubles), (INT64, readings.int64s), (BOOL, readings.bools))
        total = sum(len(column.values) for _, column in (*columns, (STRING, readings.strings)))
        self._server.readings_received += total
        if not self._server.store:
            return []
        reasons = ingest_pb2.RejectionReason
        if total > limits.max_readings_per_message:
            return [ingest_pb2.Rejection(sequence=data.sequence, reason=ingest_pb2.REJECTION_REASON_TOO_MANY_READINGS)]
        index = 0
        accepted: dict[Key, tuple[int, object]] = {}
        for kind, column in (*columns, (STRING, readings.strings)):
            aliases, deltas, values = column.aliases, column.time_deltas_us, column.values
            length = max(len(aliases), len(deltas), len(values))
            mismatch = len(aliases) != length or len(values) != length or len(deltas) not in (0, length)
            for position in range(length):
                if mismatch:
                    problem: str | None = "COLUMN_LENGTH_MISMATCH"
                else:
                    stamp = readings.base_time_us + (deltas[position] if deltas else 0)
                    problem = self._problem(kind, aliases[position], stamp, values[position])
                if problem is None:
                    name = self._aliases[aliases[position]].name
                    value = values[position]
                    value = value.decode() if isinstance(value, bytes) else value
                    earlier = accepted.get((name, stamp))
                    if earlier is not None and not same(earlier[1], value):
                        rejections.append((earlier[0], "SUPERSEDED_IN_MESSAGE"))
                    accepted[name, stamp] = (index, value)
                else:
                    rejections.append((index, problem))
                index += 1
        for key, (_, value) in accepted.items():
            stored = self._device.readings.get(key)
            if stored is None:
                self._device.readings[key] = (value, 0)
            elif not same(stored[0], value):
                self._device.readings[key] = (value, stored[1] + 1)
        return [
            ingest_pb2.Rejection(
                sequence=data.sequence,
                index=at,
                reason=reasons.Value(f"REJECTION_REASON_{reason}"),
                text=reason.lower(),
            )
            for at, reason in sorted(rejections)
        ]

    def _problem(self, kind: int, alias: int, stamp: int, value: object) -> str | None:
        definition, limits = self._aliases.get(alias), self._server.limits
        if definition is None:
            return "UNKNOWN_ALIAS"
        if kind != definition.type and not (kind == INT64 and definition.type == DOUBLE):
            return "TYPE_MISMATCH"
        if isinstance(value, bytes):
            if len(value) > limits.max_string_bytes:
                return "STRING_TOO_LONG"
            try:
                if "\0" in value.decode():
                    return "STRING_INVALID"
            except UnicodeDecodeError:
                return "STRING_INVALID"
        if not 0 < stamp < YEAR_10000_US:
            return "TIMESTAMP_INVALID"
        now = time.time_ns() // 1000
        if stamp < now - limits.window_past_us:
            return "TIMESTAMP_TOO_OLD"
        if stamp > now + limits.window_future_us:
            return "TIMESTAMP_TOO_NEW"
        return None


def same(one: object, other: object) -> bool:
    """Equal as stored: NaN equals NaN."""
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return type(one) is type(other) and one == other


class _Servicer(ingest_pb2_grpc.IngestServiceServicer):
    def __init__(self, server: ReferenceServer) -> None:
        self._server = server

    async def StreamTelemetry(self, _: object, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        metadata = dict(context.invocation_metadata() or ())
        if "atlasco-tenant" not in metadata:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no identity")
        await ServerStream(self._server, context).run()
