"""A fleet in a real database, random but known by heart: what tests of search and of aggregates ask about."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from storage.filter.evaluate import Device
from storage.model import Attribute, ValueType

MINUTE_US = 60_000_000
HOUR_US = 60 * MINUTE_US
TENANT = "acme"
TEXTS = (
    "",
    "active",
    "idle",
    "2.0.1",
    "2.1",
    "10.2",
    "käse",
    "a*b",
    "x" * 80,
    "x" * 80 + "y",
    "\U0010ffff",
    "O'Neil\\",
)
DOUBLES = (0.0, -0.0, 80.0, 80.5, -3.25, 1e300, math.nan, math.inf, -math.inf)
INTS = (0, 1, -1, 80, 2**63 - 1, -(2**63), 2**53 + 1)


@dataclass
class Fleet:
    """What is stored. Times in microseconds."""

    tenant_id: int
    now_us: int
    attributes: dict[str, Attribute]
    # By name.
    entity_ids: dict[str, int] = field(default_factory=dict, repr=False)
    devices: dict[str, Device] = field(default_factory=dict, repr=False)
    # (device, attribute) -> time -> value
    readings: dict[tuple[str, str], dict[int, Any]] = field(default_factory=dict, repr=False)


def moment(time_us: int) -> str:
    return str(np.datetime64(time_us, "us")) + "+00"


def found(connection: psycopg.Connection[Any], query: str, *parameters: object) -> Any:
    row = connection.execute(query.encode(), parameters).fetchone()
    assert row is not None
    return row[0]


def make_fleet(connection: psycopg.Connection[Any], *, devices: int, seed: int = 5) -> Fleet:
    """A tenant with attributes of every type, devices of two types with labels, and latest values of most."""
    random = np.random.default_rng(seed)
    tenant_id = found(connection, "SELECT register_tenant(%s)", TENANT)
    other = found(connection, "SELECT register_tenant('rival')")
    connection.execute("UPDATE tenants SET retention = '40 days', window_past = '35 days', window_future = '1 hour'")
    # Not every day between: partitions cost most of a test's time.
    for first, last in ((21, 19), (6, -1)):
        connection.execute(
            "SELECT ensure_history(%s, now() - make_interval(days => %s), now() - make_interval(days => %s))",
            [tenant_id, first, last],
        )
    connection.execute("SELECT ensure_outbox(now(), now() + interval '2 hours')")
    fleet = Fleet(tenant_id, found(connection, "SELECT (extract(epoch FROM now()) * 1000000)::bigint"), {})
    for name, kind in (
        ("temperature", "double"), ("pressure", "double"), ("count", "bigint"), ("on", "boolean"), ("status", "text"),
        ("odd name", "text"), ("history only", "double"),
    ):  # fmt: skip
        attribute_id = found(
            connection,
            "INSERT INTO attributes (tenant_id, name, type, keeps_latest) VALUES (%s, %s, %s, %s) "
            "RETURNING attribute_id",
            tenant_id, name, kind, name != "history only",
        )  # fmt: skip
        fleet.attributes[name] = Attribute(attribute_id, name, ValueType(kind), name != "history only")
    connection.execute("SELECT register_entity(%s, 'theirs', '', '{}')", [other])
    for number in range(devices):
        name = f"device-{number:04}" if number % 7 else f"gerät {number}"
        kind = ("pump", "fan", "")[number % 3]
        labels = {"site": f"s{number % 4}"} if number % 5 else {"site": "s0", "line number": "x*y"}
        entity_id = found(connection, "SELECT register_entity(%s, %s, %s, %s)", tenant_id, name, kind, Jsonb(labels))
        values: dict[int, Any] = {}
        for attribute in fleet.attributes.values():
            if attribute.keeps_latest and random.random() < 0.8:
                value = random_value(random, attribute.type)
                values[attribute.attribute_id] = value
                connection.execute(
                    sql.SQL(
                        "INSERT INTO latest_values (tenant_id, entity_id, attribute_id, ts, {}) VALUES (%s,%s,%s,%s,%s)"
                    ).format(sql.Identifier(f"{attribute.type}_value")),
                    [tenant_id, entity_id, attribute.attribute_id, moment(fleet.now_us - number * 1000), value],
                )
        fleet.entity_ids[name] = entity_id
        fleet.devices[name] = Device(name, kind, labels, values)
    return fleet


def random_value(random: np.random.Generator, kind: ValueType) -> Any:
    match kind:
        case ValueType.DOUBLE:
            return (
                float(DOUBLES[random.integers(len(DOUBLES))]) if random.random() < 0.5 else float(random.normal(80, 9))
            )
        case ValueType.BIGINT:
            return int(INTS[random.integers(len(INTS))]) if random.random() < 0.5 else int(random.integers(0, 100))
        case ValueType.BOOLEAN:
            return bool(random.random() < 0.5)
        case _:
            return TEXTS[random.integers(len(TEXTS))]


def store_readings(
    connection: psycopg.Connection[Any], fleet: Fleet, device: str, attribute: str, readings: Mapping[int, Any]
) -> None:
    """Write history the way ingest leaves it; a reading that is there gets the value and the next revision."""
    known = fleet.attributes[attribute]
    statement = sql.SQL(
        "INSERT INTO {0} AS h (tenant_id, entity_id, attribute_id, ts, value) VALUES (%s, %s, %s, %s, %s) "
        "ON CONFLICT (tenant_id, entity_id, attribute_id, ts) "
        "DO UPDATE SET value = excluded.value, revision = coalesce(h.revision, 0) + 1"
    ).format(sql.Identifier(f"entity_attributes_{known.type}"))
    with connection.cursor() as cursor:
        cursor.executemany(
            statement,
            [
                (fleet.tenant_id, fleet.entity_ids[device], known.attribute_id, moment(time_us), value)
                for time_us, value in readings.items()
            ],
        )
    fleet.readings.setdefault((device, attribute), {}).update(readings)


def readings_of(
    fleet: Fleet, devices: Sequence[str], attributes: Sequence[str], start_us: int, end_us: int
) -> list[tuple[int, int, int, str, str, Any]]:
    """(time, entity id, attribute id, device, attribute, value) of a range, in that order."""
    rows = []
    for device in devices:
        for name in attributes:
            for time_us, value in fleet.readings.get((device, name), {}).items():
                if start_us <= time_us < end_us:
                    ids = fleet.entity_ids[device], fleet.attributes[name].attribute_id
                    rows.append((time_us, *ids, device, name, value))
    return sorted(rows, key=lambda row: row[:3])
