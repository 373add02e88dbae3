"""Deleting a device and everything of it.

The order is one short transaction: the device loses its name and its stream, a row in entity_deletions says what is to
be done, and a record in the outbox that the device is gone: who follows the changes and has come past the order shows
it no more, however long its readings take to go. The worker of rollups then carries it out, in bounded steps, each a
transaction together with how far it got; it goes on after any end:

    database          readings, each step with its record in the outbox, by which Kafka and the warehouse forget them;
                      at the end once more a record that the device is gone
    settle            a unary write that was under way when the order came knows the device still: wait, and look again
    materializations  rollups and projections
    warehouse         until the loader has passed the deletions
    done

A record carries the revision that the reading had: for followers a deletion outranks a value of the same revision.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID, uuid4

from atlasco.telemetry.v1 import change_pb2
from psycopg import sql

from storage.database import Connection, Pool
from storage.errors import PROBLEM_LENGTH, StorageError, translated
from storage.model import ValueType, bucket_of, lane_of
from storage.outbox import WIRE_TYPES
from storage.reads.model import EntityNotFound
from storage.rollup.projection import table_of
from storage.statements import statements
from storage.times import moment

_SQL = statements("deletion.sql")
_READINGS_PER_STEP: Final = 5_000
_BUCKETS_PER_STEP: Final = 20_000
_COLUMNS: Final = {
    ValueType.DOUBLE: "doubles",
    ValueType.BIGINT: "int64s",
    ValueType.BOOLEAN: "bools",
    ValueType.TEXT: "strings",
}


class OperationConflict(StorageError):
    """The operation's id is in use for another device."""


class OperationNotFound(StorageError):
    """The tenant has no operation of this id."""


@dataclass(frozen=True, slots=True)
class Operation:
    """A deletion as it stands. `step` is one of the steps above, or done."""

    operation_id: UUID
    entity: str
    step: str
    readings_deleted: int
    # What failed last; empty: nothing since.
    problem: str
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None


async def order_deletion(pool: Pool, tenant_id: int, entity: str, operation_id: UUID) -> Operation:
    """Order the deletion of a device; the same order again changes nothing.

    From its return on, nobody finds the device by name, and no answer that is complete up to then shows it; until the
    operation ends, nobody can register under the name.

    Raises:
        EntityNotFound: there is no such device.
        OperationConflict: the id belongs to another device's deletion.
        StorageError: the database; the order may have been stored or not.
    """
    with translated():
        async with pool.connection() as connection:
            parameters = {"tenant": tenant_id, "name": entity, "operation": operation_id}
            row = await (await connection.execute(_SQL["order_deletion"], parameters)).fetchone()
            outcome = row[0] if row else "unknown"
            if outcome == "created":
                # In the same transaction, or an answer could be complete past the order and not know of it.
                ordered = await (await connection.execute(_SQL["ordered_deletion"], parameters)).fetchone()
                assert ordered is not None
                await _append_outbox(connection, DueDeletion(*ordered), {}, 0)
    if outcome == "unknown":
        raise EntityNotFound(entity)
    if outcome == "conflict":
        raise OperationConflict(f"operation {operation_id} is of another device")
    return await find_operation(pool, tenant_id, operation_id)


async def find_operation(pool: Pool, tenant_id: int, operation_id: UUID) -> Operation:
    """An operation. Raises OperationNotFound, StorageError."""
    found = await list_operations(pool, tenant_id, limit=1, operation_id=operation_id)
    if not found:
        raise OperationNotFound(f"no operation {operation_id}")
    return found[0]


async def list_operations(
    pool: Pool,
    tenant_id: int,
    *,
    limit: int,
    after: tuple[datetime, UUID] | None = None,
    operation_id: UUID | None = None,
) -> list[Operation]:
    """A tenant's operations, the newest first, from behind the one created at and identified by `after`."""
    at, last = after or (None, None)
    parameters = {
        "tenant": tenant_id,
        "operation": operation_id,
        "after_at": at,
        "after_id": last,
        "limit": limit,
    }
    with translated():
        async with pool.connection() as connection:
            rows = await (await connection.execute(_SQL["operations"], parameters)).fetchall()
    return [Operation(*row) for row in rows]


@dataclass(frozen=True, slots=True)
class DueDeletion:
    """A deletion that has something to do: what its next step is, and whom it concerns."""

    operation_id: UUID
    tenant_id: int
    tenant: str
    entity_id: int
    entity: str
    step: str
    buckets: int
    lanes: int

    @property
    def key(self) -> dict[str, Any]:
        """The device, as statements ask for it."""
        return {"tenant": self.tenant_id, "entity": self.entity_id}


async def due_deletion(connection: Connection, settle_s: float) -> DueDeletion | None:
    """The oldest deletion that has something to do now, locked for the caller's transaction; None: there is none.

    `settle_s`: how long after the last deletion to look again; longer than any write request may take.
    """
    parameters = {"settle": timedelta(seconds=settle_s)}
    row = await (await connection.execute(_SQL["due_deletion"], parameters)).fetchone()
    return None if row is None else DueDeletion(*row)


