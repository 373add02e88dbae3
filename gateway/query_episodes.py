"""Conditions of the query service that last: told once when they begin and once when they end, never for each query."""

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

WINDOW_S: Final = 10.0
"""Answers are looked at together over so many seconds."""

BEGINS_ABOVE: Final = 0.05
BEGINS_WITH: Final = 3
ENDS_BELOW: Final = 0.01
"""Shares of the answers of a window, and how many it takes at least: of one now and then nothing is told. The shares
differ, so that one near a bound is not told again and again."""


class Episode:
    """One condition: `noted` is called for every answer, with the cause where the answer shows the condition.

    It is looked at when an answer comes, so what ends with the traffic is told with the next answer. `clock` is in
    seconds.
    """

    def __init__(self, begins: str, ends: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._begins = begins
        self._ends = ends
        self._clock = clock
        self._closes_at = clock() + WINDOW_S
        self._answers = 0
        self._causes: Counter[str] = Counter()
        self._since: float | None = None

    def noted(self, cause: str | None) -> None:
        """An answer. `cause` is one of few and names no tenant; None: the answer is as it should be."""
        now = self._clock()
        if now >= self._closes_at:
            if self._answers:
                self._look(now)
            self._closes_at = now + WINDOW_S
            self._answers = 0
            self._causes.clear()
        self._answers += 1
        if cause is not None:
            self._causes[cause] += 1

    def _look(self, now: float) -> None:
        share = self._causes.total() / self._answers
        if self._since is None and share > BEGINS_ABOVE and self._causes.total() >= BEGINS_WITH:
            self._since = now
            extra = {"share": round(share, 3), "answers": self._answers, "causes": dict(self._causes.most_common())}
            log.warning(self._begins, extra=extra)
        elif self._since is not None and share < ENDS_BELOW:
            log.info(self._ends, extra={"lasted_s": round(now - self._since, 1)})
            self._since = None
