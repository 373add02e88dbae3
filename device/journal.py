"""The file behind a persistent buffer: the session, the aliases and the unacked messages, together or not at all.

Format: the magic, then records, each `type (1) · length (4) · CRC-32 (4) · payload`, big endian, the checksum over
type, length and payload. Records are only ever appended:

    SESSION   session id (16) · acked sequence (8)     first; again whenever the client starts a new session
    DEFINE    a serialized AliasDefinition             held messages name their attributes by alias
    MESSAGE   sequence (8) · readings (4) · Readings   one buffered message
    ACKED     sequence (8)                             everything up to here may be forgotten
    CLOSED    -                                        the last record of a file that was closed in order

A crash can leave a torn record at the end; it is cut when the file is opened. Whether the session may then go on
depends on one question: can a number have been used on the wire that the file does not know? If so, the server may
hold other content under a number that the client is about to use again, and would ignore the new content as a
repeat: silent loss. So:

    Fsync.ALWAYS   a message is on disk before it can be sent; a torn record was never sent: the session goes on.
    Fsync.NEVER    the operating system writes when it likes. After a death of the process nothing is lost, after a
                   loss of power any number of records may be. The two look alike, so without a CLOSED record the
                   client starts a new session and sends again what the file still holds.
"""

import enum
import fcntl
import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from atlasco.telemetry.v1 import ingest_pb2

from device.errors import JournalError, JournalInUseError

MAGIC = b"ATLSBUF1"
_HEADER = struct.Struct(">BII")
_SESSION = struct.Struct(">16sQ")
_MESSAGE = struct.Struct(">QI")
_NUMBER = struct.Struct(">Q")


class Fsync(enum.Enum):
    """When the file is forced to disk; see above for what each setting survives."""

    ALWAYS = "always"
    NEVER = "never"


class _Kind(enum.IntEnum):
    SESSION = 1
    DEFINE = 2
    MESSAGE = 3
    ACKED = 4
    CLOSED = 5


@dataclass(slots=True)
class JournalState:
    """What a file held when it was opened. `session_id` is empty for a file that was new."""

    session_id: bytes = b""
    acked: int = 0
    messages: dict[int, tuple[bytes, int]] = field(default_factory=dict)
    definitions: list[ingest_pb2.AliasDefinition] = field(default_factory=list)
    # False when a number may have been used that the file does not know: start a new session.
    continues: bool = True


