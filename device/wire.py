"""The few bytes the client frames by hand, and how a stream's end is read.

A buffered message is kept as its serialized `Readings`, because that part never changes, while the sequence
number around it does when a new session renumbers. Putting the number around the bytes is two length prefixes:

    StreamTelemetryRequest { data (3) : DataMessage { sequence (1) : varint, readings (2) : bytes } }
"""

from typing import cast

import grpc
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from device.errors import StreamError, stream_error

# Two tags, two lengths and a sequence number of ten bytes: what a frame adds at most to its readings.
FRAME_OVERHEAD = 24

_TAG_DATA = b"\x1a"
_TAG_SEQUENCE = b"\x08"
_TAG_READINGS = b"\x12"
_STATUS_DETAILS = "grpc-status-details-bin"


def varint(number: int) -> bytes:
    """Protobuf's base-128 encoding of a number that is not negative."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def data_frame(sequence: int, readings: bytes) -> bytes:
    """A serialized StreamTelemetryRequest that carries `readings` (serialized) under `sequence`."""
    head = _TAG_SEQUENCE + varint(sequence) + _TAG_READINGS + varint(len(readings))
    return b"".join((_TAG_DATA, varint(len(head) + len(readings)), head, readings))


def error_from_rpc(rpc_error: grpc.aio.AioRpcError) -> StreamError:
    """The typed error for a failed RPC, with the ErrorInfo from its trailing metadata if there is one."""
    reason, metadata = "", {}
    for key, value in rpc_error.trailing_metadata() or ():
        if key == _STATUS_DETAILS:
            for detail in status_pb2.Status.FromString(cast(bytes, value)).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Is(info.DESCRIPTOR) and detail.Unpack(info):
                    reason, metadata = info.reason, dict(info.metadata)
    return stream_error(rpc_error.code(), reason, rpc_error.details() or "", metadata)
