"""What the database holds, read with its own means and not through the gateway."""

from typing import Any, TypeAlias

import psycopg
from atlasco.telemetry.v1 import change_pb2

from tests.storage.conftest import Database

# Of this database alone, and not of what the server does there by itself.
_WAITING_WRITES = """
SELECT count(*) FROM pg_locks
 WHERE NOT granted AND mode = 'RowExclusiveLock' AND relation = 'outbox'::regclass
   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
_WAITING_HELLOS = """
SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)
 WHERE NOT granted AND locktype = 'transactionid' AND datname = current_database()
"""

# (attribute, microseconds) -> (value, revision)
History: TypeAlias = dict[tuple[str, int], tuple[Any, int]]

_HISTORY = """
SELECT a.name, (extract(epoch FROM h.ts) * 1000000)::bigint, h.type::text,
       h.double_value, h.bigint_value, h.boolean_value, h.text_value, h.revision
  FROM entity_attributes h
  JOIN tenants t USING (tenant_id)
  JOIN entities e USING (tenant_id, entity_id)
  JOIN attributes a USING (tenant_id, attribute_id)
 WHERE t.name = %s AND e.external_id = %s
"""
_LATEST = """
SELECT a.name, (extract(epoch FROM l.ts) * 1000000)::bigint, a.type::text,
       l.double_value, l.bigint_value, l.boolean_value, l.text_value
  FROM latest_values l
  JOIN tenants t USING (tenant_id)
  JOIN entities e USING (tenant_id, entity_id)
  JOIN attributes a USING (tenant_id, attribute_id)
 WHERE t.name = %s AND e.external_id = %s
"""
_TYPES = ("double", "bigint", "boolean", "text")


def history(database: Database, tenant: str, device: str) -> History:
    """Every reading of a device with its revision."""
    return {
        (row[0], row[1]): (row[3 + _TYPES.index(row[2])], row[7]) for row in rows(database, _HISTORY, tenant, device)
    }


def values(database: Database, tenant: str, device: str) -> dict[tuple[str, int], Any]:
    """Every reading of a device."""
    return {key: value for key, (value, _) in history(database, tenant, device).items()}


def latest(database: Database, tenant: str, device: str) -> dict[str, tuple[int, Any]]:
    """The latest values of a device: attribute -> (microseconds, value)."""
    return {row[0]: (row[1], row[3 + _TYPES.index(row[2])]) for row in rows(database, _LATEST, tenant, device)}


def changes(database: Database, tenant: str) -> list[tuple[str, str, int, Any, int]]:
    """Every change in the outbox of a tenant, in the order of commit: device, attribute, time, value, revision."""
    found = []
    for (payload,) in rows(database, "SELECT payload FROM outbox ORDER BY xid, id"):
        for frame in change_pb2.OutboxPayload.FromString(payload).frames:
            batch = change_pb2.ChangeBatch.FromString(frame.change_batch)
            if batch.tenant != tenant:
                continue
            for column in (batch.doubles, batch.int64s, batch.bools, batch.strings):
                revisions = list(column.revisions) or [0] * len(column.values)
                for place, value in enumerate(column.values):
                    found.append(
                        (
                            batch.entities[column.entities[place]].external_id,
                            batch.attributes[column.attributes[place]].name,
                            batch.base_time_us + column.time_deltas_us[place],
                            value,
                            revisions[place],
                        )
                    )
    return found


def waiting_writes(database: Database) -> int:
    """Transactions that wait for a lock on the outbox, to write to it."""
    return int(rows(database, _WAITING_WRITES)[0][0])


def waiting_hellos(database: Database) -> int:
    """Transactions that wait for the end of another one, as a hello does for a write for its device."""
    return int(rows(database, _WAITING_HELLOS)[0][0])


def rows(database: Database, statement: Any, *parameters: Any) -> list[tuple[Any, ...]]:
    """The rows of a statement."""
    with psycopg.connect(database(), autocommit=True) as connection:
        cursor = connection.execute(statement, parameters or None)
        return cursor.fetchall() if cursor.description else []
