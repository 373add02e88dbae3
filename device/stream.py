"""One stream, from Hello to its end: reads and writes on gRPC what the session decides.

1. Write Hello, read Welcome within a deadline.
2. Let the session decide: resume, or start over (then this stream is given up and the next one says Hello).
3. Write what `Session.next_action` says, while reading what the server says.
4. Report how it ended. The end of a stream is never an ack.
"""

import asyncio
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import grpc
from atlasco.telemetry.v1 import ingest_pb2

from device.backoff import Backoff
from device.buffer import Buffer, Message
from device.errors import DeviceError, StreamError, SupersededError
from device.session import (
    Abandon,
    HalfClose,
    Leave,
    Resume,
    SendConfirmation,
    SendData,
    SendDefinitions,
    SendWholeDictionary,
    Session,
    StartNewSession,
    Wait,
)
from device.wire import data_frame, error_from_rpc

METHOD = "/atlasco.telemetry.v1.IngestService/StreamTelemetry"
# How long the server may take to end a stream after the client has closed its side.
HALF_CLOSE_GRACE_S = 5.0

Method = grpc.aio.StreamStreamMultiCallable[bytes, ingest_pb2.StreamTelemetryResponse]


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """How a stream ended: with an error, on a notice, to say Hello again, or (all unset) cleanly."""

    error: StreamError | None = None
    notice: Leave | None = None
    again_at_once: bool = False
    abandoned: str = ""


class StreamOwner(Protocol):
    """What a stream needs of the client it serves."""

    @property
    def buffer(self) -> Buffer:
        """The messages to send."""

    def welcomed(self, welcome: ingest_pb2.Welcome, drop_through: int) -> None:
        """The session resumes."""

    def new_session(self, why: str) -> None:
        """The session is lost."""

    def note_alias_errors(self, errors: Iterable[ingest_pb2.AliasError]) -> None:
        """Some aliases cannot be used."""

    def writing(self, message: Message, now: float) -> None:
        """A message is about to be written."""

    def acked(self, ack: ingest_pb2.Ack) -> None:
        """The server told of progress."""

    def throttled(self) -> None:
        """The server asked for a pause."""


def after_stream(end: StreamEnd, backoff: Backoff, rng: random.Random, superseded_delay_s: float | None) -> float:
    """Seconds to wait before the next stream; raises the StreamError that the client must not retry."""
    if isinstance(end.error, SupersededError):
        if superseded_delay_s is None:
            raise end.error
        return rng.uniform(superseded_delay_s, 2 * superseded_delay_s)
    if end.error is not None and not end.error.retriable:
        raise end.error
    if end.notice is not None:
        return rng.uniform(end.notice.min_delay_s, end.notice.max_delay_s)
    if end.again_at_once:
        return 0.0
    return backoff.next_delay()


