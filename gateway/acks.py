"""What became of the messages of one stream, and what its client was told of it.

A message is received, and outstanding until it is acked; settled, when its lane has committed it; told, when an ack
that covers it was written. Its rejections, if any, go with that ack and wait further: for the client to confirm them.

Nothing here reads, writes or waits, which is the stream's part.
"""

from collections import deque
from dataclasses import dataclass

from atlasco.telemetry.v1 import ingest_pb2

from gateway.config import GatewayConfig
from storage.commit import wire_rejections
from storage.model import RejectedReading
from storage.registry import OpenedStream

# Rejections in one Ack. A message's rejections are never split over two, so an Ack can hold up to one message more.
_REJECTIONS_PER_ACK = 1_000
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


@dataclass(frozen=True, slots=True)
class Outstanding:
    """A message received and not yet acked."""

    sequence: int
    size: int
    since: float


class Acks:
    """The sequences of one stream, as far as they have come."""

    def __init__(self, opened: OpenedStream, config: GatewayConfig) -> None:
        self._config = config
        self.received = opened.committed_sequence
        self._committed = opened.committed_sequence
        self._told = opened.committed_sequence
        self._xid: int | None = None
        self._repeat = False
        self._outstanding: deque[Outstanding] = deque()
        self._outstanding_bytes = 0
        self._rejections: deque[tuple[int, list[RejectedReading]]] = deque()
        # Sequence of a message -> how many of its rejections wait for their confirmation.
        self._unconfirmed = {
            ack.rejections[0].sequence: len(ack.rejections) for ack in opened.unconfirmed if ack.rejections
        }

    # -- Outstanding ------------------------------------------------------------------------------------------------

    def await_ack(self, message: Outstanding) -> None:
        """A message goes to its lane."""
        self._outstanding.append(message)
        self._outstanding_bytes += message.size

    @property
    def outstanding(self) -> int:
        """How many messages were received and not yet acked."""
        return len(self._outstanding)

    @property
    def credit_spent(self) -> bool:
        """Whether the client has as much out as it may."""
        return (
            len(self._outstanding) >= self._config.credit_messages
            or self._outstanding_bytes >= self._config.credit_bytes
        )

    # -- Settled ----------------------------------------------------------------------------------------------------

    def settle(self, sequence: int, rejections: list[RejectedReading], xid: int | None) -> None:
        """A message is committed. In the order of the sequences."""
        self._committed = max(self._committed, sequence)
        if xid is not None:
            self._xid = max(self._xid or 0, xid)
        if rejections:
            self._rejections.append((sequence, rejections))
            self._unconfirmed[sequence] = len(rejections)

    # -- Told -------------------------------------------------------------------------------------------------------

    def retold(self, opened: OpenedStream) -> list[ingest_pb2.Ack]:
        """Unconfirmed rejections of earlier connections, a message's together."""
        acks = []
        for told in opened.unconfirmed:
            ack = ingest_pb2.Ack(committed_sequence=self._committed)
            ack.rejections.extend(told.rejections)
            acks.append(ack)
        return acks

    def repeat(self) -> None:
        """A message came again: the client has to be told once more where we are."""
        self._repeat = True

    @property
    def due(self) -> bool:
        """Whether there is something to ack."""
        return self._committed > self._told or self._repeat or bool(self._rejections)

    def compose(self) -> ingest_pb2.Ack:
        """Everything committed so far; up to an earlier message when there are more rejections than one Ack holds."""
        self._repeat = False
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

    def told(self, sequence: int) -> list[Outstanding]:
        """An ack through a sequence was written; returns the messages that are outstanding no more."""
        self._told = max(self._told, sequence)
        acked = []
        while self._outstanding and self._outstanding[0].sequence <= sequence:
            message = self._outstanding.popleft()
            self._outstanding_bytes -= message.size
            acked.append(message)
        return acked

    # -- Unconfirmed ------------------------------------------------------------------------------------------------

    @property
    def unconfirmed(self) -> int:
        """How many messages have rejections that wait for their confirmation."""
        return len(self._unconfirmed)

    @property
    def too_many_unconfirmed(self) -> bool:
        """Whether more rejections wait for their confirmation than may."""
        rejected = sum(self._unconfirmed.values())
        return len(self._unconfirmed) > self._config.max_unconfirmed or rejected > _MOST_UNCONFIRMED_REJECTIONS

    @property
    def may_become_too_many(self) -> bool:
        """Whether one message more could, with what is out, leave more unconfirmed than can be told again."""
        return len(self._unconfirmed) + len(self._outstanding) >= most_unconfirmed(self._config)

    def confirmable(self, through: int) -> int | None:
        """Through which sequence a confirmation counts; None when it confirms nothing."""
        # Not beyond what was told: rejections of a message that is still on its way must not vanish unseen.
        through = min(through, self._told)
        return through if any(sequence <= through for sequence in self._unconfirmed) else None

    def confirmed(self, through: int) -> None:
        """A confirmation is stored."""
        self._unconfirmed = {sequence: n for sequence, n in self._unconfirmed.items() if sequence > through}
