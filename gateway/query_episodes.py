"""Lasting conditions of the query service, logged once when they begin and once when they end, not for every query."""

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

WINDOW_S: Final = 10.0
"""Answers are judged together, over windows of so many seconds."""

BEGINS_ABOVE: Final = 0.05
BEGINS_WITH: Final = 3
ENDS_BELOW: Final = 0.01
"""A condition begins when more than the first share of a window's answers show it, and at least BEGINS_WITH do; an
occasional one is not logged. It ends below the other share; the gap keeps a share near one bound from being logged over
and over."""


class Episode:
    """One condition; `begins` and `ends` are the messages to log, `clock` counts seconds.

    It is judged only when an answer comes: a condition that ends because traffic stops is logged as ended with the
    first answers after that.
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
        """Count an answer. `cause` is one of a small fixed set, and names no tenant; None: nothing is wrong with it."""
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
