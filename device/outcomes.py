"""What a client tells its caller: rejections, and counts."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from atlasco.telemetry.v1 import ingest_pb2

from device.buffer import Message
from device.dictionary import Dictionary
from device.packing import Reading, iterate

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A reading, or (index None) a whole message, that the server will never store.

    `reading` is what was rejected, where the message was still held; `count` is how many readings it stands for.
    `reason` is the name of a RejectionReason without its prefix, or its number when this client does not know it.
    """

    ticket: int
    index: int | None
    reason: str
    text: str
    quarantined: bool
    reading: Reading | None
    count: int


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts since the client was made. Readings in `acked` are durable; those in `rejected` never will be."""

    sent_messages: int = 0
    sent_readings: int = 0
    # Written again after a reconnect, not counted in `sent`.
    resent_messages: int = 0
    resent_readings: int = 0
    acked_messages: int = 0
    acked_readings: int = 0
    rejected_readings: int = 0
    # Streams opened after the first one that was welcomed.
    reconnects: int = 0
    # Sessions started because the server had forgotten the one before.
    new_sessions: int = 0
    throttled: int = 0
    buffered_messages: int = 0
    buffered_readings: int = 0


def log_rejections(rejected: Sequence[Rejected]) -> None:
    """Take rejections by logging a warning for the first of each batch."""
    first = rejected[0]
    logger.warning("%d rejections, the first %s (%s): %s", len(rejected), first.reason, first.reading, first.text)


class Describer:
    """Turns rejections into the caller's terms, with what was rejected where its message is still at hand.

    Made for one ack: each message is decoded once, also when all of its thousand readings are rejected.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        ticket_of: Callable[[int], int],
        message_of: Callable[[int], Message | None],
    ) -> None:
        self._dictionary = dictionary
        self._ticket_of = ticket_of
        self._message_of = message_of
        self._decoded: dict[int, list[Reading | None]] = {}

    def describe(self, rejection: ingest_pb2.Rejection) -> Rejected:
        """One rejection."""
        message = self._message_of(rejection.sequence)
        index = rejection.index if rejection.HasField("index") else None
        reading = None
        if message is not None and index is not None:
            readings = self._decoded.get(rejection.sequence)
            if readings is None:
                readings = self._decoded[rejection.sequence] = list(iterate(message.payload, self._dictionary))
            reading = readings[index] if index < len(readings) else None
        return Rejected(
            ticket=self._ticket_of(rejection.sequence),
            index=index,
            reason=reason_name(rejection.reason),
            text=rejection.text,
            quarantined=rejection.quarantined,
            reading=reading,
            count=1 if index is not None else (message.count if message is not None else 0),
        )


def reason_name(reason: int) -> str:
    """The name of a RejectionReason without its prefix; the number itself when it is not known here."""
    if reason in ingest_pb2.RejectionReason.values():
        return ingest_pb2.RejectionReason.Name(ingest_pb2.RejectionReason.ValueType(reason)).removeprefix(
            "REJECTION_REASON_"
        )
    return str(reason)
