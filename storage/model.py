"""What is written: readings as columns, the messages they came in, and what became of each message.

The words mean one thing everywhere. A reading is (tenant, device, attribute, timestamp, value). It is *received*
when decoded, *committed* when durable in PostgreSQL, *acked* when the device was told so, *published* when Kafka
has it, *loaded* when the warehouse has it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from typing import Any, Self
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Readings hash to buckets, buckets to lanes; both numbers are fixed for the life of a database.


def bucket_of(entity_id: int, buckets: int) -> int:
    """The device bucket, 0 to buckets - 1, that a device's change records are keyed by."""
    return entity_id % buckets


def lane_of(entity_id: int, buckets: int, lanes: int) -> int:
    """The write lane, 0 to lanes - 1, of a device.

    A function of the bucket, so that one lane's batch holds few buckets and makes few, large change records.
    """
    return bucket_of(entity_id, buckets) % lanes


class ValueType(StrEnum):
    """The type of an attribute, by its name in the database."""

    DOUBLE = "double"
    BIGINT = "bigint"
    BOOLEAN = "boolean"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class Attribute:
    """A registered attribute."""

    attribute_id: int
    name: str
    type: ValueType
    keeps_latest: bool


@dataclass(frozen=True, slots=True)
class Columns:
    """Readings of one value type; all arrays have the same length, one element per reading.

    `value` is float64, int64, bool, or, for text, objects of type `bytes` holding UTF-8. `time_us` is microseconds
    since 1970 UTC. `source` is the position in the batch's `messages` and `index` the reading's index within that
    message.
    """

    tenant: Int32s
    entity: Int64s
    attribute: Int32s
    time_us: Int64s
    value: NDArray[Any]
    source: Int32s
    index: Int32s
    # Stored, but no candidate for the latest value: back-filled, or of an attribute that keeps none.
    historical: Bools

    def __len__(self) -> int:
        return len(self.time_us)

    def take(self, selector: NDArray[Any]) -> Self:
        """The readings that a boolean mask or an array of positions selects, in that order."""
        return replace(
            self,
            tenant=self.tenant[selector],
            entity=self.entity[selector],
            attribute=self.attribute[selector],
            time_us=self.time_us[selector],
            value=self.value[selector],
            source=self.source[selector],
            index=self.index[selector],
            historical=self.historical[selector],
        )


@dataclass(frozen=True, slots=True)
class Changes:
    """What a transaction changed, for readings of one type; parallel arrays as in `Columns`."""

    tenant: Int32s
    entity: Int64s
    attribute: Int32s
    time_us: Int64s
    value: NDArray[Any]
    # 0 for a first value, then one more for each correction.
    revision: Int32s

    def __len__(self) -> int:
        return len(self.time_us)

    def take(self, selector: NDArray[Any] | slice) -> Self:
        """The changes that a mask, positions or a slice select."""
        return replace(
            self,
            tenant=self.tenant[selector],
            entity=self.entity[selector],
            attribute=self.attribute[selector],
            time_us=self.time_us[selector],
            value=self.value[selector],
            revision=self.revision[selector],
        )


class Reason(IntEnum):
    """Why a reading was not stored; numbers as in the protocol's RejectionReason, where each is explained."""

    UNKNOWN_ALIAS = 1
    ALIAS_REDEFINED = 2
    ALIAS_OUT_OF_RANGE = 3
    DICTIONARY_CONFLICT = 4
    ATTRIBUTE_NAME_INVALID = 5
    ATTRIBUTE_DEFINITION_INVALID = 6
    ATTRIBUTE_UNKNOWN = 7
    ATTRIBUTE_QUOTA_EXCEEDED = 8
    TYPE_MISMATCH = 9
    VALUE_NOT_REPRESENTABLE = 10
    STRING_TOO_LONG = 11
    STRING_INVALID = 12
    TIMESTAMP_INVALID = 13
    TIMESTAMP_TOO_OLD = 14
    TIMESTAMP_TOO_NEW = 15
    COLUMN_LENGTH_MISMATCH = 16
    SUPERSEDED_IN_MESSAGE = 17
    MESSAGE_TOO_LARGE = 18
    TOO_MANY_READINGS = 19
    STORAGE_REFUSED = 20


@dataclass(frozen=True, slots=True)
class RejectedReading:
    """One reading, or with `index` None one whole message, that will not be stored."""

    index: int | None
    reason: Reason
    text: str
    quarantined: bool = False


@dataclass(slots=True)
class BatchMessage:
    """A numbered message of a device stream, or one device's part of a unary write (then `epoch` is None)."""

    tenant_id: int
    entity_id: int
    session_id: UUID | None
    epoch: int | None
    sequence: int
    rejections: list[RejectedReading] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Names:
    """The names of the ids in a batch, for the change records."""

    # tenant id -> name
    tenants: Mapping[int, str]
    # entity id -> the device's own name
    entities: Mapping[int, str]
    # attribute id -> attribute
    attributes: Mapping[int, Attribute]


@dataclass(slots=True)
class WriteBatch:
    """What one transaction writes. Messages of one stream are in the order of their sequence."""

    lane: int
    messages: list[BatchMessage]
    readings: dict[ValueType, Columns]
    # Readings set aside, by type; they take no part in anything but the quarantine table.
    quarantined: dict[ValueType, Columns]
    names: Names


class Outcome(StrEnum):
    """What became of a message."""

    # Durable: its readings are stored, save the rejected ones.
    COMMITTED = "committed"
    # The session had already committed this sequence; nothing was written.
    REPEATED = "repeated"
    # A newer stream of the device exists; nothing was written.
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class Written:
    """The result of a committed transaction."""

    # One per message of the batch, in order.
    outcomes: list[Outcome]
    # The writing transaction's id; a snapshot whose xmin is above it sees the write. None: nothing was written.
    xid: int | None
    # Readings written to history, by how.
    copied: int
    merged: int
    # Changes in the outbox row, corrections (revision > 0) among them.
    changes: int
    corrected: Mapping[ValueType, int]

    @property
    def corrections(self) -> int:
        """Changes that replaced another value."""
        return sum(self.corrected.values())
