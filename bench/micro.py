"""Parts of the gateway's work on one flush, alone: nanoseconds per reading."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from uuid import uuid4

from atlasco.telemetry.v1 import ingest_pb2

from bench.workload import TENANT, Messages, Shape, all_attributes, device_name
from gateway.aliases import AliasTable
from gateway.decode import Received, count_readings, decode
from storage.arrange import all_new, arrange
from storage.binary import copy_rows
from storage.model import Attribute, Names, Outcome, ValueType
from storage.outbox import encode_outbox
from storage.registry import Tenant

_READINGS_PER_MESSAGE = 100
# As a new database has them: a flush is one lane's, which holds the devices of every fourth bucket.
_BUCKETS, _LANES = 16, 4
_DAY_US = 86_400_000_000
_STORED = {"DOUBLE": "double", "INT64": "bigint", "BOOL": "boolean", "STRING": "text"}


@dataclass(frozen=True, slots=True)
class Timing:
    """One part."""

    measure: str
    ns_per_reading: float
    readings: int


def measure_parts(messages: int, repeats: int) -> list[Timing]:
    """Each part on a flush of so many messages of as many devices, the median of some repeats."""
    now_us = time.time_ns() // 1000
    shape = Shape(_READINGS_PER_MESSAGE)
    packed = [next(Messages(shape, index, now_us - 1_000_000).packed()) for index in range(messages)]
    readings = sum(one.count for one in packed)
    attributes = {
        number: Attribute(number, attribute.name, ValueType(_STORED[attribute.type.name]), True)
        for number, attribute in enumerate(all_attributes(), 1)
    }
    tenant = Tenant(1, TENANT, 7 * _DAY_US, _DAY_US, False)
    table = AliasTable().with_aliases({n: (a.name, a.type) for n, a in attributes.items()}, attributes, {})
    entities = {index * _LANES: device_name(index) for index in range(messages)}
    names = Names({1: TENANT}, entities, attributes)

    def parse() -> list[ingest_pb2.Readings]:
        parsed = [ingest_pb2.Readings.FromString(one.payload) for one in packed]
        assert sum(count_readings(each) for each in parsed) == readings
        return parsed

    received = [
        Received(tenant, entity, name, table, each, len(one.payload), one.count)
        for (entity, name), each, one in zip(entities.items(), parse(), packed, strict=True)
    ]
    decoded = decode(received, now_us=now_us, max_string_bytes=4096)
    outcomes = [Outcome.COMMITTED] * messages
    arranged = arrange(decoded.readings, outcomes, buckets=_BUCKETS).readings
    if sum(map(len, arranged.values())) != readings:
        raise AssertionError("the flush lost readings")
    changes = {value_type: all_new(columns) for value_type, columns in arranged.items()}
    parts: dict[str, Callable[[], object]] = {
        "parse": parse,
        "decode": lambda: decode(received, now_us=now_us, max_string_bytes=4096),
        "arrange": lambda: arrange(decoded.readings, outcomes, buckets=_BUCKETS),
        "copy_rows": lambda: [copy_rows(value_type, columns) for value_type, columns in arranged.items()],
        "encode_outbox": lambda: encode_outbox(uuid4(), changes, names, buckets=_BUCKETS),
    }
    return [Timing(name, _median_ns(part, repeats) / readings, readings) for name, part in parts.items()]


def _median_ns(part: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter_ns()
        part()
        times.append(time.perf_counter_ns() - started)
    # The first one warms up.
    return median(times[1:])
