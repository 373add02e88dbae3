"""The device client: streams readings to a gateway and remembers them until they are durable.

Read `session` for what is decided, `buffer` for what is remembered, `stream` for how it is carried out, `account` for
what came of it; the protocol itself is specified in protos/atlasco/telemetry/v1/ingest.proto.
"""

from device.buffer import Buffer
from device.client import DeviceClient
from device.connection import ChannelPool, DevelopmentIdentity, TlsFiles
from device.dictionary import Attribute, ValueType
from device.errors import DeviceError
from device.journal import Fsync
from device.outcomes import Rejected, Statistics
from device.packing import Column, Packed, Reading
from device.settings import ClientSettings

__all__ = [
    "Attribute",
    "Buffer",
    "ChannelPool",
    "ClientSettings",
    "Column",
    "DevelopmentIdentity",
    "DeviceClient",
    "DeviceError",
    "Fsync",
    "Packed",
    "Reading",
    "Rejected",
    "Statistics",
    "TlsFiles",
    "ValueType",
]
