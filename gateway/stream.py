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
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import grpc
from atlasco.telemetry.v1 import ingest_pb2
from google.protobuf.message import DecodeError

from gateway.aliases import MAX_ALIAS, AliasProblem, AliasTable
from gateway.config import GatewayConfig
from gateway.decode import Received, count_readings, weight
from gateway.lanes import Lanes
from gateway.room import Bound
from gateway.status import Reason, Refusal, refusal_of, sequence_gap, stream_superseded
from runtime.metrics import Metrics
from storage.commit import wire_rejections
from storage.errors import StorageError
from storage.model import Outcome, RejectedReading
from storage.model import Reason as RejectionReason
from storage.registry import OpenedStream, Registry, Tenant

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

# Rejections in one Ack. A message's rejections are never split over two, so an Ack can hold up to one message more.
_REJECTIONS_PER_ACK = 1_000
# Answers that may wait for a client that does not read; then its next request waits too.
_MOST_CONTROLS = 16
# Rejections of a session that may wait for their confirmation: all of them are in memory while they are told again.
_MOST_UNCONFIRMED_REJECTIONS = 100_000


def read_token(xid: int) -> bytes:
    """A read token: the writer's transaction id, opaque to clients."""
    return xid.to_bytes(8, "big")


def most_unconfirmed(config: GatewayConfig) -> int:
    """The most messages of a session whose rejections can wait for their confirmation.

    Over the configured bound the stream ends, but what it had out by then still commits. All of it has to be told
    again: a confirmation covers everything up to a sequence, also what the client was never told.
    """
    return config.max_unconfirmed + config.credit_messages


