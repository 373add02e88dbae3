"""The outbox: what each transaction changed, as change batches framed for the relay."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from uuid import UUID

import numpy as np
from atlasco.telemetry.v1 import change_pb2, common_pb2
from numpy.typing import NDArray

from storage.database import Pool
from storage.errors import translated
from storage.model import Changes, Int64s, Names, ValueType
from storage.statements import statements

WIRE_TYPES: Mapping[ValueType, common_pb2.AttributeType.ValueType] = {
    ValueType.DOUBLE: common_pb2.ATTRIBUTE_TYPE_DOUBLE,
    ValueType.BIGINT: common_pb2.ATTRIBUTE_TYPE_INT64,
    ValueType.BOOLEAN: common_pb2.ATTRIBUTE_TYPE_BOOL,
    ValueType.TEXT: common_pb2.ATTRIBUTE_TYPE_STRING,
}


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """One row of the outbox; times in microseconds since 1970."""

    batch_id: UUID
    changes: int
    # The tenants of the batch and, for each one, the span of reading time that it touches.
    tenants: list[int]
    min_us: Int64s
    max_us: Int64s
    payload: bytes


def encode_outbox(
    batch_id: UUID, changes: Mapping[ValueType, Changes], names: Names, *, buckets: int
) -> OutboxRow | None:
    """The outbox row for what one transaction changed; None when it changed nothing.

    The changes of each type are sorted by tenant and bucket first.
    """
    changes = {value_type: part for value_type, part in changes.items() if len(part)}
    if not changes:
        return None
    pieces: dict[tuple[int, int], dict[ValueType, Changes]] = {}
    for value_type, part in changes.items():
        for key, piece in _split(part, buckets):
            pieces.setdefault(key, {})[value_type] = piece
    payload = change_pb2.OutboxPayload()
    spans: dict[int, list[int]] = {}
    for (tenant, bucket), parts in sorted(pieces.items()):
        batch = _change_batch(batch_id, tenant, bucket, parts, names)
        count = sum(len(part) for part in parts.values())
        payload.frames.add(tenant_id=tenant, bucket=bucket, changes=count, change_batch=batch.SerializeToString())
        last = max(int(part.time_us.max()) for part in parts.values())
        low, high = spans.setdefault(tenant, [batch.base_time_us, last])
        spans[tenant] = [min(low, batch.base_time_us), max(high, last)]
    return OutboxRow(
        batch_id=batch_id,
        changes=sum(len(part) for part in changes.values()),
        tenants=list(spans),
        min_us=np.array([low for low, _ in spans.values()], np.int64),
        max_us=np.array([high for _, high in spans.values()], np.int64),
        payload=payload.SerializeToString(),
    )


async def ensure_outbox(pool: Pool) -> None:
    """Make the outbox partitions of the next hours, as far as they are missing.

    Raises:
        StorageError: the database did not do it.
    """
    with translated():
        async with pool.connection() as connection:
            await connection.execute(statements("ingest.sql")["ensure_outbox"])


def _split(part: Changes, buckets: int) -> list[tuple[tuple[int, int], Changes]]:
    bucket = part.entity % buckets
    ends = np.flatnonzero((np.diff(part.tenant) != 0) | (np.diff(bucket) != 0)) + 1
    bounds: list[int] = [0, *ends.tolist(), len(part)]
    return [
        ((int(part.tenant[start]), int(bucket[start])), part.take(slice(start, stop)))
        for start, stop in pairwise(bounds)
    ]


def _change_batch(
    batch_id: UUID, tenant: int, bucket: int, parts: Mapping[ValueType, Changes], names: Names
) -> change_pb2.ChangeBatch:
    base = min(int(part.time_us.min()) for part in parts.values())
    batch = change_pb2.ChangeBatch(
        batch_id=batch_id.bytes,
        tenant_id=tenant,
        tenant=names.tenants[tenant],
        bucket=bucket,
        op=change_pb2.CHANGE_OP_UPSERT,
        base_time_us=base,
    )
    entities = _distinct([part.entity for part in parts.values()])
    attributes = _distinct([part.attribute for part in parts.values()])
    for entity in entities.tolist():
        batch.entities.add(entity_id=entity, external_id=names.entities[entity])
    for attribute_id in attributes.tolist():
        attribute = names.attributes[attribute_id]
        batch.attributes.add(attribute_id=attribute_id, name=attribute.name, type=WIRE_TYPES[attribute.type])
    columns: Mapping[ValueType, Any] = {
        ValueType.DOUBLE: batch.doubles,
        ValueType.BIGINT: batch.int64s,
        ValueType.BOOLEAN: batch.bools,
        ValueType.TEXT: batch.strings,
    }
    for value_type, part in parts.items():
        column = columns[value_type]
        column.entities.extend(np.searchsorted(entities, part.entity).tolist())
        column.attributes.extend(np.searchsorted(attributes, part.attribute).tolist())
        column.time_deltas_us.extend((part.time_us - base).tolist())
        if value_type is ValueType.TEXT:
            column.values.extend(text.decode() for text in part.value)
        else:
            column.values.extend(part.value.tolist())
        if part.revision.any():
            column.revisions.extend(part.revision.tolist())
    return batch


def _distinct(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    return np.unique(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))
