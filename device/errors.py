"""Every error the device client raises, in one tree.

`retriable` says whether the same call may succeed later without a change by the caller. The client retries by
itself what it can; what reaches the caller with `retriable = False` needs a person or another argument.

How the end of a stream maps to an error (`stream_error`):

    status                                      error                     the client
    INVALID_ARGUMENT, FAILED_PRECONDITION,
    UNIMPLEMENTED                               ProtocolError             gives up
    PERMISSION_DENIED                           PermissionDeniedError     gives up
    UNAUTHENTICATED                             UnauthenticatedError      gives up
    ABORTED with STREAM_SUPERSEDED              SupersededError           waits long, or gives up, as set
    anything else                               StreamInterruptedError    reconnects with backoff
"""

from collections.abc import Mapping
from typing import ClassVar

import grpc


class DeviceError(Exception):
    """Root of the tree."""

    retriable: ClassVar[bool] = False


class ClientClosedError(DeviceError):
    """The client is not open: used before `open`, or after `close`."""


class BufferFullError(DeviceError):
    """The buffer of unacked messages has no room now; acks make room."""

    retriable: ClassVar[bool] = True


class MessageTooLargeError(DeviceError):
    """One message is larger than the buffer, or than the server takes; it can never be sent."""


class JournalError(DeviceError):
    """The file that persists the buffer could not be read or written."""


class JournalInUseError(JournalError):
    """Another process has the file open. Two clients on one session would use each other's numbers."""


class UndefinedAttributeError(DeviceError):
    """A reading names an attribute that was not declared with `define`."""


class AttributeRedefinedError(DeviceError):
    """An attribute or alias was declared before with another name, type or unit."""


class ValueMismatchError(DeviceError):
    """A value is not of the type its attribute was declared with, or cannot be carried by it."""


class FlushTimeoutError(DeviceError):
    """Not everything was acked in time. What is left stays buffered and goes on being sent."""

    retriable: ClassVar[bool] = True

    def __init__(self, messages_left: int) -> None:
        super().__init__(f"{messages_left} messages are not acked yet")
        self.messages_left = messages_left


class StreamError(DeviceError):
    """A stream ended with a status. `reason` is google.rpc.ErrorInfo.reason, empty when there was none."""

    def __init__(
        self, code: grpc.StatusCode, reason: str, text: str, metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(f"{code.name}{f' ({reason})' if reason else ''}: {text}")
        self.code = code
        self.reason = reason
        self.text = text
        self.metadata = dict(metadata or {})


class StreamInterruptedError(StreamError):
    """The stream broke for a reason that passes; the client comes back by itself."""

    retriable: ClassVar[bool] = True


class SupersededError(StreamError):
    """Another stream for this device took over: a second copy of the client is running somewhere."""

    retriable: ClassVar[bool] = True


class ProtocolError(StreamError):
    """Client and server do not understand each other: a bug, or the wrong server."""


class PermissionDeniedError(StreamError):
    """The identity may not send for this device, or the device is not registered."""


class UnauthenticatedError(StreamError):
    """The server does not accept the client's identity."""


_PERMANENT: dict[grpc.StatusCode, type[StreamError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: ProtocolError,
    grpc.StatusCode.FAILED_PRECONDITION: ProtocolError,
    grpc.StatusCode.UNIMPLEMENTED: ProtocolError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
}

SUPERSEDED_REASON = "STREAM_SUPERSEDED"


def stream_error(
    code: grpc.StatusCode, reason: str, text: str, metadata: Mapping[str, str] | None = None
) -> StreamError:
    """The error for the end of a stream, by status and reason; never by text."""
    if code is grpc.StatusCode.ABORTED and reason == SUPERSEDED_REASON:
        return SupersededError(code, reason, text, metadata)
    return _PERMANENT.get(code, StreamInterruptedError)(code, reason, text, metadata)
