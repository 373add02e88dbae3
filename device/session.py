"""What a device decides while it streams: a state machine without I/O, clock or randomness of its own.

Events go in with the time they happened (monotonic seconds); decisions come out as data, and `client.py` carries
them out. Everything a port to another language must get right is in this module and in `buffer.py`.

THE HANDSHAKE

 1. Connect. Send Hello: device, session id, the dictionary (its id alone once the server is known to have it).
 2. Read Welcome (`on_welcome`). Its committed_sequence is where the server is:
      a. from what was acked before up to what was ever numbered: drop what is committed, and send every message
         after it again, with the same numbers and the same content;
      b. anything else (the server forgot the session, or knows numbers this buffer never gave): start a new
         session, renumber from 1 what is held, and go back to 1.
 3. If the dictionary was unknown: send DefineAliases before any data.
 4. Send data while credits last (`next_action`).
 5. On every Ack (`on_ack`): drop through committed_sequence, hand rejections to the caller, each once, and
    confirm them after the caller has taken them.
 6. When the stream ends, for whatever reason: nothing that was not acked is forgotten. Go to 1 after a delay.
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

RejectionKey = tuple[int, int | None]


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """`ack_timeout_s`: give up on a stream whose watermark has not moved for so long while messages are out."""

    ack_timeout_s: float = 60.0


# -- decisions on Welcome ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resume:
    """Drop what is committed, through this number, then go on after it."""

    drop_through: int


@dataclass(frozen=True, slots=True)
class StartNewSession:
    """Give up the session id, renumber what is held, and say Hello again."""

    why: str


@dataclass(frozen=True, slots=True)
class SendWholeDictionary:
    """The dictionary's id names another list at the server: say Hello again without an id."""


# -- decisions on what to do next ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SendData:
    """Send the message with this number."""

    sequence: int


@dataclass(frozen=True, slots=True)
class SendDefinitions:
    """Send the alias definitions from this position of the dictionary on."""

    start: int


