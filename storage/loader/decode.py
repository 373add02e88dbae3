"""From a record of the log to columns: pure, and the one place that judges whether a record can be read.

Nothing here loops over readings: a repeated field becomes an array in one call, and entities, attributes and
timestamps are looked up for a whole column at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from atlasco.telemetry.v1 import change_pb2, common_pb2
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from storage.model import ValueType
from storage.warehouse.batch import ChangedColumns, ChangeSet

CHANGES_SCHEMA: Final = b"atlasco.telemetry.v1.ChangeBatch/1"
WATERMARK_SCHEMA: Final = b"atlasco.telemetry.v1.Watermark/1"

_MAX_TS_US: Final = 2**62
"""Far beyond any calendar, and far enough from 2^63 that base + delta cannot overflow."""

_TYPES: Final[Mapping[int, ValueType]] = {
    common_pb2.ATTRIBUTE_TYPE_DOUBLE: ValueType.DOUBLE,
    common_pb2.ATTRIBUTE_TYPE_INT64: ValueType.BIGINT,
    common_pb2.ATTRIBUTE_TYPE_BOOL: ValueType.BOOLEAN,
    common_pb2.ATTRIBUTE_TYPE_STRING: ValueType.TEXT,
}
_FIELDS: Final = (
    ("doubles", ValueType.DOUBLE, np.float64),
    ("int64s", ValueType.BIGINT, np.int64),
    ("bools", ValueType.BOOLEAN, np.bool_),
    ("strings", ValueType.TEXT, None),
)

Headers: TypeAlias = Mapping[str, bytes]


class Undecodable(Exception):
    """A record cannot be read. `reason` is for people; the rest says what it may touch, None where unknown."""

    def __init__(
        self,
        reason: str,
        *,
        affects_readings: bool = True,
        tenant_id: int | None = None,
        bucket: int | None = None,
        min_ts_us: int | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.affects_readings = affects_readings
        self.tenant_id = tenant_id
        self.bucket = bucket
        self.min_ts_us = min_ts_us


@dataclass(frozen=True, slots=True)
class DecodedWatermark:
    """See Watermark in change.proto."""

    lane: int
    lanes: int
    partition: int
    partitions: int
    complete_through_us: int
    lease_epoch: int


@dataclass(frozen=True, slots=True)
class DecodedChanges:
    """A change set and the transaction that wrote it; None when the record does not say."""

    changes: ChangeSet
    xid: int | None


def headers_of(pairs: Any) -> dict[str, bytes]:
    """A record's headers (pairs, or None) by name; the last of a name counts."""
    return {
        name: value.encode() if isinstance(value, str) else value for name, value in pairs or () if value is not None
    }


def decode(headers: Headers, key: bytes | None, value: bytes | None) -> DecodedChanges | DecodedWatermark:
    """What a record says.

    Raises:
        Undecodable: it is not what change.proto describes.
    """
    kind = headers.get("kind")
    tenant_id, bucket = _of_key(key)
    if kind == b"watermark":
        return _decode_watermark(headers, value)
    if kind != b"changes":
        raise Undecodable(f"unknown kind {kind!r}", tenant_id=tenant_id, bucket=bucket)
    if headers.get("schema") != CHANGES_SCHEMA:
        raise Undecodable(f"unknown schema {headers.get('schema')!r}", tenant_id=tenant_id, bucket=bucket)
    if not value:
        raise Undecodable("empty value", tenant_id=tenant_id, bucket=bucket)
    message = change_pb2.ChangeBatch()
    try:
        message.ParseFromString(value)
    except DecodeError as error:
        raise Undecodable("not a ChangeBatch", tenant_id=tenant_id, bucket=bucket) from error
    try:
        changes = _decode_changes(message)
        xid = headers.get("xid")
        return DecodedChanges(changes, None if xid is None else _integer(xid))
    except ValueError as error:
        # What the message says of itself may be as wrong as the rest; the key is what it was routed by.
        raise Undecodable(
            str(error),
            tenant_id=tenant_id if tenant_id is not None else message.tenant_id,
            bucket=bucket if bucket is not None else message.bucket,
            min_ts_us=message.base_time_us,
        ) from error


def visible_xid(headers: Headers) -> int | None:
    """The transaction a record names, also when nothing else of it can be read."""
    try:
        return _integer(headers["xid"])
    except (KeyError, ValueError):
        return None


