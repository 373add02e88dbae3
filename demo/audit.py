"""The audit: what the devices know was acked, against what is stored, reading by reading.

The ledger is the devices' own. `lost` counts distinct acked readings that are not in the database with their value;
`duplicated` counts changes in the outbox beyond one for each distinct reading. Readings that were not acked, because
the run ended first, are in neither.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import psycopg
from atlasco.telemetry.v1 import change_pb2

from device.ledger import Ledger
from device.packing import Value

_US = "(extract(epoch FROM ts) * 1000000)::bigint"


@dataclass(frozen=True, slots=True)
class Audit:
    """What the audit found; everything counts distinct readings, `duplicated` changes."""

    acked: int
    stored: int
    lost: int
    duplicated: int


def last_outbox_id(dsn: str) -> int:
    """The highest outbox id given out so far: what a later audit need not read."""
    with psycopg.connect(dsn) as connection:
        row = connection.execute("SELECT last_value FROM outbox_ids").fetchone()
    return int(row[0]) if row else 0


def audit(dsn: str, tenant: str, ledgers: Mapping[str, Ledger], *, after_outbox_id: int) -> Audit:
    """Compare the ledgers with the database. `after_outbox_id`: see `last_outbox_id`."""
    acked = stored = 0
    with psycopg.connect(dsn) as connection:
        for device, ledger in ledgers.items():
            sent = {(attribute, time_us): value for attribute, time_us, value in ledger.acked_readings()}
            if not sent:
                continue
            # Not the time of the run: some devices' clocks are wrong.
            times = [time_us for _, time_us in sent]
            found = _stored_readings(connection, tenant, device, min(times), max(times))
            acked += len(sent)
            stored += sum(_same(found.get(key), value) for key, value in sent.items())
        changes = _changes(connection, tenant, set(ledgers), after_outbox_id)
    return Audit(acked, stored, acked - stored, sum(count - 1 for count in changes.values()))


def _stored_readings(
    connection: psycopg.Connection, tenant: str, device: str, first_us: int, last_us: int
) -> dict[tuple[str, int], Value]:
    rows = connection.execute(
        f"""
        SELECT a.name, {_US}, h.double_value, h.bigint_value, h.boolean_value, h.text_value
          FROM entity_attributes h
          JOIN attributes a USING (tenant_id, attribute_id)
         WHERE h.tenant_id = (SELECT tenant_id FROM tenants WHERE name = %(tenant)s)
           AND h.entity_id = (SELECT entity_id FROM entities e JOIN tenants t USING (tenant_id)
                               WHERE t.name = %(tenant)s AND e.external_id = %(device)s)
           AND h.ts BETWEEN to_timestamp(%(first)s / 1000000.0) - interval '1 second'
                        AND to_timestamp(%(last)s / 1000000.0) + interval '1 second'
        """,
        {"tenant": tenant, "device": device, "first": first_us, "last": last_us},
    )
    return {(name, time_us): next(value for value in values if value is not None) for name, time_us, *values in rows}


def _same(found: Value | None, sent: Value) -> bool:
    """Equal in type and value; NaN is equal to NaN."""
    if isinstance(found, float) and isinstance(sent, float) and math.isnan(found):
        return math.isnan(sent)
    return type(found) is type(sent) and found == sent


def _changes(
    connection: psycopg.Connection, tenant: str, devices: set[str], after_id: int
) -> Counter[tuple[str, str, int]]:
    """How often each reading of the run occurs in the outbox."""
    counts: Counter[tuple[str, str, int]] = Counter()
    with connection.cursor("outbox") as cursor:
        # A server-side cursor: the outbox of a long run does not fit in memory.
        cursor.itersize = 20
        cursor.execute("SELECT payload FROM outbox WHERE id > %s", [after_id])
        for (payload,) in cursor:
            for frame in change_pb2.OutboxPayload.FromString(payload).frames:
                batch = change_pb2.ChangeBatch.FromString(frame.change_batch)
                if batch.tenant == tenant:
                    counts.update(key for key in _keys(batch) if key[0] in devices)
    return counts


def _keys(batch: change_pb2.ChangeBatch) -> Iterable[tuple[str, str, int]]:
    for column in (batch.doubles, batch.int64s, batch.bools, batch.strings):
        for entity, attribute, delta in zip(column.entities, column.attributes, column.time_deltas_us, strict=True):
            yield (
                batch.entities[entity].external_id,
                batch.attributes[attribute].name,
                batch.base_time_us + delta,
            )
