"""No answer claims more than it has, whatever part of the whole stack lags, stands still or is gone.

Two probes write stamped readings without a pause and ask at every tier; `demo.witness` judges each answer by what was
acked before it was asked and what was committed before its as_of.
"""

import asyncio
import time
from collections.abc import Callable

import pytest

from demo import questions as module
from demo.questions import TIERS, Questions
from demo.stack import Stack

_DEADLINE_S = 90.0
_ANSWERS = 6
"""Checked answers of each probe and tier, at least, while something is wrong."""


class Asking:
    """Two probes that ask; `answers` counts what they got at each tier."""

    def __init__(self, stack: Stack) -> None:
        self._probes = [Questions(stack.target, "nobody", progress=print) for _ in range(2)]
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Asking":
        self._tasks = [asyncio.create_task(probe.run()) for probe in self._probes]
        await self.some_more()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    def answers(self, tier: module.Tier) -> dict[str, int]:
        found: dict[str, int] = {}
        for probe in self._probes:
            for source, count in probe.figures().tiers[tier].answers.items():
                found[source] = found.get(source, 0) + count
        return found

    def staleness_s(self, tier: module.Tier) -> float:
        return max(probe.figures().tiers[tier].staleness_s or 0.0 for probe in self._probes)

    async def some_more(self) -> None:
        """Until each probe has had answers at each tier; nothing may be wrong with any of them."""
        before = [self._counts(probe) for probe in self._probes]

        def enough() -> bool:
            return all(
                count - counts[tier] >= _ANSWERS
                for probe, counts in zip(self._probes, before, strict=True)
                for tier, count in self._counts(probe).items()
            )

        await self.until(enough)

    async def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _DEADLINE_S
        while not condition():
            for probe, task in zip(self._probes, self._tasks, strict=True):
                figures = probe.figures()
                assert not figures.dishonest, figures.problem
                assert not task.done(), task
                assert time.monotonic() < deadline, figures
            await asyncio.sleep(0.02)

    @staticmethod
    def _counts(probe: Questions) -> dict[module.Tier, int]:
        return {tier: sum(found.answers.values()) for tier, found in probe.figures().tiers.items()}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far more questions and stamps than a demo needs, and the warehouse in every round."""
    monkeypatch.setattr(module, "_ROUND_EVERY_S", 0.1)
    monkeypatch.setattr(module, "_STAMP_EVERY_S", 0.02)
    monkeypatch.setattr(module, "_ANALYTICS_EVERY", 1)


@pytest.mark.parametrize("part", ["relay", "loader", "rollup worker", "replay", "replica"])
async def test_no_answer_claims_more_than_it_has(stack: Stack, quick: None, part: str) -> None:
    assert stack.pipeline is not None
    assert stack.replica is not None
    replica = stack.replica
    breaks, mends = {
        "relay": (stack.pipeline.relay.stop, stack.pipeline.relay.start),
        "loader": (stack.pipeline.loader.stop, stack.pipeline.loader.start),
        "rollup worker": (stack.rollup.stop, stack.rollup.start),
        "replay": (replica.pause_replay, replica.resume_replay),
        "replica": (replica.kill, replica.start),
    }[part]
    async with Asking(stack) as asking:
        await asyncio.to_thread(breaks)
        try:
            stuck = asking.staleness_s("analytics")
            await asking.some_more()
            match part:
                case "relay" | "loader":
                    # Its answers get older and older, and say so.
                    await asking.until(lambda: asking.staleness_s("analytics") > stuck + 2.0)
                case "replay" | "replica":
                    before = asking.answers("dashboard").get("primary", 0)
                    await asking.until(lambda: asking.answers("dashboard").get("primary", 0) > before + _ANSWERS)
        finally:
            await asyncio.to_thread(mends)
        if part in ("relay", "loader"):
            await asking.until(lambda: asking.staleness_s("analytics") < stuck + 2.0)
        before = asking.answers("dashboard").get("replica", 0)
        await asking.until(lambda: asking.answers("dashboard").get("replica", 0) > before + _ANSWERS)
        assert set(asking.answers("critical")) == {"primary"}
        assert "primary" not in asking.answers("analytics")
        assert all(asking.answers(tier) for tier in TIERS)
