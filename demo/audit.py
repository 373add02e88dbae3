"""The audit: what the devices know was acked, against what is stored, reading by reading.

The ledger is the devices' own. `lost` counts distinct acked readings that are not in the database with their value, or
not in the warehouse; `duplicated` counts changes in the outbox beyond one for each distinct reading, and rows of the
warehouse beyond one for each. Readings that were not acked, because the run ended first, are in neither.
"""

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TypeAlias

import psycopg
from atlasco.telemetry.v1 import change_pb2

from device.ledger import Ledger
from device.packing import Value
from storage.times import moment, naive_microseconds
from storage.verify.readings import Primary, VerifyTimeout, WarehouseStore
from storage.warehouse.port import Scope, Warehouse

_Reading: TypeAlias = tuple[str, str, int]
"""Device, attribute, timestamp in microseconds."""
_Row: TypeAlias = tuple[_Reading, Value]

# Devices in one question to each store: a question costs the same whether it is about one or a hundred.
_DEVICES_AT_ONCE = 200
_US = "(extract(epoch FROM ts) * 1000000)::bigint"


@dataclass(frozen=True, slots=True)
class Audit:
    """What the audit found; everything counts distinct readings, save `duplicated`.

    `published` and `loaded` are None where there is no pipeline.
    """

    acked: int
    stored: int
    published: int | None
    loaded: int | None
    lost: int
    duplicated: int


class WarehouseLate(Exception):
    """The warehouse did not become complete in time, so nothing can be said about what it holds."""


def primary_clock(dsn: str) -> datetime:
    """The primary's clock: what it writes from now on has a later time."""
    with psycopg.connect(dsn) as connection:
        row = connection.execute("SELECT now()").fetchone()
    assert row is not None
    clock: datetime = row[0]
    return clock


def audit(
    dsn: str,
    tenant: str,
    ledgers: Mapping[str, Ledger],
    *,
    since: datetime,
    warehouse: Warehouse | None,
) -> Audit:
    """Compare the ledgers with the database and, if there is one, with the warehouse, which must be complete by now.

    `since`: when the run began, see `primary_clock`.
    """
    acked = stored = loaded = lost = duplicated = 0
    with psycopg.connect(dsn) as connection:
        names = _names(connection, tenant)
        for devices in _chunks(list(ledgers), _DEVICES_AT_ONCE):
            sent = {
                (device, attribute, time_us): value
                for device in devices
                for attribute, time_us, value in ledgers[device].acked_readings()
            }
            if not sent:
                continue
            acked += len(sent)
            asked = names.scope(devices, [time_us for _, _, time_us in sent])
            there = _confirmed(sent, _stored_readings(connection, names, asked))
            stored += len(there)
            if warehouse is not None:
                rows = _loaded_readings(warehouse, names, asked)
                counts = Counter(reading for reading, _ in rows)
                duplicated += sum(count - 1 for reading, count in counts.items() if reading in sent)
                arrived = _confirmed(sent, rows)
                loaded += len(arrived)
                there &= arrived
            lost += len(sent) - len(there)
        changes, published = _changes(connection, tenant, set(ledgers), since)
    duplicated += sum(count - 1 for count in changes.values())
    if warehouse is None:
        return Audit(acked, stored, None, None, lost, duplicated)
    return Audit(acked, stored, published, loaded, lost, duplicated)


def wait_until_loaded(dsn: str, warehouse: Warehouse, *, deadline_s: float) -> None:
    """Wait until the warehouse has everything that is committed now.

    Raises:
        WarehouseLate: it had not after `deadline_s`.
    """
    try:
        WarehouseStore(warehouse).wait_for(Primary(dsn).now_us(), time.monotonic() + deadline_s)
    except VerifyTimeout as error:
        raise WarehouseLate(str(error)) from error


@dataclass(frozen=True, slots=True)
class _Asked:
    """Some devices of a tenant, and the reading times [first_us, last_us] that their ledgers span."""

    tenant_id: int
    entity_ids: list[int]
    first_us: int
    last_us: int


@dataclass(frozen=True, slots=True)
class _Names:
    """What the ids of a tenant mean."""

    tenant_id: int
    entity_ids: dict[str, int]
    entities: dict[int, str]
    attributes: dict[int, str]

    def scope(self, devices: list[str], times: list[int]) -> _Asked:
        """Where to look for readings. Not the time of the run: some devices' clocks are wrong."""
        ids = [self.entity_ids[device] for device in devices if device in self.entity_ids]
        return _Asked(self.tenant_id, ids, min(times), max(times))