async def delete_step(connection: Connection, due: DueDeletion) -> int:
    """The next step of a deletion, within the transaction that found it due; returns the readings deleted."""
    readings = 0
    match due.step:
        case "database" | "settle":
            readings = await _delete_readings(connection, due)
            following = "materializations" if due.step == "settle" else "settle"
            if readings:
                following = "database"
            else:
                # Again, and after settling too: an order of an older release has told nobody yet.
                await _append_outbox(connection, due, {}, 0)
                await connection.execute(_SQL["delete_rest"], due.key)
        case "materializations":
            following = "materializations" if await _delete_materialized(connection, due) else "warehouse"
        case _:
            following = "done"
    moved = {"step": following, "readings": readings, "operation": due.operation_id}
    await connection.execute(_SQL["move_deletion"], moved)
    return readings


async def note_problem(connection: Connection, operation_id: UUID, problem: str) -> None:
    """Say of a deletion why its step failed; the others go first from now on."""
    await connection.execute(_SQL["note_problem"], {"operation": operation_id, "problem": problem[:PROBLEM_LENGTH]})


async def forget_deletions(connection: Connection) -> None:
    """Forget operations that ended 30 days ago."""
    await connection.execute(_SQL["forget_deletions"])


async def _delete_readings(connection: Connection, due: DueDeletion) -> int:
    found: dict[ValueType, list[tuple[int, int, int]]] = {}
    room = _READINGS_PER_STEP
    for value_type in ValueType:
        if room:
            statement = sql.SQL(_SQL["delete_readings"].replace("{type}", value_type))
            rows = await (await connection.execute(statement, {**due.key, "limit": room})).fetchall()
            room -= len(rows)
            if rows:
                found[value_type] = rows
    count = _READINGS_PER_STEP - room
    if count:
        await _append_outbox(connection, due, found, count)
    return count


async def _append_outbox(
    connection: Connection, due: DueDeletion, found: Mapping[ValueType, Sequence[tuple[int, int, int]]], count: int
) -> None:
    ids = sorted({row[0] for rows in found.values() for row in rows})
    names: dict[int, str] = dict(
        await (await connection.execute(_SQL["attributes"], {"tenant": due.tenant_id, "attributes": ids})).fetchall()
    )
    batch_id = uuid4()
    batch = _change_batch(due, batch_id, found, names)
    # Without readings no range of time: the record concerns no answer's completeness but that of names.
    times = [row[1] for rows in found.values() for row in rows]
    spans = [(moment(min(times)), moment(max(times)))] if times else []
    payload = change_pb2.OutboxPayload()
    payload.frames.add(
        tenant_id=due.tenant_id, bucket=batch.bucket, changes=count, change_batch=batch.SerializeToString()
    )
    await connection.execute(_SQL["ensure_outbox"])
    await connection.execute(
        _SQL["append_outbox"],
        {
            "lane": lane_of(due.entity_id, due.buckets, due.lanes),
            "batch": batch_id,
            "changes": count,
            "tenants": [due.tenant_id for _ in spans],
            "min_ts": [low for low, _ in spans],
            "max_ts": [high for _, high in spans],
            "payload": payload.SerializeToString(),
        },
    )


def _change_batch(
    due: DueDeletion,
    batch_id: UUID,
    found: Mapping[ValueType, Sequence[tuple[int, int, int]]],
    names: Mapping[int, str],
) -> change_pb2.ChangeBatch:
    batch = change_pb2.ChangeBatch(
        batch_id=batch_id.bytes,
        tenant_id=due.tenant_id,
        tenant=due.tenant,
        bucket=bucket_of(due.entity_id, due.buckets),
        op=change_pb2.CHANGE_OP_DELETE,
        base_time_us=min((row[1] for rows in found.values() for row in rows), default=0),
    )
    batch.entities.add(entity_id=due.entity_id, external_id=due.entity, gone=True)
    places: dict[int, int] = {}
    for value_type, rows in found.items():
        column: Any = getattr(batch, _COLUMNS[value_type])
        for attribute_id, time_us, revision in rows:
            if attribute_id not in places:
                places[attribute_id] = len(places)
                # Without a name where there is none any more: followers know the attribute by its id.
                batch.attributes.add(
                    attribute_id=attribute_id, name=names.get(attribute_id, ""), type=WIRE_TYPES[value_type]
                )
            column.entities.append(0)
            column.attributes.append(places[attribute_id])
            column.time_deltas_us.append(time_us - batch.base_time_us)
            column.revisions.append(revision)
        if not any(column.revisions):
            del column.revisions[:]
    return batch


async def _delete_materialized(connection: Connection, due: DueDeletion) -> bool:
    """Delete some rollup buckets, and the rows of projections; whether there may be more."""
    room = _BUCKETS_PER_STEP
    for unit in ("minute", "hour"):
        for value_type in (ValueType.DOUBLE, ValueType.BIGINT):
            table = sql.Identifier(f"rollup_{unit}_{value_type}")
            statement = sql.SQL(_SQL["delete_buckets"]).format(table=table)
            room -= (await connection.execute(statement, {**due.key, "limit": max(room, 1)})).rowcount
    for (projection,) in await (await connection.execute(_SQL["projections_of_tenant"], due.key)).fetchall():
        statement = sql.SQL(_SQL["delete_projected"]).format(table=table_of(projection))
        await connection.execute(statement, due.key)
    return room <= 0
