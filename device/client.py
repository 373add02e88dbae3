"""The device client: carries out on gRPC what `session.py` decides, for messages that `buffer.py` holds.

One task per client runs streams one after the other for as long as the client is open; within a stream one task
writes and one reads. The caller's tasks only ever touch the buffer: `send` returns when its messages are buffered,
`flush` when they are durable.
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

import grpc
from atlasco.telemetry.v1 import ingest_pb2

from device.account import Account
from device.backoff import Backoff
from device.buffer import Buffer
from device.connection import DevelopmentIdentity, TlsFiles, open_channel
from device.dictionary import Attribute, Dictionary, ValueType
from device.errors import ClientClosedError, DeviceError, FlushTimeoutError, MessageTooLargeError
from device.latency import LatencyHistogram
from device.outcomes import Rejected, Statistics, log_rejections
from device.packing import Column, Packed, PackingLimits, Reading, Value, pack, pack_columns
from device.session import Session, SessionSettings
from device.settings import ClientSettings
from device.stream import Stream, StreamEnd, after_stream
from device.wire import FRAME_OVERHEAD

CLIENT_NAME = "atlasco-python/0.1"

logger = logging.getLogger(__name__)


class DeviceClient:
    """Streams one device's readings and remembers them until they are durable.

        async with DeviceClient("gateway:7070", device_id="freezer-7", identity=identity) as client:
            client.define("temperature", ValueType.DOUBLE, "Cel")
            await client.send([("temperature", time.time_ns() // 1000, -18.2)])
            await client.flush(deadline_s=5)

    Pass `channel` to share a connection between clients (see ChannelPool); it is then not closed here. Pass
    `buffer` to persist what is unacked; the client closes it.

    `on_rejections` is called with each batch of rejections, every one exactly once per session and process, and
    they are confirmed when it returns; it must not raise. With None they wait for `rejections()` instead and are
    confirmed as they are taken; the server ends the stream when too many wait. `on_acked` is called with the
    ticket through which everything is durable, save what was rejected (which may be told later, after a
    reconnect).

    A permanent error (see device.errors) ends the client: `send`, `flush`, `rejections` and leaving the context
    raise it.
    """

    def __init__(
        self,
        target: str = "",
        *,
        device_id: str,
        identity: DevelopmentIdentity | None = None,
        tls: TlsFiles | None = None,
        channel: grpc.aio.Channel | None = None,
        entity_type: str = "",
        labels: Mapping[str, str] | None = None,
        attributes: Iterable[Attribute] = (),
        buffer: Buffer | None = None,
        settings: ClientSettings | None = None,
        on_rejections: Callable[[Sequence[Rejected]], None] | None = log_rejections,
        on_acked: Callable[[int], None] | None = None,
        latency: LatencyHistogram | None = None,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        if not target and channel is None:
            raise ValueError("a target or a channel is needed")
        self.device_id = device_id
        self._target = target
        self._tls = tls
        self._given_channel = channel
        self._metadata = identity.metadata() if identity else ()
        self._entity_type = entity_type
        self._labels = dict(labels or {})
        self._settings = settings or ClientSettings()
        self._buffer = Buffer() if buffer is None else buffer
        self._on_rejections = on_rejections
        self._clock = clock
        self._rng = rng or random.Random()
        self._session = Session(
            acked=self._buffer.acked, settings=SessionSettings(ack_timeout_s=self._settings.ack_timeout_s)
        )
        if self._settings.dictionary_known:
            self._session.assume_dictionary_known()
        self._account = Account(
            device_id,
            self._buffer,
            self._session,
            latency=latency or LatencyHistogram(),
            clock=clock,
            on_rejections=on_rejections,
            on_acked=on_acked,
            wake=self._notify,
        )
        self._failure: DeviceError | None = None
        self._failure_told = False
        self._task: asyncio.Task[None] | None = None
        self._stream: Stream | None = None
        for attribute in attributes:
            self._buffer.define(attribute)

    # -- opening and closing ------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Start to connect; does not wait for it, for a device may be offline for long."""
        if self._task is not None:
            raise ClientClosedError("the client is already open")
        self._wake = asyncio.Event()
        self._account.open()
        self._channel = self._given_channel or open_channel(self._target, tls=self._tls)
        self._task = asyncio.create_task(self._run(), name=f"device {self.device_id}")

    async def close(self) -> None:
        """End the stream and let go of everything. Unacked messages stay only in a persistent buffer."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait([self._task])
        self._task = None
        self._end(ClientClosedError("the client is closed"))
        if self._given_channel is None:
            await self._channel.close()
        self._buffer.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for the last acks, then close.

        Raises the permanent error that nobody was told, and FlushTimeoutError when messages of a buffer in memory
        are given up: they would be lost in silence.
        """
        try:
            if error is None and not self._failure_told:
                await self._flush_before_closing()
        finally:
            await self.close()

    async def _flush_before_closing(self) -> None:
        try:
            await self.flush(self._settings.close_deadline_s)
        except FlushTimeoutError:
            if not self._buffer.persistent:
                raise

    # -- sending ------------------------------------------------------------------------------------------------

    def define(self, name: str, value_type: ValueType, unit: str = "") -> int:
        """Declare an attribute, once for the life of the buffer; returns its alias.

        Raises AttributeRedefinedError, and JournalError when the buffer is persistent and cannot write.
        """
        alias = self._buffer.define(Attribute(name, value_type, unit))
        self._notify()
        return alias

    async def send(
        self,
        readings: Iterable[Reading | tuple[str, int, Value]],
        *,
        historical: bool = False,
        wait: bool = True,
    ) -> list[int]:
        """Buffer readings for sending; returns the tickets of their messages.

        A list goes into as few messages as the server's limits allow. With `wait` the call waits for room in the
        buffer, else it raises BufferFullError and nothing of the list is buffered. Returning says that the
        readings will be sent, not that they were; `flush` waits until they are durable. Raises also
        UndefinedAttributeError, ValueMismatchError, MessageTooLargeError, JournalError, and the client's
        permanent error.
        """
        self._raise_failure()
        return await self._accept(pack(readings, self._buffer.dictionary, self.limits, historical=historical), wait)

    async def send_columns(
        self,
        *,
        doubles: Column | None = None,
        int64s: Column | None = None,
        bools: Column | None = None,
        strings: Column | None = None,
        historical: bool = False,
        wait: bool = True,
    ) -> list[int]:
        """As `send`, for whole columns under aliases from `define`: no Python object per reading is needed."""
        self._raise_failure()
        packed = pack_columns(
            self.limits, doubles=doubles, int64s=int64s, bools=bools, strings=strings, historical=historical
        )
        return await self._accept(packed, wait)

    async def send_packed(self, packed: Sequence[Packed], *, wait: bool = True) -> list[int]:
        """As `send`, for messages packed before; each is sent as it is."""
        self._raise_failure()
        for one in packed:
            if len(one.payload) + FRAME_OVERHEAD > self.limits.max_message_bytes:
                raise MessageTooLargeError(
                    f"{len(one.payload)} bytes of readings; a message has {self.limits.max_message_bytes} at most"
                )
        return await self._accept(packed, wait)

    async def _accept(self, packed: Sequence[Packed], wait: bool) -> list[int]:
        if wait:
            tickets = []
            for one in packed:
                tickets.append((await self._buffer.put(one)).ticket)
                self._notify()
            return tickets
        messages = self._buffer.offer(packed)
        self._notify()
        return [message.ticket for message in messages]

    async def flush(self, deadline_s: float | None = None) -> None:
        """Wait until everything buffered by now is durable (or rejected).

        Raises FlushTimeoutError after `deadline_s`, and the client's permanent error.
        """
        wanted = self._buffer.last_ticket
        try:
            async with asyncio.timeout(deadline_s):
                while self._failure is None and self._buffer.acked_ticket < wanted:
                    await self._account.wait_progress()
        except TimeoutError:
            raise FlushTimeoutError(wanted - self._buffer.acked_ticket) from None
        if self._buffer.acked_ticket < wanted:
            self._raise_failure()

    async def rejections(self) -> AsyncIterator[Rejected]:
        """Rejections as they come, each confirmed to the server when the next one is asked for.

        Needs `on_rejections=None`. Ends never, but with the client's permanent error or ClientClosedError.
        """
        if self._on_rejections is not None:
            raise ValueError("rejections go to on_rejections; pass None to iterate over them")
        while True:
            for rejected in self._account.untaken():
                yield rejected
            self._raise_failure()
            await self._account.wait_rejections()

    def disconnect(self, *, with_next_message: bool = False) -> None:
        """Break the current stream without ceremony, as a lost network would. For tests and drills.

        At once, when what is out may or may not have arrived; or `with_next_message`, which is lost on its way.
        """
        if self._stream is None:
            return
        if with_next_message:
            self._stream.lose_next_message()
        else:
            self._stream.abandon("disconnected on request")

    def statistics(self) -> Statistics:
        """A snapshot of the counts."""
        return self._account.statistics()

    @property
    def latency(self) -> LatencyHistogram:
        """Where times from the first writing of a message to its ack are recorded."""
        return self._account.latency

    @latency.setter
    def latency(self, histogram: LatencyHistogram) -> None:
        self._account.latency = histogram

    @property
    def limits(self) -> PackingLimits:
        """What a message may hold: the server's word, once it has welcomed the client."""
        return self._account.limits

    @property
    def alias_errors(self) -> dict[int, str]:
        """Aliases that cannot be used, and why."""
        return self._account.alias_errors

    @property
    def messages_out(self) -> int:
        """Messages written to the current stream and not acked."""
        return self._session.messages_out

    @property
    def dictionary(self) -> Dictionary:
        """Every attribute defined so far."""
        return self._buffer.dictionary

    # -- one stream after the other -------------------------------------------------------------------------------

    async def _run(self) -> None:
        backoff = Backoff(base_s=self._settings.backoff_base_s, cap_s=self._settings.backoff_cap_s, rng=self._rng)
        try:
            while True:
                before = self._buffer.acked_ticket
                end = await self._run_stream()
                if self._buffer.acked_ticket > before:
                    backoff.reset()
                delay = after_stream(end, backoff, self._rng, self._settings.superseded_delay_s)
                logger.debug("%s: %s; next attempt in %.2f s", self.device_id, end, delay)
                await asyncio.sleep(delay)
        except DeviceError as error:
            self._end(error)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            # A bug here must not leave callers waiting for room or for acks that will never come.
            logger.exception("%s: the client failed", self.device_id)
            self._end(DeviceError(f"the client failed: {error!r}"))

    async def _run_stream(self) -> StreamEnd:
        self._stream = Stream(
            self._channel,
            metadata=self._metadata,
            owner=self._account,
            session=self._session,
            wake=self._wake,
            clock=self._clock,
        )
        try:
            return await self._stream.run(self._hello(), self._settings.welcome_timeout_s)
        finally:
            self._stream = None
            self._session.on_disconnect()

    def _hello(self) -> tuple[ingest_pb2.Hello, int]:
        dictionary = self._buffer.dictionary
        with_id, with_aliases = self._session.hello_carries()
        hello = ingest_pb2.Hello(
            protocol_version=1,
            device_id=self.device_id,
            session_id=self._buffer.session_id,
            entity_type=self._entity_type,
            labels=self._labels,
            client=CLIENT_NAME,
        )
        if len(dictionary):
            if with_id:
                hello.dictionary.id = dictionary.id
            if with_aliases:
                hello.dictionary.aliases.extend(dictionary.definitions())
        return hello, len(dictionary)

    # -- the end ------------------------------------------------------------------------------------------------

    def _end(self, error: DeviceError) -> None:
        if self._failure is None:
            self._failure = error
            self._buffer.fail(error)
            self._account.end_waits()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            self._failure_told = True
            raise self._failure
        if self._task is None:
            raise ClientClosedError("the client is not open")

    def _notify(self) -> None:
        if self._task is not None:
            self._wake.set()
