"""What the outbox makes stale: minutes of rollups and devices of projections. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias
from uuid import UUID

import numpy as np
from atlasco.telemetry.v1 import change_pb2
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from storage.errors import StorageDefect
from storage.model import Int64s, ValueType
from storage.relay.cursor import Batch
from storage.times import HOUR_US, MINUTE_US

Keys: TypeAlias = NDArray[np.int64]
"""Rows of (entity id, attribute id, bucket in microseconds), distinct and sorted."""

_COLUMNS: Final = ("doubles", "int64s", "bools", "strings")
_ROLLED: Final = {"doubles": ValueType.DOUBLE, "int64s": ValueType.BIGINT}


@dataclass(frozen=True, slots=True)
class ProjectionTable:
    """A projection's table: columns by attribute id, ascending."""

    projection_id: int
    tenant_id: int
    # Empty: every type.
    entity_type: str
    columns: Mapping[int, ValueType]


@dataclass(frozen=True, slots=True)
class Declarations:
    """What is kept: rolled attributes by tenant, and projections."""

    rolled: Mapping[int, frozenset[int]] = field(default_factory=dict)
    projections: Sequence[ProjectionTable] = ()


class BatchUnreadable(StorageDefect):
    """A row of the outbox is not what a gateway writes."""


@dataclass(slots=True)
class Dirty:
    """What has to be computed again."""

    # (tenant, type of the attribute) -> minutes
    minutes: dict[tuple[int, ValueType], Keys] = field(default_factory=dict)
    # projection id -> entity ids
    devices: dict[int, Int64s] = field(default_factory=dict)


def dirty(batches: Iterable[Batch], declarations: Declarations) -> Dirty:
    """What these batches of the outbox make stale. Raises BatchUnreadable."""
    minutes: dict[tuple[int, ValueType], list[Keys]] = {}
    devices: dict[int, list[Int64s]] = {}
    tenants = declarations.rolled.keys() | {p.tenant_id for p in declarations.projections}
    for batch in batches:
        try:
            for frame in change_pb2.OutboxPayload.FromString(batch.payload).frames:
                # Most tenants declare nothing: their part is not even parsed.
                if frame.tenant_id in tenants:
                    _of_batch(change_pb2.ChangeBatch.FromString(frame.change_batch), declarations, minutes, devices)
        except DecodeError as error:
            raise BatchUnreadable(f"batch {UUID(bytes=batch.batch_id)} of the outbox: {error}") from error
    return Dirty(
        {key: np.unique(np.concatenate(parts), axis=0) for key, parts in minutes.items()},
        {key: np.unique(np.concatenate(parts)) for key, parts in devices.items()},
    )


def hours_of(minutes: Keys) -> Keys:
    """The hours that minutes lie in."""
    hours = minutes.copy()
    hours[:, 2] -= hours[:, 2] % HOUR_US
    return np.unique(hours, axis=0)


def _of_batch(
    batch: change_pb2.ChangeBatch,
    declarations: Declarations,
    minutes: dict[tuple[int, ValueType], list[Keys]],
    devices: dict[int, list[Int64s]],
) -> None:
    tenant = batch.tenant_id
    entities = np.array([entity.entity_id for entity in batch.entities], np.int64)
    attributes = np.array([attribute.attribute_id for attribute in batch.attributes], np.int64)
    rolled = declarations.rolled.get(tenant, frozenset())
    is_rolled = np.isin(attributes, list(rolled))
    projections = [p for p in declarations.projections if p.tenant_id == tenant]
    projected = {p.projection_id: np.isin(attributes, list(p.columns)) for p in projections}
    for name in _COLUMNS:
        column: Any = getattr(batch, name)
        if not len(column.entities):
            continue
        entity = np.array(column.entities, np.int64)
        attribute = np.array(column.attributes, np.int64)
        for projection_id, wanted in projected.items():
            touched = entities[np.unique(entity[wanted[attribute]])]
            if touched.size:
                devices.setdefault(projection_id, []).append(touched)
        value_type = _ROLLED.get(name)
        chosen = is_rolled[attribute]
        if value_type is None or not chosen.any():
            continue
        times = np.array(column.time_deltas_us, np.uint64).astype(np.int64)[chosen] + batch.base_time_us
        keys = np.stack([entities[entity[chosen]], attributes[attribute[chosen]], times - times % MINUTE_US], axis=1)
        # Distinct at once: a batch has many readings of a minute, and a page many batches.
        minutes.setdefault((tenant, value_type), []).append(np.unique(keys, axis=0))
