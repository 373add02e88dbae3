"""One decoded change record: readings as columns, by value type."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from numpy.typing import NDArray

from storage.model import ValueType


class BatchKey(NamedTuple):
    """A change record's identity, however often it is delivered.

    All five count: one write transaction may touch several tenants with devices in one bucket, write and delete in it,
    and be split.
    """

    batch_id: bytes
    tenant_id: int
    bucket: int
    deletes: bool
    part: int


@dataclass(frozen=True, slots=True)
class ChangedColumns:
    """Changes of one value type; all columns have the same length.

    `ts_us` is in microseconds. `revision` is None when all are 0. `value` is float64, int64 or bool, or an Arrow
    string array; None for deletions.
    """

    entity: NDArray[np.int64]
    attribute: NDArray[np.int32]
    ts_us: NDArray[np.int64]
    value: NDArray[Any] | pa.Array | None
    revision: NDArray[np.int32] | None

    def __len__(self) -> int:
        return len(self.ts_us)

    def take(self, mask: NDArray[np.bool_]) -> "ChangedColumns":
        """The changes that a mask selects."""
        value = self.value
        if isinstance(value, pa.Array):
            value = value.filter(pa.array(mask))
        elif value is not None:
            value = value[mask]
        revision = None if self.revision is None else self.revision[mask]
        return ChangedColumns(self.entity[mask], self.attribute[mask], self.ts_us[mask], value, revision)


@dataclass(frozen=True, slots=True)
class ChangeSet:
    """What one change record says. Names map ids to names; an attribute's also to its value type."""

    batch_id: bytes
    tenant_id: int
    tenant: str
    bucket: int
    deletes: bool
    part: int
    columns: Mapping[ValueType, ChangedColumns]
    entities: Mapping[int, str]
    attributes: Mapping[int, tuple[str, ValueType]]
    # Devices that are gone themselves; `entities` does not name them.
    gone: frozenset[int] = frozenset()

    @property
    def key(self) -> BatchKey:
        """The identity of the record."""
        return BatchKey(self.batch_id, self.tenant_id, self.bucket, self.deletes, self.part)

    @property
    def rows(self) -> int:
        """Number of changes."""
        return sum(len(part) for part in self.columns.values())
