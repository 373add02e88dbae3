"""What a device knows of its own readings: sent, acked, rejected. The devices' side of an audit.

A reading counts as acked only when its message is acked and the reading itself is not rejected. The ledger keeps each
message as it was sent, about a dozen bytes per reading, and reads it again when asked.
"""

from collections.abc import Iterator, Sequence

from device.dictionary import Dictionary
from device.outcomes import Rejected
from device.packing import Packed, Reading, Value, iterate

Key = tuple[str, int]


class Ledger:
    """One device's account. Messages are known by their tickets, which no reconnect and no new session changes."""

    def __init__(self, device_id: str, dictionary: Dictionary) -> None:
        self.device_id = device_id
        self.readings_sent = 0
        self._dictionary = dictionary
        self._payloads: dict[int, bytes] = {}
        self._acked_through = 0
        self._rejected: set[tuple[int, int | None]] = set()
        self._reasons: dict[str, int] = {}

    # -- entries ------------------------------------------------------------------------------------------------

    def sent(self, ticket: int, packed: Packed) -> None:
        """A message was handed to the client."""
        self._payloads[ticket] = packed.payload
        self.readings_sent += packed.count

    def acked(self, through_ticket: int) -> None:
        """Everything up to this message is durable, save what is rejected."""
        self._acked_through = max(self._acked_through, through_ticket)

    def rejected(self, rejections: Sequence[Rejected]) -> None:
        """Readings that will never be stored."""
        for one in rejections:
            self._rejected.add((one.ticket, one.index))
            self._reasons[one.reason] = self._reasons.get(one.reason, 0) + max(one.count, 1)

    # -- the account --------------------------------------------------------------------------------------------

    @property
    def rejected_by_reason(self) -> dict[str, int]:
        """Readings rejected, by the name of the reason."""
        return dict(self._reasons)

    def acked_readings(self) -> Iterator[tuple[str, int, Value]]:
        """The distinct acked readings (attribute, time in µs, value), each with the value acked last.

        A reading whose later correction has no answer yet is left out, for either value may be stored; see
        `uncertain_readings`.
        """
        values, unanswered = self._account()
        for key, value in values.items():
            if key not in unanswered:
                yield (*key, value)

    def uncertain_readings(self) -> Iterator[Key]:
        """Keys with a write that is neither acked nor rejected: the server may hold it, or not. None after a
        successful flush."""
        yield from self._account()[1]

    def rejected_readings(self) -> Iterator[Reading]:
        """The rejected readings that can be named, in the order they were sent."""
        for _, reading, rejected in self._walk():
            if rejected and reading is not None:
                yield reading

    def _account(self) -> tuple[dict[Key, Value], set[Key]]:
        values: dict[Key, Value] = {}
        unanswered: set[Key] = set()
        for ticket, reading, rejected in self._walk():
            if reading is None or rejected:
                continue
            key = (reading.attribute, reading.time_us)
            if ticket <= self._acked_through:
                values[key] = reading.value
            else:
                unanswered.add(key)
        return values, unanswered

    def _walk(self) -> Iterator[tuple[int, Reading | None, bool]]:
        for ticket, payload in sorted(self._payloads.items()):
            whole = (ticket, None) in self._rejected
            for index, reading in enumerate(iterate(payload, self._dictionary)):
                yield ticket, reading, whole or (ticket, index) in self._rejected
