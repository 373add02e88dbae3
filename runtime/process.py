"""Running a process: signals, exit codes, the event loop's lag, and errors that nobody caught.

    sys.exit(run_process(serve))        # async def serve(shutdown: Shutdown) -> int

SIGTERM and SIGINT ask for the end: `main` sees it in `Shutdown`, finishes what it owes and returns. A
second signal ends the process at once, for an operator whose drain hangs.
"""

import asyncio
import contextlib
import enum
import logging
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from types import FrameType
from typing import Any, Final

from runtime.config import ConfigError
from runtime.metrics import Metrics

log = logging.getLogger(__name__)

LAG_INTERVAL_S: Final = 0.1
LAG_WARNING_S: Final = 1.0


class ExitCode(enum.IntEnum):
    """What the process says to whoever started it."""

    OK = 0
    FAILED = 1
    """The work failed; the log says how."""
    CONFIGURATION = 2
    """The arguments or the environment are wrong: starting again changes nothing."""
    UNREACHABLE = 3
    """A database, broker or gateway did not answer: starting again may help."""


class DependencyUnreachable(Exception):
    """Something the process cannot work without does not answer; the text names it and its address."""


class Shutdown:
    """The wish that the process ends. Made by `run_process`; tests make their own within a running loop."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._reason = ""

    @property
    def requested(self) -> bool:
        """Whether the process should end."""
        return self._event.is_set()

    @property
    def reason(self) -> str:
        """Why, such as SIGTERM; empty until then."""
        return self._reason

    def request(self, reason: str) -> None:
        """Ask for the end, from the event loop's thread. The first reason stays."""
        if not self._event.is_set():
            self._reason = reason
            self._event.set()

    async def wait(self) -> None:
        """Return once the end is asked for."""
        await self._event.wait()

    async def wait_at_most(self, seconds: float) -> None:
        """Return once the end is asked for, or after so many seconds; others get their turn in any case."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        try:
            async with asyncio.timeout(seconds):
                await self._event.wait()
        except TimeoutError:
            pass


def run_process(main: Callable[[Shutdown], Awaitable[int]], *, metrics: Metrics | None = None) -> int:
    """Run `main` on a new event loop until it returns; its result is the exit code.

    Call it from the main thread, once logs are configured. `main` is not cancelled by a signal: it
    watches the shutdown. What it raises is logged once and becomes an exit code: ConfigError
    CONFIGURATION, DependencyUnreachable UNREACHABLE, anything else FAILED. The lag of the loop goes to
    `metrics`.
    """
    try:
        return asyncio.run(_run(main, metrics))
    except (Exception, asyncio.CancelledError) as error:
        code = exit_code_of(error)
        if code is ExitCode.FAILED:
            log.critical("process failed", exc_info=error)
        else:
            for leaf in _leaves(error):
                log.critical(str(leaf))
        return code


def exit_code_of(error: BaseException) -> ExitCode:
    """The exit code an error stands for; of a group, the one all its errors share, else FAILED."""
    codes = {
        ExitCode.CONFIGURATION
        if isinstance(leaf, ConfigError)
        else ExitCode.UNREACHABLE
        if isinstance(leaf, DependencyUnreachable)
        else ExitCode.FAILED
        for leaf in _leaves(error)
    }
    return codes.pop() if len(codes) == 1 else ExitCode.FAILED


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


async def _run(main: Callable[[Shutdown], Awaitable[int]], metrics: Metrics | None) -> int:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_log_unhandled)
    shutdown = Shutdown()
    with _signals(loop, shutdown):
        sampler = loop.create_task(sample_lag(metrics)) if metrics is not None else None
        try:
            return int(await main(shutdown))
        finally:
            if sampler is not None:
                sampler.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await sampler


@contextlib.contextmanager
def _signals(loop: asyncio.AbstractEventLoop, shutdown: Shutdown) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("a process is run from its main thread: no other gets its signals")
    seen = 0

    # Not loop.add_signal_handler: its handlers wait for the loop, and the second signal is for a loop
    # that hangs.
    def handle(number: int, _: FrameType | None) -> None:
        nonlocal seen
        seen += 1
        if seen > 1:
            os.write(2, b"second signal: ending at once, without draining\n")
            os._exit(128 + number)
        loop.call_soon_threadsafe(begin, signal.Signals(number).name)

    def begin(reason: str) -> None:
        log.info("shutdown asked for", extra={"reason": reason})
        shutdown.request(reason)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _log_unhandled(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    extra = {"source": str(context.get("task") or context.get("handle") or context.get("transport") or "")}
    log.error(context["message"], extra=extra, exc_info=error if error is not None else None)


async def sample_lag(metrics: Metrics) -> None:
    """Measure for ever how late the loop wakes a sleeper; cancel it to end it."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + LAG_INTERVAL_S
        await asyncio.sleep(LAG_INTERVAL_S)
        lag = max(0.0, loop.time() - due)
        metrics.observe("atlasco_event_loop_lag_seconds", lag)
        if lag > LAG_WARNING_S:
            log.warning("the event loop stood still", extra={"seconds": round(lag, 3)})