class Journal:
    """An append-only, checksummed file. Writes happen in the calling thread; with Fsync.ALWAYS each waits for
    the disk.

    Raises JournalError when the file cannot be read or written, JournalInUseError when another process has it.
    """

    def __init__(self, path: Path, *, fsync: Fsync = Fsync.ALWAYS, compact_above_bytes: int = 1 << 20) -> None:
        self.path = path
        self._fsync = fsync
        self._compact_above_bytes = compact_above_bytes
        self._live_bytes = 0
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.state, self._size = self._recover()
        except BlockingIOError:
            self._release()
            raise JournalInUseError(f"{path} is in use by another client") from None
        except OSError as error:
            self._release()
            raise JournalError(f"{path}: {error.strerror}") from error
        except JournalError:
            self._release()
            raise

    # -- opening ------------------------------------------------------------------------------------------------

    def _recover(self) -> tuple[JournalState, int]:
        content = self.path.read_bytes()
        if len(content) < len(MAGIC):
            # New, or torn before the first record: nothing can have been sent from it.
            os.ftruncate(self._descriptor, 0)
            _write_all(self._descriptor, MAGIC, 0)
            return JournalState(), len(MAGIC)
        if not content.startswith(MAGIC):
            raise JournalError(f"{self.path} is not a buffer file")
        state, size, closed, one_record_torn = replay(content)
        state.continues = one_record_torn if self._fsync is Fsync.ALWAYS else closed and size == len(content)
        if closed:
            # Durably, before anything is appended: a loss of power that takes every later record with it must not
            # leave a file that looks closed in order.
            size -= _HEADER.size
        if size < len(content):
            os.ftruncate(self._descriptor, size)
            os.fsync(self._descriptor)
        return state, size

    # -- appending ----------------------------------------------------------------------------------------------

    def session(self, session_id: bytes, acked: int) -> None:
        """Record the session that the messages belong to."""
        self._append(_record(_Kind.SESSION, _SESSION.pack(session_id, acked)), sync=True)

    def define(self, definition: ingest_pb2.AliasDefinition) -> None:
        """Record an alias; before the first message that uses it."""
        # Not synced: a later message that uses it is, and records reach the disk in the order of the file.
        self._append(_record(_Kind.DEFINE, definition.SerializeToString()), sync=False)

    def message(self, sequence: int, payload: bytes, count: int) -> None:
        """Record a message; before it can be sent."""
        self._append(_message_record(sequence, payload, count), sync=True)

    def acked(self, sequence: int) -> None:
        """Record progress. Losing this record is harmless: the messages would be sent again, or be dropped by
        the next Welcome."""
        self._append(_record(_Kind.ACKED, _NUMBER.pack(sequence)), sync=False)

    def _append(self, record: bytes, *, sync: bool) -> None:
        try:
            _write_all(self._descriptor, record, self._size)
            if sync and self._fsync is Fsync.ALWAYS:
                os.fdatasync(self._descriptor)
        except OSError as error:
            # A half-written record (disk full) would hide every later one from recovery.
            os.ftruncate(self._descriptor, self._size)
            raise JournalError(f"{self.path}: {error.strerror}") from error
        self._size += len(record)

    # -- compaction ---------------------------------------------------------------------------------------------

    def wants_compaction(self, live_bytes: int) -> bool:
        """Whether most of the file is messages that are acked, given the bytes of those that are not."""
        return self._size > self._compact_above_bytes and self._size > 4 * live_bytes

    def rewrite(
        self,
        session_id: bytes,
        acked: int,
        definitions: Iterable[ingest_pb2.AliasDefinition],
        messages: Iterable[tuple[int, bytes, int]],
    ) -> None:
        """Replace the file by one that holds just this; the old one stays valid until the new one is complete."""
        content = b"".join(
            [
                MAGIC,
                _record(_Kind.SESSION, _SESSION.pack(session_id, acked)),
                *(_record(_Kind.DEFINE, definition.SerializeToString()) for definition in definitions),
                *(_message_record(*message) for message in messages),
            ]
        )
        fresh = self.path.with_name(self.path.name + ".new")
        descriptor = -1
        try:
            descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _write_all(descriptor, content, 0)
            # Also under Fsync.NEVER: a rename that reaches the disk before the content would lose everything.
            os.fsync(descriptor)
            fresh.replace(self.path)
            _sync_directory(self.path.parent)
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            raise JournalError(f"{fresh}: {error.strerror}") from error
        os.close(self._descriptor)
        self._descriptor = descriptor
        self._size = len(content)

    # -- closing ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Mark the file as closed in order, force it to disk and let it go."""
        if self._descriptor < 0:
            return
        try:
            self._append(_record(_Kind.CLOSED, b""), sync=False)
            os.fsync(self._descriptor)
        except OSError as error:
            raise JournalError(f"{self.path}: {error.strerror}") from error
        finally:
            self._release()

    def _release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def replay(content: bytes) -> tuple[JournalState, int, bool, bool]:
    """Read a file's content: (state, length of the valid part, ends with CLOSED, at most one record is torn).

    Pure, so that every way to tear a file can be tried.
    """
    state = JournalState()
    position = len(MAGIC)
    closed = False
    while position + _HEADER.size <= len(content):
        kind, length, checksum = _HEADER.unpack_from(content, position)
        end = position + _HEADER.size + length
        payload = content[position + _HEADER.size : end]
        if end > len(content) or _checksum(kind, payload) != checksum:
            break
        _apply(state, kind, payload)
        closed = kind == _Kind.CLOSED
        position = end
    rest = len(content) - position
    one_record_torn = True
    if rest >= _HEADER.size:
        _, length, _ = _HEADER.unpack_from(content, position)
        # A bad record with more behind it is not a torn tail but damage, and what it cut off may have been sent.
        one_record_torn = rest <= _HEADER.size + length
    return state, position, closed, one_record_torn


def _apply(state: JournalState, kind: int, payload: bytes) -> None:
    if kind == _Kind.SESSION:
        state.session_id, state.acked = _SESSION.unpack(payload)
        # The messages of the session before were renumbered and are written again after this record.
        state.messages.clear()
    elif kind == _Kind.DEFINE:
        state.definitions.append(ingest_pb2.AliasDefinition.FromString(payload))
    elif kind == _Kind.MESSAGE:
        sequence, count = _MESSAGE.unpack_from(payload)
        state.messages[sequence] = (payload[_MESSAGE.size :], count)
    elif kind == _Kind.ACKED:
        (sequence,) = _NUMBER.unpack(payload)
        for number in range(state.acked + 1, sequence + 1):
            state.messages.pop(number, None)
        state.acked = max(state.acked, sequence)


def _record(kind: _Kind, payload: bytes) -> bytes:
    return _HEADER.pack(kind, len(payload), _checksum(kind, payload)) + payload


def _message_record(sequence: int, payload: bytes, count: int) -> bytes:
    return _record(_Kind.MESSAGE, _MESSAGE.pack(sequence, count) + payload)


def _checksum(kind: int, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(struct.pack(">BI", kind, len(payload))))


def _write_all(descriptor: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view = view[written:]
        offset += written


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
