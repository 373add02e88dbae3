"""Work that a cancellation must not leave half done, and failures that nobody waits for any more."""

import asyncio
from collections.abc import Coroutine
from typing import Any


async def carried_out(work: Coroutine[Any, Any, object]) -> None:
    """Do work that must not be left half done: it ends first, however often the caller is cancelled meanwhile."""
    doing = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not doing.done():
        try:
            await asyncio.shield(doing)
        except asyncio.CancelledError as error:
            cancelled = error
    doing.result()
    if cancelled is not None:
        raise cancelled


def retrieve(ended: "asyncio.Future[Any]") -> None:
    """Take the failure of what has ended, if it failed: else asyncio logs that nobody ever did.

    For work that those who wanted it may have given up; how it ended is told to whoever still waits.
    """
    if not ended.cancelled():
        ended.exception()
