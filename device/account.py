"""What became of a client's messages, as its streams tell: limits, counts, what is durable, what was rejected.

The stream's side of a client (`stream.StreamOwner`); `client.py` has the caller's.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from atlasco.telemetry.v1 import ingest_pb2

from device.buffer import Buffer, Message
from device.latency import LatencyHistogram
from device.outcomes import Describer, Rejected, Statistics, reason_name
from device.packing import PackingLimits
from device.session import Session

logger = logging.getLogger(__name__)


class Account:
    """Told by one stream after the other; `open` before the first.

    `on_rejections` and `on_acked` are the client's; `wake` has the stream look again for what is to be sent.
    """

    def __init__(
        self,
        device_id: str,
        buffer: Buffer,
        session: Session,
        *,
        latency: LatencyHistogram,
        clock: Callable[[], float],
        on_rejections: Callable[[Sequence[Rejected]], None] | None,
        on_acked: Callable[[int], None] | None,
        wake: Callable[[], None],
    ) -> None:
        self.limits = PackingLimits()
        self.latency = latency
        self.alias_errors: dict[int, str] = {}
        self._device_id = device_id
        self._buffer = buffer
        self._session = session
        self._clock = clock
        self._on_rejections = on_rejections
        self._on_acked = on_acked
        self._wake = wake
        self._counts = dict.fromkeys(Statistics.__dataclass_fields__, 0)
        self._welcomed = False
        # Messages dropped by a Welcome: their rejections, if any, are told in the acks that follow it.
        self._settled: dict[int, Message] = {}
        self._untaken: deque[tuple[int, Rejected]] = deque()

    def open(self) -> None:
        """Make what waits are made of, on the loop that runs now."""
        self._progress = asyncio.Event()
        self._rejections_ready = asyncio.Event()

    # -- what the stream asks and tells (StreamOwner) -------------------------------------------------------------

    @property
    def buffer(self) -> Buffer:
        """The messages to send."""
        return self._buffer

    def welcomed(self, welcome: ingest_pb2.Welcome, drop_through: int) -> None:
        """The session resumes: take over the server's limits, forget what it has."""
        limits = welcome.limits
        defaults = PackingLimits()
        self.limits = PackingLimits(
            max_message_bytes=limits.max_message_bytes or defaults.max_message_bytes,
            max_readings_per_message=limits.max_readings_per_message or defaults.max_readings_per_message,
            max_string_bytes=limits.max_string_bytes or defaults.max_string_bytes,
        )
        self._counts["reconnects"] += self._welcomed
        self._welcomed = True
        self.note_alias_errors(welcome.alias_errors)
        dropped = self._forget(drop_through)
        self._settled = {message.sequence: message for message in dropped}

    def note_alias_errors(self, errors: Iterable[ingest_pb2.AliasError]) -> None:
        """Aliases that cannot be used; readings under them will be rejected with the same reason."""
        for error in errors:
            self.alias_errors[error.alias] = reason_name(error.reason)
            attribute = self._buffer.dictionary.attribute(error.alias)
            logger.warning(
                "%s: attribute %r cannot be used: %s (%s)",
                self._device_id,
                attribute.name if attribute else error.alias,
                reason_name(error.reason),
                error.text,
            )

    def new_session(self, why: str) -> None:
        """The server forgot the session; its numbers start again from 1."""
        logger.warning("%s: starting a new session: %s", self._device_id, why)
        self._buffer.start_new_session()
        self._session.on_new_session()
        self._settled.clear()
        self._counts["new_sessions"] += 1

    def writing(self, message: Message, now: float) -> None:
        """A message is about to be written."""
        kind = "sent" if message.first_sent is None else "resent"
        self._counts[f"{kind}_messages"] += 1
        self._counts[f"{kind}_readings"] += message.count
        if message.first_sent is None:
            message.first_sent = now

    def acked(self, ack: ingest_pb2.Ack) -> None:
        """Progress: hand over rejections, then forget what is durable, then wake those who wait for it."""
        keys = [
            (rejection.sequence, rejection.index if rejection.HasField("index") else None)
            for rejection in ack.rejections
        ]
        decision = self._session.on_ack(self._clock(), ack.committed_sequence, keys)
        rejected = []
        if decision.fresh:
            describer = Describer(self._buffer.dictionary, self._buffer.ticket, self._message)
            rejected = [
                (keys[position][0], describer.describe(ack.rejections[position])) for position in decision.fresh
            ]
        if decision.advanced:
            self._settled.clear()
        self._forget(decision.drop_through)
        if keys:
            self._hand_over(rejected, max(sequence for sequence, _ in keys))
        self._wake()

    def throttled(self) -> None:
        """The server asked for a pause."""
        self._counts["throttled"] += 1

    def _message(self, sequence: int) -> Message | None:
        return self._buffer.get(sequence) or self._settled.get(sequence)

    def _hand_over(self, rejected: list[tuple[int, Rejected]], through: int) -> None:
        count = sum(one.count for _, one in rejected)
        self._counts["rejected_readings"] += count
        self._counts["acked_readings"] -= count
        if self._on_rejections is not None:
            if rejected:
                self._on_rejections([one for _, one in rejected])
            self._session.on_rejections_taken(through)
        elif rejected:
            self._untaken.extend(rejected)
            self._rejections_ready.set()
        elif not self._untaken:
            # Told again, and all of it was taken before: only the confirmation was lost.
            self._session.on_rejections_taken(through)

    def _forget(self, through: int) -> list[Message]:
        dropped = self._buffer.drop_through(through)
        if dropped:
            now = self._clock()
            for message in dropped:
                if message.first_sent is not None:
                    self.latency.record(now - message.first_sent)
            self._counts["acked_messages"] += len(dropped)
            self._counts["acked_readings"] += sum(message.count for message in dropped)
            if self._on_acked is not None:
                self._on_acked(dropped[-1].ticket)
            self._tell_progress()
        return dropped

    # -- for the client -------------------------------------------------------------------------------------------

    def untaken(self) -> Iterator[Rejected]:
        """Rejections that nobody has taken; each is taken, and confirmed to the server, when the next is asked for."""
        while self._untaken:
            session_sequence, rejected = self._untaken[0]
            yield rejected
            self._untaken.popleft()
            if not any(sequence == session_sequence for sequence, _ in self._untaken):
                self._session.on_rejections_taken(session_sequence)
                self._wake()

    async def wait_rejections(self) -> None:
        """Wait until there are more, or `end_waits`."""
        self._rejections_ready.clear()
        await self._rejections_ready.wait()

    async def wait_progress(self) -> None:
        """Wait until more is durable, or `end_waits`."""
        await self._progress.wait()

    def end_waits(self) -> None:
        """Wake everybody: nothing more will come."""
        self._rejections_ready.set()
        self._tell_progress()

    def statistics(self) -> Statistics:
        """A snapshot of the counts."""
        return Statistics(
            **{
                **self._counts,
                "buffered_messages": len(self._buffer),
                "buffered_readings": self._buffer.readings,
            }
        )

    def _tell_progress(self) -> None:
        # A fresh event each time: those who wait look at the buffer again, and none can miss the next one.
        self._progress.set()
        self._progress = asyncio.Event()
