"""How tests wait: for a condition, with one deadline that only a broken system reaches."""

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

T = TypeVar("T")

PATIENCE_S: Final = 60.0
"""How long a test waits for what must come. A machine that is busy with other tests takes a hundred times as long as an
idle one; a shorter wait tests the machine."""

_LOOK_AGAIN_S: Final = 0.005


def wait_until(condition: Callable[[], T], what: str) -> T:
    """What the condition gives once it is true; the thread waits."""
    ends = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < ends, f"not within {PATIENCE_S:g} s: {what}"
        time.sleep(_LOOK_AGAIN_S)
    return found


async def until(
    condition: Callable[[], object],
    what: str = "what the test waits for",
    patience_s: float = PATIENCE_S,
    *,
    beside: "asyncio.Task[Any] | None" = None,
) -> None:
    """Return once a condition, which may be one to await, is true; the event loop goes on meanwhile.

    `beside` is the task that is to make it true: what that task raises is raised here, and at once.
    """
    try:
        async with asyncio.timeout(patience_s) as patience:
            while True:
                # Before the condition is looked at: the last thing that the task does may make it true.
                ended = beside is not None and beside.done()
                found = condition()
                if inspect.isawaitable(found):
                    found = await found
                if found:
                    return
                if beside is not None and ended:
                    beside.result()
                    raise AssertionError(f"the task beside it ended before: {what}")
                await asyncio.sleep(_LOOK_AGAIN_S)
    except TimeoutError as error:
        # The condition may have had a time limit of its own.
        if not patience.expired():
            raise
        raise AssertionError(f"not within {patience_s:g} s: {what}") from error


async def eventually(
    condition: Callable[[], object],
    what: str,
    patience_s: float = PATIENCE_S,
    *,
    beside: "asyncio.Task[Any] | None" = None,
) -> None:
    """As `until`, for a condition that blocks: it is looked at in a thread."""
    await until(lambda: asyncio.to_thread(condition), what, patience_s, beside=beside)