def _names(connection: psycopg.Connection, tenant: str) -> _Names:
    row = connection.execute("SELECT tenant_id FROM tenants WHERE name = %s", [tenant]).fetchone()
    tenant_id = int(row[0]) if row else -1
    entities: dict[int, str] = dict(
        connection.execute("SELECT entity_id, external_id FROM entities WHERE tenant_id = %s", [tenant_id]).fetchall()
    )
    attributes: dict[int, str] = dict(
        connection.execute("SELECT attribute_id, name FROM attributes WHERE tenant_id = %s", [tenant_id]).fetchall()
    )
    return _Names(tenant_id, {name: entity for entity, name in entities.items()}, entities, attributes)


def _stored_readings(connection: psycopg.Connection, names: _Names, asked: _Asked) -> list[_Row]:
    rows = connection.execute(
        f"""
        SELECT entity_id, attribute_id, {_US}, double_value, bigint_value, boolean_value, text_value
          FROM entity_attributes
         WHERE tenant_id = %(tenant)s AND entity_id = ANY (%(entities)s)
           AND ts BETWEEN %(first)s AND %(last)s
        """,
        {
            "tenant": asked.tenant_id,
            "entities": asked.entity_ids,
            "first": moment(asked.first_us),
            "last": moment(asked.last_us),
        },
    )
    return [
        ((names.entities[entity], names.attributes[attribute], time_us), _value(values))
        for entity, attribute, time_us, *values in rows
    ]


def _loaded_readings(warehouse: Warehouse, names: _Names, asked: _Asked) -> list[_Row]:
    places = ", ".join(["%s"] * len(asked.entity_ids)) or "NULL"
    answer = warehouse.query(
        f"""
        SELECT entity_id, attribute_id, ts, double_value, bigint_value, boolean_value, text_value
          FROM entity_attributes
         WHERE tenant_id = %s AND entity_id IN ({places})
        """,
        [asked.tenant_id, *asked.entity_ids],
        scope=Scope(asked.tenant_id, asked.first_us, asked.last_us + 1),
    )
    return [
        ((names.entities[entity], names.attributes[attribute], naive_microseconds(ts)), _value(values))
        for entity, attribute, ts, *values in answer.rows
    ]


def _confirmed(sent: Mapping[_Reading, Value], rows: list[_Row]) -> set[_Reading]:
    """The readings of a ledger that a store has with their value."""
    found = dict(rows)
    return {reading for reading, value in sent.items() if _same(found.get(reading), value)}


def _chunks(items: list[str], size: int) -> Iterable[list[str]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _value(values: list[Value | None]) -> Value:
    return next(value for value in values if value is not None)


def _same(found: Value | None, sent: Value) -> bool:
    """Equal in type and value; NaN is equal to NaN."""
    if isinstance(found, float) and isinstance(sent, float) and math.isnan(found):
        return math.isnan(sent)
    return type(found) is type(sent) and found == sent


def _changes(
    connection: psycopg.Connection, tenant: str, devices: set[str], since: datetime
) -> tuple[Counter[_Reading], int]:
    """How often each reading of the run occurs in the outbox, and how many of these changes are in Kafka.

    Of these devices alone: others write too, into the same transactions.
    """
    counts: Counter[_Reading] = Counter()
    published = 0
    with connection.cursor("outbox") as cursor:
        # A server-side cursor: the outbox of a long run does not fit in memory.
        cursor.itersize = 20
        cursor.execute(
            "SELECT o.payload, coalesce(pg_visible_in_snapshot(o.xid, r.published), false) "
            "FROM outbox o LEFT JOIN relay_lanes r USING (lane) WHERE o.created_at >= %s",
            [since],
        )
        for payload, is_published in cursor:
            for frame in change_pb2.OutboxPayload.FromString(payload).frames:
                batch = change_pb2.ChangeBatch.FromString(frame.change_batch)
                if batch.tenant == tenant:
                    keys = [key for key in _keys(batch) if key[0] in devices]
                    counts.update(keys)
                    published += len(keys) if is_published else 0
    return counts, published


def _keys(batch: change_pb2.ChangeBatch) -> Iterable[_Reading]:
    for column in (batch.doubles, batch.int64s, batch.bools, batch.strings):
        for entity, attribute, delta in zip(column.entities, column.attributes, column.time_deltas_us, strict=True):
            yield (
                batch.entities[entity].external_id,
                batch.attributes[attribute].name,
                batch.base_time_us + delta,
            )
