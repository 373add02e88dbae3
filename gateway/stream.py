"""One device stream after its hello.

The handshake and what follows, seen from the gateway:

    1. Hello is read and checked, the epoch raised, Welcome sent.         (ingest.py)
    2. Unconfirmed rejections of earlier connections are told again.
    3. A DataMessage is counted, waits for room, and is queued in its lane.
    4. The lane commits; only then is the message settled.
    5. The ack of everything settled so far is sent; it gives credits back.
    6. Somebody ends it: the client half-closes, or the gateway sends a ReconnectNotice and waits, or a newer stream of
       the device takes over, or the client breaks a rule.

Three tasks: `_receive` (3), `_send` (5) and `_leave` (6). They talk through this object's state, all on one loop.
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import grpc
from atlasco.telemetry.v1 import ingest_pb2
from google.protobuf.message import DecodeError

from gateway.acks import Acks, Outstanding
from gateway.aliases import MAX_ALIAS, AliasProblem, AliasTable
from gateway.config import GatewayConfig
from gateway.decode import Received, count_readings, weight
from gateway.lanes import Lanes, throttle_message
from gateway.room import Bound
from gateway.slow_reader import ReaderWatch
from gateway.status import Reason, Refusal, refusal_of, sequence_gap, stream_superseded
from runtime.metrics import Metrics
from storage.errors import StorageError
from storage.model import Outcome, RejectedReading
from storage.model import Reason as RejectionReason
from storage.registry import OpenedStream, Registry, Tenant

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

# Answers that may wait for a client that does not read; then its next request waits too.
_MOST_CONTROLS = 16


class DeviceStream:
    """The state of one stream. Made once the device said hello."""

    def __init__(
        self,
        context: Context,
        tenant: Tenant,
        device: str,
        session_id: UUID,
        opened: OpenedStream,
        aliases: AliasTable,
        lanes: Lanes,
        registry: Registry,
        define: Callable[[Tenant, AliasTable, Any], Any],
        config: GatewayConfig,
        metrics: Metrics,
    ) -> None:
        self._context = context
        self._tenant = tenant
        self._device = device
        self._session_id = session_id
        self._opened = opened
        self._aliases = aliases
        self._lanes = lanes
        self._registry = registry
        self._define = define
        self._config = config
        self._metrics = metrics
        loop = asyncio.get_running_loop()
        self._clock = loop.time
        self._ended: asyncio.Future[Refusal | None] = loop.create_future()
        self._notice: asyncio.Future[ingest_pb2.ReconnectNotice.Reason.ValueType] = loop.create_future()
        self._wake = asyncio.Event()
        # Set whenever something was sent.
        self._progress = asyncio.Event()
        # Set while the client has credits left.
        self._credit = asyncio.Event()
        self._credit.set()
        self._half_closed = asyncio.Event()
        self._last_heard = self._clock()
        self._acks = Acks(opened, config)
        self._controls: deque[ingest_pb2.StreamTelemetryResponse] = deque()
        # The sender starts no further write.
        self._closing = False
        self._reader = ReaderWatch(config.write_timeout, self._give_up)
        # Set when nothing more will be committed or acked here; all that is left to do is to tell the client so.
        self.finished = asyncio.Event()

    # -- What others may do to the stream ---------------------------------------------------------------------------

    def end(self, refusal: Refusal | None) -> None:
        """End the stream, with an error or well; the first to call decides."""
        if not self._ended.done():
            self._ended.set_result(refusal)

    @property
    def epoch(self) -> int:
        """Which hello of the device this stream came with; the highest is the newest."""
        return self._opened.epoch

    def supersede(self) -> None:
        """A newer stream of the device has taken over."""
        self.end(stream_superseded())

    def ask_to_leave(self, why: ingest_pb2.ReconnectNotice.Reason.ValueType) -> None:
        """Send a ReconnectNotice and end once the client has left, or after the drain time."""
        if not self._notice.done():
            self._notice.set_result(why)

    # -- The life of the stream -------------------------------------------------------------------------------------

    async def run(self, welcome: ingest_pb2.Welcome) -> None:
        """Serve the stream until it ends.

        Raises:
            Refusal: how it ended, unless it ended well.
        """
        self._controls.append(ingest_pb2.StreamTelemetryResponse(welcome=welcome))
        self._controls += (ingest_pb2.StreamTelemetryResponse(ack=ack) for ack in self._acks.retold(self._opened))
        self._wake.set()
        async with asyncio.TaskGroup() as group:
            receiving, sending, leaving = (
                group.create_task(self._guarded(part)) for part in (self._receive, self._send, self._leave)
            )
            refusal = await self._ended
            receiving.cancel()
            leaving.cancel()
            if refusal is None or refusal.reason not in {Reason.STREAM_SUPERSEDED, Reason.SLOW_READER}:
                await self._settle(sending)
            self.finished.set()
            # `sending` is waited for, not cancelled: its write must not be cut off (see ReaderWatch.writing).
            self._closing = True
            self._wake.set()
        if refusal is not None:
            raise refusal

    async def _guarded(self, part: Callable[[], Awaitable[None]]) -> None:
        try:
            await part()
        except (Refusal, StorageError) as error:
            self.end(refusal_of(error))

    async def _settle(self, sending: asyncio.Task[None]) -> None:
        """Let what was received commit and be acked before the stream ends; the client would resend it otherwise."""
        try:
            async with asyncio.timeout(self._config.drain_timeout):
                while not (sending.done() or self._reader.is_stuck) and (
                    self._acks.outstanding or self._controls or self._acks.due
                ):
                    self._progress.clear()
                    await self._progress.wait()
        except TimeoutError:
            log.info("stream ended with messages not yet acked", extra={"unacked": self._acks.outstanding})

    # -- Receiving --------------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        while True:
            raw = await self._context.read()
            if raw is grpc.aio.EOF:
                # Not a commit point, and not even surely the client's wish: it also comes at shutdown.
                self._half_closed.set()
                self.end(None)
                return
            self._last_heard = self._clock()
            try:
                request = ingest_pb2.StreamTelemetryRequest.FromString(raw)
            except DecodeError:
                self.end(Refusal(Reason.MALFORMED_MESSAGE, "not a StreamTelemetryRequest"))
                return
            match request.WhichOneof("message"):
                case "data":
                    if not await self._accept(request.data, len(raw)):
                        return
                case "define_aliases":
                    await self._define_aliases(request.define_aliases)
                case "confirm_rejections":
                    await self._confirm(request.confirm_rejections.through_sequence)
                case "command_result" | "reported_state":
                    # Welcome said that these are not served.
                    pass
                case "hello":
                    self.end(Refusal(Reason.HELLO_REPEATED, "a stream has one hello"))
                    return
                case _:
                    self.end(Refusal(Reason.MALFORMED_MESSAGE, "the message is empty"))
                    return

    async def _accept(self, data: ingest_pb2.DataMessage, size: int) -> bool:
        """Queue a message; false when the stream has to end over it."""
        if data.sequence == 0:
            self.end(Refusal(Reason.SEQUENCE_INVALID, "sequences start at 1"))
            return False
        if data.sequence > self._acks.received + 1:
            self.end(sequence_gap(self._acks.received + 1, data.sequence))
            return False
        if data.sequence <= self._acks.received:
            # Sent again. The first copy is committed or on its way; say where we are.
            self._acks.repeat()
            self._wake.set()
            return True
        if self._acks.may_become_too_many:
            self._end_over_unconfirmed()
            return False
        self._acks.received = data.sequence
        message = self._weigh(data, size)
        self._metrics.count("atlasco_messages_received")
        received_at = self._clock()
        await self._enter(message)
        waiting = Outstanding(data.sequence, size, received_at)
        self._acks.await_ack(waiting)
        self._update_credit()
        self._lanes.put_nowait(message, lambda *result: self._settled(waiting.sequence, *result))
        # The client may have out what its credits say; beyond that nothing more is read, and HTTP/2 holds it back.
        await self._credit.wait()
        return True

    def _weigh(self, data: ingest_pb2.DataMessage, size: int) -> Received:
        count = count_readings(data.readings)
        refused = None
        if size > self._config.max_message_bytes:
            text = f"the message has {size} bytes, at most {self._config.max_message_bytes} are allowed"
            refused = RejectedReading(None, RejectionReason.MESSAGE_TOO_LARGE, text)
        elif count > self._config.max_readings_per_message:
            text = f"the message has {count} readings, at most {self._config.max_readings_per_message} are allowed"
            refused = RejectedReading(None, RejectionReason.TOO_MANY_READINGS, text)
        return Received(
            tenant=self._tenant,
            entity_id=self._opened.entity_id,
            entity_name=self._device,
            aliases=self._aliases,
            # What is refused whole must not fill the memory while it waits for its turn to be told.
            readings=ingest_pb2.Readings() if refused else data.readings,
            size=size,
            count=weight(count, size),
            session_id=self._session_id,
            epoch=self._opened.epoch,
            sequence=data.sequence,
            refused=refused,
        )

    async def _enter(self, message: Received) -> None:
        """Wait for room, telling the client to pause when that takes long."""
        room, tenant_id = self._lanes.room, self._tenant.tenant_id
        if room.enter_nowait(tenant_id, message.count):
            return
        entering = asyncio.ensure_future(room.enter(tenant_id, message.count))
        try:
            while True:
                done, _ = await asyncio.wait({entering}, timeout=self._config.throttle_after)
                if done:
                    return
                self._throttle(room.blocked(tenant_id, message.count))
        except asyncio.CancelledError:
            if not entering.cancel() and not entering.cancelled():
                # The room was given in the very moment the stream ended, and nobody will use it.
                room.leave(tenant_id, message.count)
            raise

    def _throttle(self, bound: Bound | None) -> None:
        throttle = throttle_message(self._lanes, bound, self._config.throttle_after)
        name = ingest_pb2.Throttle.Limit.Name(throttle.limit).removeprefix("LIMIT_")
        self._metrics.count("atlasco_throttles_sent", limit=name)
        # One at a time: a client that does not read must not pile them up here.
        if not any(control.HasField("throttle") for control in self._controls):
            self._say(ingest_pb2.StreamTelemetryResponse(throttle=throttle))

    async def _define_aliases(self, request: ingest_pb2.DefineAliases) -> None:
        problems: list[AliasProblem]
        if len(request.aliases) > MAX_ALIAS:
            text = f"{len(request.aliases)} definitions, and there are {MAX_ALIAS} aliases"
            raise Refusal(Reason.MALFORMED_MESSAGE, text)
        self._aliases, problems = await self._define(self._tenant, self._aliases, request.aliases)
        answer = ingest_pb2.AliasesDefined(errors=[problem.to_wire() for problem in problems])
        self._say(ingest_pb2.StreamTelemetryResponse(aliases_defined=answer))
        while len(self._controls) > _MOST_CONTROLS:
            self._progress.clear()
            await self._progress.wait()

    async def _confirm(self, through: int) -> None:
        counted = self._acks.confirmable(through)
        if counted is None:
            return
        await self._registry.confirm_rejections(
            self._tenant.tenant_id, self._opened.entity_id, self._session_id, counted
        )
        self._acks.confirmed(counted)

    # -- Settling ---------------------------------------------------------------------------------------------------

    def _settled(self, sequence: int, outcome: Outcome, rejections: list[RejectedReading], xid: int | None) -> None:
        """The lane is done with a message; called in the order of the sequences."""
        if outcome is Outcome.STALE:
            self.supersede()
            return
        self._acks.settle(sequence, rejections, xid)
        if rejections and self._acks.too_many_unconfirmed:
            self._end_over_unconfirmed()
        self._wake.set()

    def _end_over_unconfirmed(self) -> None:
        text = f"rejections of {self._acks.unconfirmed} messages wait for ConfirmRejections"
        self.end(Refusal(Reason.UNCONFIRMED_REJECTIONS, text))

    def _update_credit(self) -> None:
        if self._acks.credit_spent:
            self._credit.clear()
        else:
            self._credit.set()

    # -- Sending ----------------------------------------------------------------------------------------------------

    def _say(self, response: ingest_pb2.StreamTelemetryResponse) -> None:
        self._controls.append(response)
        self._wake.set()

    async def _send(self) -> None:
        while not self._closing:
            await self._wake.wait()
            self._wake.clear()
            while not self._closing and (self._controls or self._acks.due):
                if self._controls:
                    response = self._controls[0]
                    if not await self._write(response):
                        return
                    self._controls.popleft()
                    self._progress.set()
                else:
                    ack = self._acks.compose()
                    if not await self._write(ingest_pb2.StreamTelemetryResponse(ack=ack)):
                        return
                    self._acked(ack.committed_sequence)

    async def _write(self, response: ingest_pb2.StreamTelemetryResponse) -> bool:
        try:
            with self._reader.writing():
                await self._context.write(response.SerializeToString())
        except grpc.aio.BaseError:
            # The connection is gone; the client resumes elsewhere.
            self.end(None)
            self._progress.set()
            return False
        return True

    def _give_up(self, refusal: Refusal) -> None:
        log.info("a client does not read its acks", extra={"device": self._device, "tenant": self._tenant.name})
        self.end(refusal)
        # Whoever waits for what was to be sent waits in vain.
        self._progress.set()

    def _acked(self, sequence: int) -> None:
        now = self._clock()
        for message in self._acks.told(sequence):
            self._metrics.observe("atlasco_ack_latency_seconds", now - message.since)
        self._update_credit()
        self._progress.set()

    # -- Leaving ----------------------------------------------------------------------------------------------------

    async def _leave(self) -> None:
        config = self._config
        # Jitter, so that streams which came together after an outage do not all leave together.
        oldest = self._clock() + config.max_stream_age * random.uniform(0.8, 1.2)
        why = ingest_pb2.ReconnectNotice.REASON_MAX_AGE
        while not self._notice.done():
            idle = self._last_heard + config.idle_timeout if config.idle_timeout else oldest
            if self._clock() >= min(idle, oldest):
                if idle < oldest:
                    why = ingest_pb2.ReconnectNotice.REASON_IDLE
                self.ask_to_leave(why)
                break
            await asyncio.wait({self._notice}, timeout=min(idle, oldest) - self._clock())
        notice = ingest_pb2.ReconnectNotice(
            reason=self._notice.result(),
            drain_ms=int(config.drain_timeout * 1000),
            min_delay_ms=0,
            max_delay_ms=int(config.reconnect_delay * 1000),
        )
        self._say(ingest_pb2.StreamTelemetryResponse(reconnect_notice=notice))
        try:
            async with asyncio.timeout(config.drain_timeout):
                await self._half_closed.wait()
        except TimeoutError:
            pass
        self.end(None)
