"""Questions that belong to another source and run on the primary: how many may at once."""

from collections.abc import Iterator
from contextlib import contextmanager

from router.outcome import FallbackBusy


class Fallbacks:
    """Admits as many as `limit` at once: a broken replica must cost its own callers, not those who write."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._running = 0

    @property
    def running(self) -> int:
        """How many run now."""
        return self._running

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Runs the block as one of them. Raises FallbackBusy where there are too many."""
        if self._running >= self._limit:
            raise FallbackBusy(self._limit)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
