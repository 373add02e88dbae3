"""How far the loader is behind, in records and in time. For looking at: nothing depends on it.

Both say nothing (LookupError, which leaves a gauge out) rather than something wrong while they are not known.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any, Final

from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

_ASK_EVERY_S: Final = 5.0
_TIMEOUT_S: Final = 10.0


class LogEnds:
    """Where partitions of a topic end, by what the brokers say every few seconds.

    Asked in the background, all partitions at once. The consumer's own idea of it costs nothing, but stands still while
    its partitions are paused, which is when somebody wants to know.
    """

    def __init__(self, admin: AdminClient, topic: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._admin = admin
        self._topic = topic
        self._clock = clock
        self._ends: dict[int, int] = {}
        self._asked: Mapping[TopicPartition, Future[Any]] = {}
        self._ask_at = 0.0

    def look(self, partitions: Iterable[int]) -> None:
        """Take up what the brokers have answered, and ask again when it is time. Waits for nothing."""
        if self._asked and all(answer.done() for answer in self._asked.values()):
            for place, answer in self._asked.items():
                # One that failed keeps what was known: the next answer is seconds away.
                if answer.exception() is None:
                    self._ends[place.partition] = answer.result().offset
            self._asked = {}
        if self._asked or self._clock() < self._ask_at:
            return
        self._ask_at = self._clock() + _ASK_EVERY_S
        latest = OffsetSpec.latest()  # type: ignore[no-untyped-call]
        wanted = {TopicPartition(self._topic, partition): latest for partition in partitions}
        if wanted:
            # Serves the token callback of MSK IAM.
            self._admin.poll(0)
            try:
                self._asked = self._admin.list_offsets(wanted, request_timeout=_TIMEOUT_S)
            except KafkaException:
                return

    def missing(self, next_offsets: Mapping[int, int | None]) -> int:
        """How many records stand at or after the given offsets. From any thread.

        Raises:
            LookupError: of one of the partitions, an offset or the end is not known yet.
        """
        count = 0
        for partition, offset in next_offsets.items():
            if offset is None:
                raise LookupError(partition)
            # A log that was made anew may end before what was loaded.
            count += max(0, self._ends[partition] - offset)
        return count


class Lateness:
    """How old the moment is through which the warehouse is complete, on the primary's clock.

    The two are measured together, and after that it is this process's monotonic clock that goes on: its wall clock may
    be wrong.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._behind: tuple[float, float] | None = None

    def measured(self, as_of_us: int | None, primary_us: int) -> None:
        """Note the warehouse's completeness, and the primary's clock read at about the same time."""
        if as_of_us is not None:
            self._behind = self._clock(), max(0.0, (primary_us - as_of_us) / 1e6)

    def seconds(self) -> float:
        """How far behind the warehouse is now, unless another loader has brought it further. From any thread.

        Raises:
            LookupError: not measured yet, or the warehouse is not complete through any moment.
        """
        if self._behind is None:
            raise LookupError
        at, behind = self._behind
        return behind + self._clock() - at
