"""What can go wrong with an embedded server. Every error says what to do or where to look."""

from __future__ import annotations

from collections import deque
from pathlib import Path

_LOG_TAIL_LINES = 20


class EmbeddedError(Exception):
    """Root of this package's errors. `retriable`: the same call may succeed later without a change."""

    retriable = False


class DataDirInUse(EmbeddedError):
    """Another living process owns this data directory, and what was asked needs ownership."""

    retriable = True


class DataDirUnusable(EmbeddedError):
    """The data directory cannot be used: no permission, or made by another version."""


class BinariesMissing(EmbeddedError):
    """The PostgreSQL wheel is not installed, or does not carry the version needed."""


class StartFailed(EmbeddedError):
    """A server did not become ready. `log_file` is where it wrote, `log_tail` its last lines."""

    server = "server"

    def __init__(self, reason: str, log_file: Path) -> None:
        self.reason = reason
        self.log_file = log_file
        self.log_tail = tail(log_file)
        quoted = "\n".join(f"  | {line}" for line in self.log_tail) or "  | (empty)"
        super().__init__(f"{self.server} did not start: {reason}\nlast lines of {log_file}:\n{quoted}")


class PostgresStartFailed(StartFailed):
    """PostgreSQL (primary or replica) did not become ready, or its cluster could not be created."""

    server = "PostgreSQL"


class KafkaStartFailed(StartFailed):
    """The Kafka broker did not become ready, or its storage could not be formatted."""

    server = "Kafka"


class StopFailed(EmbeddedError):
    """A server was asked to stop and was still alive at the deadline; it is left running."""

    retriable = True


class ReplicaLagging(EmbeddedError):
    """A replica did not reach the wanted position before the deadline."""

    retriable = True


class ProcessFailed(EmbeddedError):
    """A process of the stack ended, or did not become ready; the text ends with the last lines of its log."""


class JavaMissing(EmbeddedError):
    """No Java runtime of the version needed. The message names the package to install."""


class MavenMissing(EmbeddedError):
    """Kafka's jars are not cached yet and Maven, which resolves them, is not installed."""


class JarsUnresolved(EmbeddedError):
    """Maven ran and failed: no network on the first run, most often. The message has its last lines."""

    retriable = True


def tail(log_file: Path, lines: int = _LOG_TAIL_LINES) -> tuple[str, ...]:
    """Return the last `lines` lines of a log; empty when the file cannot be read."""
    try:
        with log_file.open(encoding="utf-8", errors="replace") as stream:
            return tuple(line.rstrip("\n") for line in deque(stream, maxlen=lines))
    except OSError:
        return ()