class Stream:
    """One RPC. Used once."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        metadata: tuple[tuple[str, str], ...],
        owner: StreamOwner,
        session: Session,
        wake: asyncio.Event,
        clock: Callable[[], float],
    ) -> None:
        self._owner = owner
        self._session = session
        self._wake = wake
        self._clock = clock
        self._abandoned = ""
        self._lose_next_message = False
        # While it is being opened: what ends that.
        self._opening: asyncio.Timeout | None = None
        # Requests are bytes already: a message is encoded once, however often it is sent.
        method: Method = channel.stream_stream(METHOD, None, ingest_pb2.StreamTelemetryResponse.FromString)
        self._call = method(metadata=metadata)

    def abandon(self, why: str) -> None:
        """Cancel the RPC."""
        self._abandoned = self._abandoned or why
        self._call.cancel()
        if self._opening is not None and not self._opening.expired():
            # gRPC's write waits on, for a call that was cancelled before it was under way.
            self._opening.reschedule(asyncio.get_running_loop().time())

    def lose_next_message(self) -> None:
        """Cancel the RPC instead of writing the next data message."""
        self._lose_next_message = True

    async def run(self, hello: tuple[ingest_pb2.Hello, int], welcome_timeout_s: float) -> StreamEnd:
        """Run the stream to its end. Raises nothing of the stream's own; JournalError when the buffer fails."""
        failure: DeviceError | None = None
        end = StreamEnd()
        try:
            given_up = await self._open(*hello, welcome_timeout_s)
            if given_up is not None:
                return given_up
            async with asyncio.TaskGroup() as tasks:
                writer = tasks.create_task(self._write())
                try:
                    end = await self._read()
                except DeviceError as error:
                    # Kept out of the group, which would wrap it.
                    failure = error
                finally:
                    writer.cancel()
        except grpc.aio.AioRpcError as error:
            return StreamEnd(error=error_from_rpc(error))
        except TimeoutError:
            return StreamEnd(abandoned=self._abandoned or f"no Welcome within {welcome_timeout_s:g} s")
        except asyncio.CancelledError:
            # grpc.aio reports an RPC that was cancelled here as a cancellation of whoever reads from it.
            if not self._abandoned or _being_cancelled():
                raise
            return StreamEnd(notice=self._session.leaving, abandoned=self._abandoned)
        finally:
            self._call.cancel()
        if failure is not None:
            raise failure
        return end

    # -- Hello, Welcome -------------------------------------------------------------------------------------------

    async def _open(self, hello: ingest_pb2.Hello, aliases: int, timeout_s: float) -> StreamEnd | None:
        """Returns None when the stream is open, else why it is given up."""
        try:
            async with asyncio.timeout(timeout_s) as self._opening:
                await self._call.write(ingest_pb2.StreamTelemetryRequest(hello=hello).SerializeToString())
                response = await self._read_one()
        finally:
            self._opening = None
        if response is None or response.WhichOneof("message") != "welcome":
            return StreamEnd(abandoned="the server did not answer Hello with Welcome")
        welcome = response.welcome
        conflict = ingest_pb2.REJECTION_REASON_DICTIONARY_CONFLICT
        decision = self._session.on_welcome(
            committed=welcome.committed_sequence,
            last=self._owner.buffer.last,
            aliases=aliases,
            dictionary_unknown=welcome.dictionary == ingest_pb2.Welcome.DICTIONARY_STATUS_UNKNOWN,
            dictionary_conflict=any(error.reason == conflict for error in welcome.alias_errors),
            credit_messages=welcome.credits.messages,
            credit_bytes=welcome.credits.bytes,
        )
        match decision:
            case Resume(drop_through):
                self._owner.welcomed(welcome, drop_through)
                return None
            case StartNewSession(why):
                self._owner.new_session(why)
                return StreamEnd(again_at_once=True)
            case SendWholeDictionary():
                return StreamEnd(again_at_once=True)

    # -- reading --------------------------------------------------------------------------------------------------

    async def _read_one(self) -> ingest_pb2.StreamTelemetryResponse | None:
        response = await self._call.read()
        return response if isinstance(response, ingest_pb2.StreamTelemetryResponse) else None

    async def _read(self) -> StreamEnd:
        """Act on what the server says until the stream ends."""
        while True:
            try:
                response = await self._read_one()
            except grpc.aio.AioRpcError as error:
                return StreamEnd(error=error_from_rpc(error), notice=self._session.leaving)
            if response is None:
                return StreamEnd(notice=self._session.leaving, abandoned=self._abandoned)
            now = self._clock()
            match response.WhichOneof("message"):
                case "ack":
                    self._owner.acked(response.ack)
                case "aliases_defined":
                    self._owner.note_alias_errors(response.aliases_defined.errors)
                case "throttle":
                    self._owner.throttled()
                    self._session.on_throttle(now, response.throttle.retry_after_ms / 1000)
                    self._wake.set()
                case "reconnect_notice":
                    notice = response.reconnect_notice
                    self._session.on_notice(
                        now,
                        drain_s=notice.drain_ms / 1000,
                        min_delay_s=notice.min_delay_ms / 1000,
                        max_delay_s=notice.max_delay_ms / 1000,
                    )
                    self._wake.set()
                case _:
                    # Commands and desired state belong to devices that offer them; what a later version of the
                    # protocol adds is not for this one.
                    pass

    # -- writing --------------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        try:
            await self._write_until_closed()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # The RPC is over; the reader has its status and reports it.
            return
        except asyncio.CancelledError:
            if not self._abandoned or _being_cancelled():
                raise

    async def _write_until_closed(self) -> None:
        session, buffer = self._session, self._owner.buffer
        while True:
            self._wake.clear()
            message = buffer.get(session.next_sequence)
            frame = data_frame(message.sequence, message.payload) if message is not None else b""
            now = self._clock()
            aliases = len(buffer.dictionary)
            action = session.next_action(now, last=buffer.last, next_size=len(frame), aliases=aliases)
            match action:
                case SendData(sequence):
                    assert message is not None
                    session.on_sent(now, sequence, len(frame))
                    self._owner.writing(message, now)
                    if self._lose_next_message:
                        self.abandon("disconnected on request, with a message on its way")
                        return
                    await self._call.write(frame)
                case SendDefinitions(start):
                    definitions = ingest_pb2.DefineAliases(aliases=buffer.dictionary.definitions(start))
                    session.on_definitions_sent(aliases)
                    await self._send(ingest_pb2.StreamTelemetryRequest(define_aliases=definitions))
                case SendConfirmation(through):
                    confirmation = ingest_pb2.ConfirmRejections(through_sequence=through)
                    session.on_confirmation_sent(through)
                    await self._send(ingest_pb2.StreamTelemetryRequest(confirm_rejections=confirmation))
                case Wait(until):
                    await self._wait(None if until is None else until - now)
                case HalfClose():
                    await self._call.done_writing()
                    await asyncio.sleep(HALF_CLOSE_GRACE_S)
                    self.abandon("the server did not end the stream after the half-close")
                    return
                case Abandon(why):
                    self.abandon(why)
                    return

    async def _send(self, request: ingest_pb2.StreamTelemetryRequest) -> None:
        await self._call.write(request.SerializeToString())

    async def _wait(self, timeout_s: float | None) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        except TimeoutError:
            return


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
