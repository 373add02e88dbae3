"""The clock by which the gateway sees how long a client leaves a message unread, in the hands of a test."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest


class PatienceClock:
    """Goes on only when a test says so: where a machine stands still for a while, no client becomes a slow reader."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: dict[object, tuple[float, Callable[[], None]]] = {}

    @property
    def unread(self) -> int:
        """Messages that a client was sent and that its transport has not taken."""
        return len(self._due)

    def go_on(self, seconds: float) -> None:
        self.now_s += seconds
        for key, (due_s, give_up) in list(self._due.items()):
            if due_s <= self.now_s:
                del self._due[key]
                give_up()

    def call_later(self, delay_s: float, give_up: Callable[[], None]) -> SimpleNamespace:
        """As of an event loop."""
        key = object()
        self._due[key] = self.now_s + delay_s, give_up
        return SimpleNamespace(cancel=lambda: self._due.pop(key, None))


@pytest.fixture
def patience_clock(monkeypatch: pytest.MonkeyPatch) -> PatienceClock:
    clock = PatienceClock()
    monkeypatch.setattr("gateway.slow_reader.asyncio", SimpleNamespace(get_running_loop=lambda: clock))
    return clock
