"""Giving up a question to the warehouse: from another thread, so that its statement really ends."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Final, TypeAlias

from storage.errors import QueryCanceled

# A statement that is to end is asked so often, and for so long: a request that arrives between two statements, or
# before the server has begun with one, has no effect.
_AGAIN_S: Final = 0.1
_LONGEST_S: Final = 30.0

Act: TypeAlias = Callable[[Callable[[], object]], None]
"""Runs something, unless the statement that it is to stop has ended meanwhile; the statement cannot end before it has
returned, so what it hits is that statement."""

Stop: TypeAlias = Callable[[int, Act], None]
"""Tries to end a statement, for the 0th, 1st, … time. Preparations, such as a connection, come before it acts. Raises
nothing."""


class Cancellation:
    """Whether an answer is still wanted. One thread runs statements, any other may `cancel`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requested = False
        self._stop: Stop | None = None
        self._ended = threading.Event()

    def cancel(self) -> None:
        """End the statement under way, and let no other begin. Blocks until then, for half a minute of attempts."""
        self._requested = True
        gives_up = monotonic() + _LONGEST_S
        attempt = 0
        while monotonic() < gives_up:
            with self._lock:
                stop = self._stop
            if stop is None:
                return
            stop(attempt, self._while_it_runs)
            attempt += 1
            self._ended.wait(_AGAIN_S)

    @contextmanager
    def stoppable(self, stop: Stop) -> Iterator[None]:
        """Run the block, a statement; while it runs, `cancel` calls `stop`, in another thread. One block at a time.

        Raises:
            QueryCanceled: it was cancelled, before or meanwhile. What the block uses may have been stopped at any
                point, so it is not to be used again.
        """
        with self._lock:
            self._ended.clear()
            self._stop = stop
        try:
            self._refuse()
            yield
            self._refuse()
        finally:
            with self._lock:
                self._stop = None
                self._ended.set()

    def _while_it_runs(self, act: Callable[[], object]) -> None:
        with self._lock:
            if self._stop is not None:
                act()

    def _refuse(self) -> None:
        if self._requested:
            raise QueryCanceled("the question was given up")