@dataclass(slots=True)
class _Outstanding:
    """A message received and not yet acked."""

    sequence: int
    size: int
    since: float
    settled: bool = False


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
        self._loop = loop = asyncio.get_running_loop()
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
        self._received = opened.committed_sequence
        self._committed = opened.committed_sequence
        self._told = opened.committed_sequence
        self._xid: int | None = None
        self._repeat_ack = False
        self._outstanding: deque[_Outstanding] = deque()
        self._outstanding_bytes = 0
        self._rejections: deque[tuple[int, list[RejectedReading]]] = deque()
        # Sequence of a message -> how many of its rejections wait for their confirmation.
        self._unconfirmed = {
            ack.rejections[0].sequence: len(ack.rejections) for ack in opened.unconfirmed if ack.rejections
        }
        self._controls: deque[ingest_pb2.StreamTelemetryResponse] = deque()
        # The sender starts no further write.
        self._closing = False
        # The client left a write unread for too long.
        self._stuck = False
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
        self._controls += (ingest_pb2.StreamTelemetryResponse(ack=ack) for ack in self._retold())
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
            # Not cancelled: a status that is sent while a write is still under way can get lost, and the client would
            # wait for it for ever. The write ends when the client reads it, or with the connection.
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
                while not (sending.done() or self._stuck) and (self._outstanding or self._controls or self._ack_due()):
                    self._progress.clear()
                    await self._progress.wait()
        except TimeoutError:
            log.info("stream ended with messages not yet acked", extra={"unacked": len(self._outstanding)})

    def _retold(self) -> list[ingest_pb2.Ack]:
        """Unconfirmed rejections, a message's together."""
        acks = []
        for told in self._opened.unconfirmed:
            ack = ingest_pb2.Ack(committed_sequence=self._committed)
            ack.rejections.extend(told.rejections)
            acks.append(ack)
        return acks

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
        if data.sequence > self._received + 1:
            self.end(sequence_gap(self._received + 1, data.sequence))
            return False
        if data.sequence <= self._received:
            # Sent again. The first copy is committed or on its way; say where we are.
            self._repeat_ack = True
            self._wake.set()
            return True
        if len(self._unconfirmed) + len(self._outstanding) >= most_unconfirmed(self._config):
            self._end_over_unconfirmed()
            return False
        self._received = data.sequence
        message = self._weigh(data, size)
        self._metrics.count("atlasco_messages_received")
        received_at = self._clock()
        await self._enter(message)
        waiting = _Outstanding(data.sequence, size, received_at)
        self._outstanding.append(waiting)
        self._outstanding_bytes += size
        self._update_credit()
        self._lanes.put_nowait(message, lambda *result: self._settled(waiting, *result))
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
        room = self._lanes.room
        throttle = ingest_pb2.Throttle(retry_after_ms=int(self._config.throttle_after * 1000))
        if (trouble := self._lanes.trouble) is not None:
            throttle.limit = ingest_pb2.Throttle.LIMIT_STORAGE
            throttle.text = "the database does not take writes at present"
            log.debug("throttled by storage", extra={"problem": trouble})
        elif bound is Bound.TENANT:
            throttle.limit = ingest_pb2.Throttle.LIMIT_TENANT_QUEUE
            throttle.limit_value = room.per_tenant
            throttle.text = "readings of this tenant wait in the gateway"
        else:
            throttle.limit = ingest_pb2.Throttle.LIMIT_GATEWAY_QUEUE
            throttle.limit_value = room.total
            throttle.text = "readings of all tenants wait in the gateway"
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
        # Not beyond what was told: rejections of a message that is still on its way must not vanish unseen.
        through = min(through, self._told)
        if not any(sequence <= through for sequence in self._unconfirmed):
            return
        await self._registry.confirm_rejections(
            self._tenant.tenant_id, self._opened.entity_id, self._session_id, through
        )
        self._unconfirmed = {sequence: n for sequence, n in self._unconfirmed.items() if sequence > through}

    # -- Settling ---------------------------------------------------------------------------------------------------

    def _settled(
        self, message: _Outstanding, outcome: Outcome, rejections: list[RejectedReading], xid: int | None
    ) -> None:
        """The lane is done with a message; called in the order of the sequences."""
        if outcome is Outcome.STALE:
            self.supersede()
            return
        message.settled = True
        self._committed = max(self._committed, message.sequence)
        if xid is not None:
            self._xid = max(self._xid or 0, xid)
        if rejections:
            self._rejections.append((message.sequence, rejections))
            self._unconfirmed[message.sequence] = len(rejections)
            rejected = sum(self._unconfirmed.values())
            if len(self._unconfirmed) > self._config.max_unconfirmed or rejected > _MOST_UNCONFIRMED_REJECTIONS:
                self._end_over_unconfirmed()
        self._wake.set()

    def _end_over_unconfirmed(self) -> None:
        text = f"rejections of {len(self._unconfirmed)} messages wait for ConfirmRejections"
        self.end(Refusal(Reason.UNCONFIRMED_REJECTIONS, text))

    def _update_credit(self) -> None:
        spent = (
            len(self._outstanding) >= self._config.credit_messages
            or self._outstanding_bytes >= self._config.credit_bytes
        )
        if spent:
            self._credit.clear()
        else:
            self._credit.set()

    # -- Sending ----------------------------------------------------------------------------------------------------

    def _say(self, response: ingest_pb2.StreamTelemetryResponse) -> None:
        self._controls.append(response)
        self._wake.set()

    def _ack_due(self) -> bool:
        return self._committed > self._told or self._repeat_ack or bool(self._rejections)

    async def _send(self) -> None:
        while not self._closing:
            await self._wake.wait()
            self._wake.clear()
            while not self._closing and (self._controls or self._ack_due()):
                if self._controls:
                    response = self._controls[0]
                    if not await self._write(response):
                        return
                    self._controls.popleft()
                    self._progress.set()
                else:
                    ack = self._compose_ack()
                    if not await self._write(ingest_pb2.StreamTelemetryResponse(ack=ack)):
                        return
                    self._acked(ack.committed_sequence)

    async def _write(self, response: ingest_pb2.StreamTelemetryResponse) -> bool:
        giving_up = self._loop.call_later(self._config.write_timeout, self._give_up)
        try:
            await self._context.write(response.SerializeToString())
        except grpc.aio.BaseError:
            # The connection is gone; the client resumes elsewhere.
            self.end(None)
            self._progress.set()
            return False
        finally:
            giving_up.cancel()
        return True

    def _give_up(self) -> None:
        """The client does not read. The write is left alone, see `run`; until it ends nothing more is kept for it."""
        log.info("a client does not read its acks", extra={"device": self._device, "tenant": self._tenant.name})
        self._stuck = True
        text = f"nothing was read from the stream for {self._config.write_timeout:g} s"
        self.end(Refusal(Reason.SLOW_READER, text))
        # Whoever waits for what was to be sent waits in vain.
        self._progress.set()

    def _compose_ack(self) -> ingest_pb2.Ack:
        """Everything committed so far; up to an earlier message when there are more rejections than one Ack holds."""
        self._repeat_ack = False
        ack = ingest_pb2.Ack(committed_sequence=self._committed)
        while self._rejections:
            sequence, rejections = self._rejections.popleft()
            ack.rejections.extend(wire_rejections(sequence, rejections))
            if len(ack.rejections) >= _REJECTIONS_PER_ACK and self._rejections:
                ack.committed_sequence = sequence
                break
        if self._xid is not None:
            ack.read_token = read_token(self._xid)
        return ack

    def _acked(self, sequence: int) -> None:
        self._told = max(self._told, sequence)
        now = self._clock()
        while self._outstanding and self._outstanding[0].sequence <= sequence:
            message = self._outstanding.popleft()
            self._outstanding_bytes -= message.size
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
