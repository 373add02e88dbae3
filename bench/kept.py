"""Databases that are large, built once and kept: one server in a directory, and a note beside it for each that is done.

The note is written last, after the server has stopped and everything is on disk. A database without one, or whose note
tells of another shape or another schema, is built anew.
"""

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from bench.errors import BenchmarkVoid
from bench.stack import Stack
from embedded.errors import DataDirInUse

# Of a server that only builds: nothing of it is durable until the end, when it stops and the disks are synced. What a
# crash leaves has no note.
_BUILDING: Mapping[str, str] = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "autovacuum": "off",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "30min",
    "maintenance_work_mem": "768MB",
}
# A tenant keeps readings for 90 days; what is older is not shown.
_OLDEST_US = 60 * 86_400_000_000
_READ_BYTES = 8 << 20

Say = Callable[[str], None]


class Content(Protocol):
    """What a kept database holds."""

    @property
    def database(self) -> str:
        """Its name, which tells one shape from another."""
        ...

    @property
    def version(self) -> int:
        """Raised when the same shape is filled with something else."""
        ...

    def build(self, stack: Stack, say: Say) -> Mapping[str, Any]:
        """Fill the database, which has the schema and nothing else; returns what readers must know, for the note.

        With "end_us", the time in microseconds that the content ends at.
        """
        ...


@dataclass(frozen=True, slots=True)
class Kept:
    """A finished database."""

    content: Content
    # What `Content.build` returned.
    facts: Mapping[str, Any]


@contextmanager
def kept_databases(directory: Path, contents: Sequence[Content], say: Say) -> Iterator[tuple[Stack, list[Kept]]]:
    """A server in `directory` that holds all of these; builds what is missing.

    Raises BenchmarkVoid when another process uses the directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        missing = [content for content in contents if _note(directory, content) is None]
        if missing:
            _build(directory, missing, say)
        found = [Kept(content, _found(directory, content)) for content in contents]
        with Stack(directory) as stack:
            yield stack, found
    except DataDirInUse as error:
        raise BenchmarkVoid(f"the history is in use by another process: {error}") from error


def warm(stack: Stack, databases: Sequence[str]) -> int:
    """Read every file of these databases, so that the system has them in memory; returns the bytes."""
    total = 0
    for database in databases:
        with stack.admin(database) as connection:
            # Written now, not in the middle of a measurement.
            connection.execute("CHECKPOINT")
            row = connection.execute(
                "SELECT current_setting('data_directory'), oid FROM pg_database WHERE datname = current_database()"
            ).fetchone()
        assert row is not None
        for file in sorted((Path(row[0]) / "base" / str(row[1])).iterdir()):
            # A file of the server's own cache may go meanwhile.
            with suppress(FileNotFoundError), file.open("rb", buffering=0) as content:
                while data := content.read(_READ_BYTES):
                    total += len(data)
    return total


def _build(directory: Path, contents: Sequence[Content], say: Say) -> None:
    facts = {}
    with Stack(directory, _BUILDING) as stack:
        for content in contents:
            _note_file(directory, content).unlink(missing_ok=True)
            say(f"building {content.database} in {directory}, once")
            started = time.monotonic()
            stack.drop(content.database)
            asyncio.run(stack.make_schema(content.database))
            facts[content] = {
                **content.build(stack, lambda text: say(f"  {text}")),
                "build_s": round(time.monotonic() - started, 1),
            }
    os.sync()
    for content, told in facts.items():
        _note_file(directory, content).write_text(json.dumps({"fingerprint": _fingerprint(content), "facts": told}))


def _found(directory: Path, content: Content) -> Mapping[str, Any]:
    facts = _note(directory, content)
    if facts is None:
        raise BenchmarkVoid(f"{content.database} was built and is not there")
    return facts


def _note(directory: Path, content: Content) -> Mapping[str, Any] | None:
    try:
        note = json.loads(_note_file(directory, content).read_text())
    except (FileNotFoundError, ValueError):
        return None
    if note["fingerprint"] != _fingerprint(content) or not (directory / "postgres" / "pgdata").is_dir():
        return None
    facts: Mapping[str, Any] = note["facts"]
    return None if facts["end_us"] < time.time_ns() // 1000 - _OLDEST_US else facts


def _note_file(directory: Path, content: Content) -> Path:
    return directory / f"{content.database}.json"


def _fingerprint(content: Content) -> str:
    schema = resources.files("storage").joinpath("sql", "schema.sql").read_bytes()
    return hashlib.sha256(f"{content!r} {content.version} ".encode() + schema).hexdigest()