@dataclass(frozen=True, slots=True)
class SendConfirmation:
    """Confirm the rejections of all messages through this one."""

    through: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do until something happens, or until this time (None: no limit)."""

    until: float | None


@dataclass(frozen=True, slots=True)
class HalfClose:
    """Close the sending side and read on until the server ends the stream."""


@dataclass(frozen=True, slots=True)
class Abandon:
    """Cancel the stream: the server has stopped making progress."""

    why: str


Action = SendData | SendDefinitions | SendConfirmation | Wait | HalfClose | Abandon


@dataclass(frozen=True, slots=True)
class Leave:
    """A reconnect notice: when to stop waiting for acks, and the range of the delay before coming back."""

    drain_until: float
    min_delay_s: float
    max_delay_s: float


@dataclass(frozen=True, slots=True)
class AckDecision:
    """Drop messages through this one; hand over the rejections at these positions of the Ack, and no other."""

    drop_through: int
    fresh: tuple[int, ...]
    advanced: bool


class Session:
    """The state of one session on its current stream. Which messages exist is the buffer's to know."""

    def __init__(self, *, acked: int = 0, settings: SessionSettings | None = None) -> None:
        self._settings = settings or SessionSettings()
        self.acked = acked
        # Of the dictionary.
        self._server_has_dictionary = False
        self._dictionary_ids = True
        # Of rejections, for the life of the session.
        self._handed: set[RejectionKey] = set()
        self._confirmable = 0
        self._confirmed = 0
        self._forgettable: deque[tuple[int, int]] = deque()
        self._forgotten = 0
        # Of the current stream.
        self._credit_messages = 0
        self._credit_bytes = 0
        self._out: deque[tuple[int, int]] = deque()
        self._bytes_out = 0
        self._sent = acked
        self._defined = 0
        self._paused_until = 0.0
        self._ack_deadline: float | None = None
        self.leaving: Leave | None = None

    # -- opening a stream ---------------------------------------------------------------------------------------

    def hello_carries(self) -> tuple[bool, bool]:
        """Whether Hello's dictionary has its id, and whether it has its aliases."""
        return self._dictionary_ids, not (self._dictionary_ids and self._server_has_dictionary)

    def assume_dictionary_known(self) -> None:
        """Send the id alone in the first Hello, because equal devices have been here before."""
        self._server_has_dictionary = True

    def on_welcome(
        self,
        *,
        committed: int,
        last: int,
        aliases: int,
        dictionary_unknown: bool,
        dictionary_conflict: bool,
        credit_messages: int,
        credit_bytes: int,
    ) -> Resume | StartNewSession | SendWholeDictionary:
        """Decide how to go on. `last` is the last number the buffer gave, `aliases` how many Hello stood for."""
        if dictionary_conflict and self._dictionary_ids:
            # Nothing has been sent yet, so nothing is rejected for it.
            self._dictionary_ids = False
            return SendWholeDictionary()
        if committed < self.acked:
            return StartNewSession(f"the server is at {committed}, after it acked {self.acked}")
        if committed > last:
            # Numbers were used that this buffer does not know of. New messages under them would be ignored.
            return StartNewSession(f"the server is at {committed}, past the last number given, {last}")
        self._server_has_dictionary = not dictionary_unknown
        self._defined = 0 if dictionary_unknown else aliases
        self.acked = self._sent = committed
        self._credit_messages, self._credit_bytes = credit_messages, credit_bytes
        self._out.clear()
        self._bytes_out = 0
        self._paused_until = 0.0
        self._ack_deadline = None
        self.leaving = None
        # The last confirmation may have been lost with the last stream: it is sent once more.
        self._forgettable.clear()
        self._confirmed = 0
        return Resume(drop_through=committed)

    def on_new_session(self) -> None:
        """The buffer has renumbered: numbers of the old session mean nothing any more."""
        self.acked = self._sent = 0
        self._handed.clear()
        self._confirmable = self._confirmed = self._forgotten = 0
        self._forgettable.clear()

    def on_disconnect(self) -> None:
        """The stream ended. Nothing is out any more; everything unacked will be sent again."""
        self._out.clear()
        self._bytes_out = 0
        self._ack_deadline = None
        self.leaving = None

    # -- while it is open ---------------------------------------------------------------------------------------

    def next_action(self, now: float, *, last: int, next_size: int, aliases: int) -> Action:
        """What to do now. `last` is the last message buffered, `next_size` the frame size of the first unsent
        one, `aliases` the length of the dictionary.

        In this order:
         1. a server without progress is abandoned;
         2. rejections that the caller has taken are confirmed, for the server bounds how many may wait;
         3. after a notice nothing more is sent: wait for the acks, then close;
         4. aliases go before the data that uses them;
         5. a throttle is waited out;
         6. the next message goes if the credits allow it.
        """
        if self._ack_deadline is not None and now >= self._ack_deadline:
            return Abandon(f"no progress past message {self.acked} for {self._settings.ack_timeout_s:g} s")
        if self._confirmable > self._confirmed:
            return SendConfirmation(self._confirmable)
        if self.leaving is not None:
            if not self._out or now >= self.leaving.drain_until:
                return HalfClose()
            return Wait(self.leaving.drain_until)
        if aliases > self._defined:
            return SendDefinitions(self._defined)
        if self._sent >= last:
            return Wait(self._ack_deadline)
        if now < self._paused_until:
            return Wait(self._paused_until)
        if self._allows(next_size):
            return SendData(self._sent + 1)
        return Wait(self._ack_deadline)

    @property
    def next_sequence(self) -> int:
        """The number of the first message that was not sent on this stream."""
        return self._sent + 1

    def _allows(self, size: int) -> bool:
        # One message may always be out, or a message larger than all the credits would wait for ever.
        if not self._out:
            return True
        return len(self._out) < self._credit_messages and self._bytes_out + size <= self._credit_bytes

    def on_sent(self, now: float, sequence: int, size: int) -> None:
        """Message `sequence` is about to be written; `size` bytes of credit are used."""
        self._sent = sequence
        self._out.append((sequence, size))
        self._bytes_out += size
        if self._ack_deadline is None:
            self._ack_deadline = now + self._settings.ack_timeout_s

    def on_definitions_sent(self, aliases: int) -> None:
        """The stream's dictionary has so many aliases now; its id names a longer list than the server stored."""
        self._defined = aliases
        self._server_has_dictionary = False

    def on_ack(self, now: float, committed: int, rejections: Sequence[RejectionKey]) -> AckDecision:
        """Progress. `rejections` are the (sequence, index) of Ack.rejections, in order."""
        advanced = committed > self.acked
        if advanced:
            self.acked = committed
            while self._out and self._out[0][0] <= committed:
                self._bytes_out -= self._out.popleft()[1]
            # Only progress buys time: an ack that repeats itself must not keep a stuck stream alive.
            self._ack_deadline = now + self._settings.ack_timeout_s if self._out else None
            self._forget(committed)
        fresh = []
        for position, key in enumerate(rejections):
            if key[0] > self._forgotten and key not in self._handed:
                self._handed.add(key)
                fresh.append(position)
        return AckDecision(drop_through=self.acked, fresh=tuple(fresh), advanced=advanced)

    def on_rejections_taken(self, through: int) -> None:
        """The caller has every rejection of messages through this one that was told so far."""
        self._confirmable = max(self._confirmable, through)

    def on_confirmation_sent(self, through: int) -> None:
        """ConfirmRejections was written."""
        self._confirmed = through
        # The server reads a stream in order: once it has committed a message sent after the confirmation, it has
        # seen the confirmation, will not tell those rejections again, and their keys may be forgotten.
        self._forgettable.append((self._sent, through))

    def _forget(self, committed: int) -> None:
        while self._forgettable and committed > self._forgettable[0][0]:
            self._forgotten = max(self._forgotten, self._forgettable.popleft()[1])
            self._handed = {key for key in self._handed if key[0] > self._forgotten}

    def on_throttle(self, now: float, retry_after_s: float) -> None:
        """Send no data for so long."""
        self._paused_until = max(self._paused_until, now + retry_after_s)
        if self._ack_deadline is not None:
            # A server that says it is overloaded is alive; its acks may be as late as it says.
            self._ack_deadline = max(self._ack_deadline, self._paused_until + self._settings.ack_timeout_s)

    def on_notice(self, now: float, *, drain_s: float, min_delay_s: float, max_delay_s: float) -> None:
        """Leave: stop sending, wait for acks, close, come back after a random delay."""
        self.leaving = Leave(now + drain_s, min_delay_s, max(min_delay_s, max_delay_s))

    # -- for the caller -------------------------------------------------------------------------------------------

    @property
    def messages_out(self) -> int:
        """Messages sent on this stream and not acked."""
        return len(self._out)

    @property
    def handed(self) -> Collection[RejectionKey]:
        """Keys of rejections that the server may still tell again."""
        return self._handed
