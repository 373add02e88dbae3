"""One clock: what time it is on the primary, as far as this process can know.

Completeness is always told on the primary's clock. A process that asks it for the time learns that the answer was
made between the question and its arrival, and no more: hence bounds, not a time. Between two measurements the bounds
widen, because two clocks do not run alike.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from storage.times import SECOND_US

# How far two clocks drift apart in the worst case, as parts of the time that passes: a crystal is off by 100 ppm at
# most, a clock being corrected runs up to 500 ppm faster or slower.
_DRIFT: Final = 1e-3


def _running_ns() -> int:
    """Nanoseconds since some moment, those while the machine was suspended included.

    Linux's monotonic clock stands still meanwhile: the primary would seem to have stood still too, and an old copy of
    it to be fresh.
    """
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic_ns()


@dataclass(frozen=True, slots=True)
class Instant:
    """A moment on the primary's clock, in microseconds since 1970: not before `earliest_us`, not after `latest_us`."""

    earliest_us: int
    latest_us: int

    @property
    def uncertainty_us(self) -> int:
        """How far apart the bounds are."""
        return self.latest_us - self.earliest_us


class PrimaryClock:
    """The bounds of the primary's clock, from measurements. `running_ns` is the process's own clock."""

    def __init__(self, running_ns: Callable[[], int] = _running_ns) -> None:
        self._running_ns = running_ns
        # Bounds of (primary's clock - own clock), and when they were made; own times in microseconds.
        self._bounds: tuple[float, float, float] | None = None

    def own_us(self) -> float:
        """The process's own clock, for `observe`."""
        return self._running_ns() / 1000

    def observe(self, asked_us: float, primary_us: int, answered_us: float) -> None:
        """The primary said that it was `primary_us`, between two moments of the own clock."""
        # A microsecond, because the primary's clock is told in whole ones.
        low, high = primary_us - answered_us, primary_us + 1 - asked_us
        if self._bounds is not None:
            known_low, known_high, at = self._bounds
            slack = _DRIFT * max(0.0, answered_us - at)
            both = max(low, known_low - slack), min(high, known_high + slack)
            # Contradicting bounds: a clock was set, or there is another primary. Only the newest measurement counts.
            if both[0] <= both[1]:
                low, high = both
        self._bounds = (low, high, answered_us)

    def now(self) -> Instant | None:
        """The time on the primary; None before the first measurement."""
        if self._bounds is None:
            return None
        low, high, at = self._bounds
        own = self.own_us()
        slack = _DRIFT * max(0.0, own - at)
        return Instant(int(own + low - slack), int(own + high + slack) + 1)

    @property
    def age_s(self) -> float | None:
        """Seconds since the last measurement."""
        return None if self._bounds is None else (self.own_us() - self._bounds[2]) / SECOND_US
