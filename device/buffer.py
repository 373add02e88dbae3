"""The bounded buffer of messages that are not acked yet, with the session id that lives exactly as long.

A message enters with `offer` or `put`, gets the next sequence number of the session, and leaves when the server
has acked it, never before. The buffer has two bounds, messages and bytes; at either one `offer` raises
BufferFullError and `put` waits. Nothing is ever dropped to make room.

Besides its sequence number a message has a **ticket**, which counts from 1 for the life of this object and does
not change when a new session renumbers. Callers follow their messages by ticket.
"""

import asyncio
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from device.dictionary import Attribute, Dictionary, ValueType
from device.errors import BufferFullError, DeviceError, MessageTooLargeError
from device.journal import Fsync, Journal
from device.packing import Packed
from device.wire import FRAME_OVERHEAD

SESSION_ID_BYTES = 16


def random_session_id() -> bytes:
    """16 random bytes."""
    return secrets.token_bytes(SESSION_ID_BYTES)


@dataclass(slots=True)
class Message:
    """One buffered message: its number in the session, its ticket, and its serialized `Readings`."""

    sequence: int
    ticket: int
    payload: bytes
    count: int
    # When it was first written to a stream (the client's clock, seconds); None until then.
    first_sent: float | None = None

    @property
    def size(self) -> int:
        """Bytes it takes in the buffer; never less than what it takes on the wire."""
        return len(self.payload) + FRAME_OVERHEAD