def _integer(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise ValueError(f"{text[:40]!r} is not a number")
    return int(text)


def _of_key(key: bytes | None) -> tuple[int | None, int | None]:
    """Tenant and bucket from "<tenant id>:<bucket>"; None for what is not that."""
    parts = (key or b"").split(b":")
    if len(parts) != 2 or not all(part.isdigit() and len(part) <= 10 for part in parts):
        return None, None
    return int(parts[0]), int(parts[1])


def _decode_watermark(headers: Headers, value: bytes | None) -> DecodedWatermark:
    if headers.get("schema") != WATERMARK_SCHEMA:
        raise Undecodable(f"unknown schema {headers.get('schema')!r}", affects_readings=False)
    message = change_pb2.Watermark()
    try:
        message.ParseFromString(value or b"")
    except DecodeError as error:
        raise Undecodable("not a Watermark", affects_readings=False) from error
    if message.lane >= message.lanes or message.partition >= message.partitions or message.complete_through_us <= 0:
        raise Undecodable("a watermark that contradicts itself", affects_readings=False)
    return DecodedWatermark(
        message.lane,
        message.lanes,
        message.partition,
        message.partitions,
        message.complete_through_us,
        message.lease_epoch,
    )


def _decode_changes(message: change_pb2.ChangeBatch) -> ChangeSet:
    if len(message.batch_id) != 16:
        raise ValueError(f"a batch id of {len(message.batch_id)} bytes")
    if message.op not in (change_pb2.CHANGE_OP_UPSERT, change_pb2.CHANGE_OP_DELETE):
        raise ValueError(f"unknown operation {message.op}")
    if not 0 < message.base_time_us + _MAX_TS_US < 2 * _MAX_TS_US:
        raise ValueError("a timestamp beyond all calendars")
    if message.tenant_id >= 2**31 or message.bucket >= 2**15 or message.part >= 2**31:
        raise ValueError("a tenant, bucket or part beyond its range")
    deletes = message.op == change_pb2.CHANGE_OP_DELETE
    entities = {entity.entity_id: entity.external_id for entity in message.entities if not entity.gone}
    gone = frozenset(entity.entity_id for entity in message.entities if entity.gone)
    if gone and not deletes:
        raise ValueError("readings of a device that is gone")
    attributes: dict[int, tuple[str, ValueType]] = {}
    for attribute in message.attributes:
        value_type = _TYPES.get(attribute.type)
        if value_type is None:
            raise ValueError(f"unknown attribute type {attribute.type}")
        attributes[attribute.attribute_id] = (attribute.name, value_type)
    entity_ids = np.array([entity.entity_id for entity in message.entities], np.int64)
    attribute_ids = np.array([attribute.attribute_id for attribute in message.attributes], np.int32)
    columns = {}
    for name, value_type, dtype in _FIELDS:
        if message.HasField(name):  # type: ignore[arg-type]
            part = getattr(message, name)
            if len(part.time_deltas_us):
                columns[value_type] = _decode_columns(
                    part, dtype, entity_ids, attribute_ids, message.base_time_us, deletes
                )
    return ChangeSet(
        batch_id=message.batch_id,
        tenant_id=message.tenant_id,
        tenant=message.tenant,
        bucket=message.bucket,
        deletes=deletes,
        part=message.part,
        columns=columns,
        entities=entities,
        attributes=attributes,
        gone=gone,
    )


def _decode_columns(
    part: Any,
    dtype: type[np.generic] | None,
    entity_ids: NDArray[np.int64],
    attribute_ids: NDArray[np.int32],
    base_us: int,
    deletes: bool,
) -> ChangedColumns:
    count = len(part.time_deltas_us)
    if len(part.entities) != count or len(part.attributes) != count or len(part.revisions) not in (0, count):
        raise ValueError("columns of unequal length")
    if len(part.values) != (0 if deletes else count):
        raise ValueError("values of another length than the columns")
    entity_at = np.array(part.entities, np.uint32)
    attribute_at = np.array(part.attributes, np.uint32)
    if entity_at.max() >= len(entity_ids) or attribute_at.max() >= len(attribute_ids):
        raise ValueError("a column refers to a device or an attribute that is not in the batch")
    deltas = np.array(part.time_deltas_us, np.uint64)
    if deltas.max() >= _MAX_TS_US:
        raise ValueError("a timestamp beyond all calendars")
    revision = None
    if len(part.revisions):
        revisions = np.array(part.revisions, np.uint32)
        if revisions.max() >= 2**31:
            raise ValueError("a revision beyond its range")
        revision = revisions.astype(np.int32)
    value: NDArray[Any] | pa.Array | None = None
    if not deletes:
        value = pa.array(list(part.values), pa.string()) if dtype is None else np.array(part.values, dtype)
    return ChangedColumns(
        entity_ids[entity_at], attribute_ids[attribute_at], base_us + deltas.astype(np.int64), value, revision
    )
