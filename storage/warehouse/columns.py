"""The kinds of rows a warehouse holds, and their columns, the same in Parquet, in Redshift and in DuckDB.

Each value type has two tables. `base_<type>` holds readings: first values, appended as they come, and what compaction
made of them. `delta_<type>` holds what has to be resolved against the base: corrections, and deletions. Three more
tables hold names, and one the devices that are gone, whose names must not come back. Timestamps are UTC without a zone,
in microseconds: the one form that Parquet, Redshift's COPY and DuckDB read alike.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import pyarrow as pa  # type: ignore[import-untyped]

from storage.model import ValueType

TIMESTAMP: Final = pa.timestamp("us")

VALUE: Final[Mapping[ValueType, pa.DataType]] = MappingProxyType(
    {
        ValueType.DOUBLE: pa.float64(),
        ValueType.BIGINT: pa.int64(),
        ValueType.BOOLEAN: pa.bool_(),
        ValueType.TEXT: pa.string(),
    }
)

GONE: Final = "gone_entities"
"""The kind of the devices that were deleted. Kept for good: a batch of any age may be delivered again. Also the
relation of their ids, for the audit."""

KEY: Final = ("tenant_id", "entity_id", "attribute_id", "ts")
"""What identifies a reading."""


def base_kind(value_type: ValueType) -> str:
    """The kind of a type's readings."""
    return f"base_{value_type}"


def delta_kind(value_type: ValueType) -> str:
    """The kind of a type's corrections and deletions."""
    return f"delta_{value_type}"


def resolved_relation(value_type: ValueType) -> str:
    """The relation of all of a type's readings that are there, also of devices that are gone: for the audit."""
    return f"resolved_{value_type}"


def _readings(value_type: ValueType) -> list[pa.Field]:
    return [
        pa.field("tenant_id", pa.int32()),
        pa.field("entity_id", pa.int64()),
        pa.field("attribute_id", pa.int32()),
        pa.field("ts", TIMESTAMP),
        pa.field("value", VALUE[value_type]),
        pa.field("revision", pa.int32()),
    ]


def _schemas() -> dict[str, pa.Schema]:
    schemas = {}
    for value_type in ValueType:
        schemas[base_kind(value_type)] = pa.schema(_readings(value_type))
        schemas[delta_kind(value_type)] = pa.schema([*_readings(value_type), pa.field("deleted", pa.bool_())])
    schemas[GONE] = pa.schema([pa.field("tenant_id", pa.int32()), pa.field("entity_id", pa.int64())])
    schemas["entities"] = pa.schema(
        [pa.field("tenant_id", pa.int32()), pa.field("entity_id", pa.int64()), pa.field("external_id", pa.string())]
    )
    schemas["attributes"] = pa.schema(
        [
            pa.field("tenant_id", pa.int32()),
            pa.field("attribute_id", pa.int32()),
            pa.field("name", pa.string()),
            pa.field("type", pa.string()),
        ]
    )
    schemas["tenants"] = pa.schema([pa.field("tenant_id", pa.int32()), pa.field("name", pa.string())])
    return schemas


SCHEMAS: Final[Mapping[str, pa.Schema]] = MappingProxyType(_schemas())
"""Every kind's columns, in order: Redshift's COPY matches them by position. The kind of devices that are gone stands
before that of their names, and loads keep that order."""

NAME_KEYS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"entities": ("tenant_id", "entity_id"), "attributes": ("tenant_id", "attribute_id"), "tenants": ("tenant_id",)}
)
"""The kinds that hold names, and what identifies a row of each."""

UNIQUE_KEYS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType({GONE: ("tenant_id", "entity_id"), **NAME_KEYS})
"""The kinds without a time, of which every load repeats rows, and what identifies a row of each."""
