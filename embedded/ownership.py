"""One living owner per data directory.

The lock is the kernel's (flock): it goes with its process, however that dies, so there is no stale
lock to clean. What it guards is the right to start, reconfigure and stop the server; the server itself
outlives its owner and the next owner takes it over.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path


class OwnerLock:
    """Exclusive ownership of a data directory, held from `acquire` to `release` or to process death."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        """Tell whether this object holds the lock."""
        return self._fd is not None

    def acquire(self) -> bool:
        """Take the lock without waiting; False when another process, or another object here, has it."""
        if self._fd is not None:
            return True
        # O_CLOEXEC: a server that inherited the descriptor would own its own directory for ever.
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())  # for people only; the lock is what counts
        return True

    def release(self) -> None:
        """Give the lock back; without effect when it is not held."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def owner(self) -> str:
        """Return the pid the last owner wrote, for messages; "unknown" when it cannot be read."""
        with contextlib.suppress(OSError):
            return self._path.read_text().strip() or "unknown"
        return "unknown"


def write_atomically(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a small file so that a crash leaves the old or the new content, never a part."""
    temporary = path.with_name(path.name + ".new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
