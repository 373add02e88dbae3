"""A circuit breaker for each source: one that fails is left alone for a while, then asked again by a probe."""

import time
from collections.abc import Callable
from typing import Final

FAILURES: Final = 3
"""Failures in a row that open a breaker."""

_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 10.0


class Breaker:
    """Opens after three failures in a row; a probe that succeeds after the pause closes it.

    Questions and probes are counted apart. An answered question proves that the source is well; a probe proves less,
    and must not hide that questions fail. But probes are many, and single ones fail on any busy day: only one another
    makes a row of them.

    The pause doubles with each opening that follows soon on the last, so that a source which answers probes and fails
    questions is not tried all the time.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failed_questions = 0
        self._failed_probes = 0
        self._pause_s = _FIRST_PAUSE_S
        self._open_until: float | None = None
        self._closed_at = float("-inf")
        self.problem = ""

    @property
    def is_open(self) -> bool:
        """Whether the source is to be left alone."""
        return self._open_until is not None

    def failed(self, problem: str, *, probe: bool = False) -> None:
        """The source did not answer a question, or with `probe` a probe; `problem` is for people."""
        self.problem = problem
        if probe:
            self._failed_probes += 1
        else:
            self._failed_questions += 1
        if max(self._failed_questions, self._failed_probes) < FAILURES or self.is_open:
            return
        now = self._clock()
        soon = now - self._closed_at < _LONGEST_PAUSE_S
        self._pause_s = min(_LONGEST_PAUSE_S, self._pause_s * 2) if soon else _FIRST_PAUSE_S
        self._open_until = now + self._pause_s

    def answered(self, *, probe: bool = False) -> None:
        """The source answered a question, or with `probe` a probe."""
        if self._open_until is None:
            self._failed_probes = 0
            if not probe:
                self._failed_questions = 0
        elif probe and self._clock() >= self._open_until:
            self._open_until = None
            self._failed_questions = self._failed_probes = 0
            self._closed_at = self._clock()
