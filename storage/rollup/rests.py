"""How long what failed is left alone."""

from collections.abc import Callable, Hashable


class Rests:
    """Until when what failed is left alone: longer with each failure, from `first_s` to `longest_s` seconds."""

    def __init__(self, clock: Callable[[], float], first_s: float, longest_s: float) -> None:
        self._clock = clock
        self._first_s = first_s
        self._longest_s = longest_s
        # What failed -> how often in a row, and when it is due again.
        self._failed: dict[Hashable, tuple[int, float]] = {}

    def is_due(self, what: Hashable) -> bool:
        """Whether it may be tried."""
        return self.left_s(what) <= 0.0

    def left_s(self, what: Hashable) -> float:
        """In how many seconds it may be tried; 0: now."""
        return max(0.0, self._failed[what][1] - self._clock()) if what in self._failed else 0.0

    def failed(self, what: Hashable) -> None:
        """It was tried, and failed."""
        times = self._failed.get(what, (0, 0.0))[0]
        pause_s = min(self._longest_s, self._first_s * 2.0 ** min(times, 20))
        self._failed[what] = times + 1, self._clock() + pause_s

    def succeeded(self, what: Hashable) -> None:
        """It was tried, and did not fail."""
        self._failed.pop(what, None)

    @property
    def resting(self) -> list[Hashable]:
        """What is not due."""
        return [what for what in self._failed if not self.is_due(what)]