class Buffer:
    """Unacked messages in order, from `acked + 1` to `last`, and the dictionary they are written in.

    In memory by default: what is not acked is lost with the process, and so is the session, as the protocol
    demands. `Buffer.open` keeps both in a file.
    """

    def __init__(
        self,
        *,
        max_messages: int = 1000,
        max_bytes: int = 16 * 1024 * 1024,
        new_session_id: Callable[[], bytes] = random_session_id,
        journal: Journal | None = None,
    ) -> None:
        self.max_messages = max_messages
        self.max_bytes = max_bytes
        self.dictionary = Dictionary()
        self.session_id = new_session_id()
        self.acked = 0
        self.last = 0
        self.bytes = 0
        self.readings = 0
        self._new_session_id = new_session_id
        # Ticket minus sequence: constant within a session, because held messages are consecutive in both.
        self._ticket_offset = 0
        self._messages: dict[int, Message] = {}
        self._journal = journal
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._failure: DeviceError | None = None
        if journal is not None:
            self._restore(journal)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        max_messages: int = 1000,
        max_bytes: int = 16 * 1024 * 1024,
        fsync: Fsync = Fsync.ALWAYS,
        new_session_id: Callable[[], bytes] = random_session_id,
    ) -> "Buffer":
        """A buffer kept in the file `path`, which is created when missing and continued when not.

        With Fsync.ALWAYS every message waits for the disk in the calling thread. Raises JournalError,
        JournalInUseError.
        """
        journal = Journal(path, fsync=fsync)
        return cls(max_messages=max_messages, max_bytes=max_bytes, new_session_id=new_session_id, journal=journal)

    def _restore(self, journal: Journal) -> None:
        state = journal.state
        for definition in state.definitions:
            self.dictionary.define(Attribute(definition.name, ValueType(definition.type), definition.unit))
        if state.session_id:
            self.session_id = state.session_id
            self.acked = self.last = state.acked
            for sequence, (payload, count) in sorted(state.messages.items()):
                self._hold(Message(sequence, sequence, payload, count))
                self.last = sequence
        if not state.session_id:
            journal.session(self.session_id, 0)
        elif not state.continues:
            self.start_new_session()

    @property
    def persistent(self) -> bool:
        """Whether what is held outlives the process."""
        return self._journal is not None

    def __len__(self) -> int:
        return len(self._messages)

    # -- aliases ------------------------------------------------------------------------------------------------

    def define(self, attribute: Attribute) -> int:
        """The alias of `attribute`; kept with the messages that use it. Raises AttributeRedefinedError."""
        known = len(self.dictionary)
        alias = self.dictionary.define(attribute)
        if self._journal is not None and len(self.dictionary) > known:
            self._journal.define(self.dictionary.definitions(known)[0])
        return alias

    # -- entering -----------------------------------------------------------------------------------------------

    def has_room(self, messages: int, size: int) -> bool:
        """Whether so many more messages of so many bytes together fit now."""
        return len(self._messages) + messages <= self.max_messages and self.bytes + size <= self.max_bytes

    def offer(self, packed: Sequence[Packed]) -> list[Message]:
        """Buffer all of these messages, or none.

        Raises BufferFullError when they do not fit now, MessageTooLargeError when they never will, JournalError
        when they cannot be persisted.
        """
        size = sum(len(one.payload) + FRAME_OVERHEAD for one in packed)
        if len(packed) > self.max_messages or size > self.max_bytes:
            raise MessageTooLargeError(
                f"{len(packed)} messages of {size} bytes exceed the whole buffer "
                f"({self.max_messages} messages, {self.max_bytes} bytes)"
            )
        self._raise_failure()
        if self._waiting or not self.has_room(len(packed), size):
            raise BufferFullError(f"{len(self._messages)} messages ({self.bytes} bytes) wait for their ack")
        return [self._append(message) for message in packed]

    async def put(self, packed: Packed) -> Message:
        """Buffer one message, waiting for room as long as it takes; first come, first served.

        Returning does not say that the message was sent, much less that it is durable. Raises
        MessageTooLargeError, JournalError, and the error of `fail`.
        """
        size = len(packed.payload) + FRAME_OVERHEAD
        if size > self.max_bytes:
            raise MessageTooLargeError(f"a message of {size} bytes exceeds the buffer of {self.max_bytes}")
        self._raise_failure()
        if self._waiting or not self.has_room(1, size):
            await self._wait_for_room(size)
        try:
            return self._append(packed)
        finally:
            # Also when it could not be persisted: there may be room for whoever waits next.
            self._wake_next()

    async def _wait_for_room(self, size: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            while self._waiting[0] is not turn or not self.has_room(1, size):
                await turn
                place = self._waiting.index(turn)
                turn = turn.get_loop().create_future()
                self._waiting[place] = turn
                self._raise_failure()
        except BaseException:
            self._waiting.remove(turn)
            # Whoever is next must not be left without the wake-up that was meant for this one.
            self._wake_next()
            raise
        self._waiting.remove(turn)

    def _wake_next(self) -> None:
        if self._waiting and not self._waiting[0].done():
            self._waiting[0].set_result(None)

    def _append(self, packed: Packed) -> Message:
        sequence = self.last + 1
        if self._journal is not None:
            self._journal.message(sequence, packed.payload, packed.count)
        message = Message(sequence, sequence + self._ticket_offset, packed.payload, packed.count)
        self._hold(message)
        self.last = sequence
        return message

    def _hold(self, message: Message) -> None:
        self._messages[message.sequence] = message
        self.bytes += message.size
        self.readings += message.count

    # -- reading ------------------------------------------------------------------------------------------------

    def get(self, sequence: int) -> Message | None:
        """The held message with this number, if there is one."""
        return self._messages.get(sequence)

    def iterate_from(self, sequence: int) -> Iterator[Message]:
        """The held messages from `sequence` on, in order."""
        for number in range(max(sequence, self.acked + 1), self.last + 1):
            yield self._messages[number]

    def ticket(self, sequence: int) -> int:
        """The ticket of a message of this session, held or not."""
        return sequence + self._ticket_offset

    @property
    def last_ticket(self) -> int:
        """The ticket of the message that entered last; 0 before the first."""
        return self.last + self._ticket_offset

    @property
    def acked_ticket(self) -> int:
        """Every message up to this ticket has left."""
        return self.acked + self._ticket_offset

    # -- leaving ------------------------------------------------------------------------------------------------

    def drop_through(self, sequence: int) -> list[Message]:
        """Let go of every message up to `sequence`; returns them. Raises JournalError."""
        dropped = [self._messages.pop(number) for number in range(self.acked + 1, min(sequence, self.last) + 1)]
        if not dropped:
            return dropped
        self.acked = dropped[-1].sequence
        self.bytes -= sum(message.size for message in dropped)
        self.readings -= sum(message.count for message in dropped)
        if self._journal is not None:
            self._journal.acked(self.acked)
            if self._journal.wants_compaction(self.bytes):
                self._rewrite(self._journal)
        self._wake_next()
        return dropped

    def start_new_session(self) -> None:
        """A new session id; what is held keeps its order and content and is numbered from 1."""
        held = list(self.iterate_from(self.acked + 1))
        self._ticket_offset += self.acked
        self.session_id = self._new_session_id()
        self.acked = 0
        self.last = len(held)
        for sequence, message in enumerate(held, 1):
            message.sequence = sequence
        self._messages = {message.sequence: message for message in held}
        if self._journal is not None:
            # One atomic replacement: a crash leaves the old session with its numbers, or the new with its own.
            self._rewrite(self._journal)

    def _rewrite(self, journal: Journal) -> None:
        journal.rewrite(
            self.session_id,
            self.acked,
            self.dictionary.definitions(),
            ((message.sequence, message.payload, message.count) for message in self._messages.values()),
        )

    # -- the end ------------------------------------------------------------------------------------------------

    def fail(self, error: DeviceError) -> None:
        """Let everyone who waits, or comes later, have this error."""
        self._failure = error
        for turn in self._waiting:
            if not turn.done():
                turn.set_result(None)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Close the file, if there is one. What is held stays in it. Raises JournalError."""
        if self._journal is not None:
            self._journal.close()
