"""Answers of storage as messages of query.proto."""

from collections.abc import Iterable, Sequence

import numpy as np
from atlasco.telemetry.v1 import common_pb2, query_pb2

from storage.filter.search import FoundDevice
from storage.model import ValueType
from storage.reads.model import AttributeEntry, Entity, Reading, Scalar, SeriesPart

TYPES = {
    ValueType.DOUBLE: common_pb2.ATTRIBUTE_TYPE_DOUBLE,
    ValueType.BIGINT: common_pb2.ATTRIBUTE_TYPE_INT64,
    ValueType.BOOLEAN: common_pb2.ATTRIBUTE_TYPE_BOOL,
    ValueType.TEXT: common_pb2.ATTRIBUTE_TYPE_STRING,
}
"""Value types on the wire."""


def entity_latest(entity: str, readings: Iterable[Reading], as_of_us: int) -> query_pb2.EntityLatest:
    """The latest values of one device."""
    values = [
        query_pb2.LatestValue(
            attribute=reading.attribute,
            time_us=reading.time_us,
            value=value_message(reading.value),
            age_us=as_of_us - reading.time_us,
        )
        for reading in readings
    ]
    return query_pb2.EntityLatest(entity=entity, values=values)


def value_message(value: Scalar) -> common_pb2.Value:
    """One typed value."""
    match value:
        case bool():  # before int, which a bool is too
            return common_pb2.Value(bool_value=value)
        case int():
            return common_pb2.Value(int64_value=value)
        case float():
            return common_pb2.Value(double_value=value)
        case str():
            return common_pb2.Value(string_value=value)


def series_message(part: SeriesPart) -> query_pb2.Series:
    """A run of readings in packed columns."""
    series = query_pb2.Series(entity=part.entity, attribute=part.attribute, type=TYPES[part.type])
    # tolist makes Python numbers in one go; extend on numpy's own scalars takes several times as long.
    series.times_us.extend(part.times_us.tolist())
    match part.type:
        case ValueType.DOUBLE:
            series.double_values.extend(part.values.tolist())
        case ValueType.BIGINT:
            series.int64_values.extend(part.values.tolist())
        case ValueType.BOOLEAN:
            series.bool_values.extend(part.values.tolist())
        case ValueType.TEXT:
            series.string_values.extend(part.values.tolist())
    if np.any(part.revisions):
        series.revisions.extend(part.revisions.tolist())
    return series


def found_messages(devices: Iterable[FoundDevice], as_of_us: int) -> list[query_pb2.FoundEntity]:
    """Devices that meet a filter, with the values asked for."""
    return [
        query_pb2.FoundEntity(
            entity=entity_messages([device.entity])[0],
            values=entity_latest(device.entity.name, device.values, as_of_us).values,
        )
        for device in devices
    ]


def entity_messages(entities: Sequence[Entity]) -> list[query_pb2.Entity]:
    """Devices."""
    return [
        query_pb2.Entity(name=e.name, entity_type=e.entity_type, labels=e.labels, create_time_us=e.create_time_us)
        for e in entities
    ]


def attribute_messages(attributes: Sequence[AttributeEntry]) -> list[query_pb2.Attribute]:
    """Attributes."""
    return [
        query_pb2.Attribute(
            name=a.name,
            type=TYPES[a.type],
            unit=a.unit,
            keeps_latest=a.keeps_latest,
            create_time_us=a.create_time_us,
        )
        for a in attributes
    ]
