"""How long to wait before the next attempt to connect: exponential, capped, with full jitter."""

import random


class Backoff:
    """Delays drawn uniformly from [0, ceiling], the ceiling doubling from `base_s` up to `cap_s`.

    Full jitter, because a gateway that restarts has all its devices come back: spreading them over the whole
    interval is what keeps the second attempt from being as crowded as the first. `reset` belongs after proof
    of progress (an ack that advances), not after a mere connection: a server that accepts and then fails
    would otherwise be hammered at the base rate.
    """

    def __init__(self, *, base_s: float, cap_s: float, rng: random.Random) -> None:
        self._base_s = base_s
        self._cap_s = cap_s
        self._rng = rng
        self._attempts = 0

    @property
    def ceiling_s(self) -> float:
        """The longest delay that `next_delay` may return now, in seconds."""
        # The exponent is bounded so that a device that is offline for a year does not overflow a float.
        return min(self._cap_s, self._base_s * 2.0 ** min(self._attempts, 40))

    def next_delay(self) -> float:
        """Seconds to wait before the next attempt; each call counts as one more failure."""
        delay = self._rng.uniform(0.0, self.ceiling_s)
        self._attempts += 1
        return delay

    def reset(self) -> None:
        """Forget the failures."""
        self._attempts = 0
