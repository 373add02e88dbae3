"""Looking at and waiting for processes that may not be our children."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from embedded.errors import StopFailed

_POLL_S = 0.01
_GONE = (psutil.NoSuchProcess, psutil.ZombieProcess)


def is_alive(pid: int) -> bool:
    """Tell whether a process runs. A zombie does not: where nobody reaps orphans they stay for ever."""
    try:
        process = psutil.Process(pid)
        # A dying process with many threads looks like a zombie as soon as its first thread has ended, but
        # holds its ports and files until its last has.
        return bool(process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1)
    except _GONE:
        return False


def works_in(pid: int, program: str, directory: Path) -> bool:
    """Tell whether a living process is `program` (its short name) with `directory` as working directory.

    A bare pid from a file proves nothing: after a reboot, and in containers always, a stale one names
    somebody else. The servers here sit in their own data directory, which does identify them.
    """
    try:
        process = psutil.Process(pid)
        return (
            process.status() != psutil.STATUS_ZOMBIE and process.name() == program and Path(process.cwd()) == directory
        )
    except (psutil.Error, OSError):
        return False


def working_in(program: str, directory: Path) -> list[int]:
    """Return the pids of all living processes that `works_in` is true of."""
    return [pid for pid in psutil.pids() if works_in(pid, program, directory)]


def kill_all(program: str, directory: Path) -> None:
    """SIGKILL all processes that `works_in` is true of. Errors: StopFailed if any survives ten seconds."""
    deadline = time.monotonic() + 10
    # In rounds: a process may fork between the look and the kill.
    while pids := working_in(program, directory):
        if time.monotonic() > deadline:
            raise StopFailed(f"processes {pids} of {directory} survive SIGKILL")
        for pid in pids:
            send(pid, signal.SIGKILL)
        for pid in pids:
            wait_gone(pid, 1)


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal; a process already gone is no error."""
    with contextlib.suppress(*_GONE):
        psutil.Process(pid).send_signal(number)


def wait_gone(pid: int, timeout_s: float) -> bool:
    """Wait until a process has ended; False at the deadline. A zombie counts as ended.

    It is looked at, not waited for: waiting would take our own children's exit status from `subprocess`,
    and would not return for an orphan that nobody reaps.
    """
    deadline = time.monotonic() + timeout_s
    while is_alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


Progress = Callable[[str], None]
"""Called with one short line for a person each time something that takes long begins."""


def silent(_message: str) -> None:
    """Ignore progress: the default."""
