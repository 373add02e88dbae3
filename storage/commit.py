"""The write transaction: fence, history, latest values, rejections, outbox, commit.

Round trips are what a small batch pays for, so the transaction has three parts:

    1. BEGIN and the fence, in one round trip
    2. COPY, one per value type (COPY cannot be pipelined)
    3. everything else and COMMIT, in one round trip

COPY is optimistic. Most batches hold only readings that are not there yet; one that does not fails on the key, is
rolled back, and goes again by merging. After that a few batches of the lane merge at once: a file that is replayed
would otherwise fail every COPY first, and each failure leaves its dead rows behind.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, LiteralString
from uuid import UUID, uuid4

import numpy as np
from psycopg import AsyncCursor, sql

from storage import binary
from storage.arrange import (
    all_new,
    arrange,
    changed_only,
    latest_candidates,
    latest_contenders,
)
from storage.binary import BoolArray, Int4Array, Int8Array, TimestampArray, received_arrays, value_array
from storage.database import Connection, Pool
from storage.errors import DataRefused, DuplicateKey, translated
from storage.fence import Fence, fence_streams
from storage.model import (
    BatchMessage,
    Changes,
    Columns,
    Outcome,
    RejectedReading,
    ValueType,
    WriteBatch,
    Written,
)
from storage.outbox import OutboxRow, encode_outbox
from storage.rejections import store_rejections, stored_rejections, wire_rejections
from storage.statements import statements

__all__ = ["UnaryRequest", "Writer", "request_digest", "wire_rejections"]

# Batches of a lane that merge without trying COPY, after one that had to. Short, because the usual cause is a
# reconnect, whose repeated readings are over within a few batches.
_MERGE_STREAK = 8

_SQL = statements("ingest.sql")
_BY_TYPE: Mapping[tuple[str, ValueType], LiteralString] = {
    (name, value_type): _SQL[name].replace("{type}", value_type)
    for name in ("merge_history", "raise_latest", "correct_latest", "set_aside")
    for value_type in ValueType
}
_COPY = {
    value_type: sql.SQL("COPY {} ({}) FROM STDIN (FORMAT BINARY)").format(
        sql.Identifier(f"entity_attributes_{value_type}"), sql.SQL(", ").join(map(sql.Identifier, binary.COPY_COLUMNS))
    )
    for value_type in ValueType
}


@dataclass(frozen=True, slots=True)
class UnaryRequest:
    """The unary write that a batch carries out, remembered in the same transaction."""

    tenant_id: int
    request_id: UUID
    # SHA-256 of the request.
    digest: bytes
    # Makes the response to be stored, from the batch's messages and the writing transaction's id.
    respond: Callable[[Sequence[BatchMessage], int], bytes]


def request_digest(request: bytes) -> bytes:
    """What identifies the content of a unary write."""
    return hashlib.sha256(request).digest()


class Writer:
    """Writes batches, one transaction each. One writer serves one lane: it remembers how the lane's batches went.

    Returning from `write` means durable, and nothing else does: when it raises, the transaction may or may not have
    committed (the connection can be lost during COMMIT). Writing the same batch again is always right, because the
    fence drops what was committed.
    """

    def __init__(self, pool: Pool, *, buckets: int) -> None:
        self._pool = pool
        self._buckets = buckets
        self._merges_left = 0

    async def write(
        self, batch: WriteBatch, request: UnaryRequest | None = None, *, fence: Fence = fence_streams
    ) -> Written:
        """Write a batch and commit; `fence` decides, in the same transaction, which of its messages count.

        Adds to its messages the rejections of superseded readings. A repeated message has those it was committed
        with, as far as its device has not confirmed them.

        Raises:
            DataRefused: the database refused a row; `find_refused` tells which.
            DuplicateKey: `request` has been carried out already.
            StorageError: anything else; `retriable` says whether to write the batch again.
        """
        if self._merges_left:
            self._merges_left -= 1
            return await self._transaction(batch, request, fence, merge=True)
        try:
            return await self._transaction(batch, request, fence, merge=False)
        except DuplicateKey:
            self._merges_left = _MERGE_STREAK
            return await self._transaction(batch, request, fence, merge=True)

    async def _transaction(
        self, batch: WriteBatch, request: UnaryRequest | None, fence: Fence, *, merge: bool
    ) -> Written:
        with translated():
            async with self._pool.connection() as connection:
                outcomes = await fence(connection, batch.messages)
                arranged = arrange(batch.readings, outcomes, buckets=self._buckets)
                changes: dict[ValueType, Changes] = {}
                contenders: dict[ValueType, Columns] = {}
                for value_type, readings in arranged.readings.items():
                    if merge:
                        positions, revisions = await _merge(connection, value_type, readings)
                        changes[value_type] = changed_only(readings, positions, revisions)
                        contenders[value_type] = latest_contenders(readings, positions, revisions)
                    else:
                        await _copy(connection, value_type, readings)
                        changes[value_type] = all_new(readings)
                        contenders[value_type] = latest_candidates(readings)
                row = encode_outbox(uuid4(), changes, batch.names, buckets=self._buckets)
                rejections = _rejections(batch.messages, arranged.superseded, outcomes)
                # Usually this batch's own first try, whose COMMIT nobody heard of: its device is still to be told.
                told_before = await stored_rejections(connection, batch.messages, outcomes)
                async with connection.pipeline():
                    await _raise_latest(connection, contenders)
                    await _set_aside(connection, batch, outcomes)
                    await store_rejections(connection, batch.messages, rejections)
                    if row:
                        await _append_outbox(connection, batch.lane, row)
                    answer = await connection.execute(_SQL["writing_transaction"])
                    if request is None:
                        await connection.commit()
                xid = int((await _one(answer))[0])
                if request is not None:
                    await self._remember(connection, batch.messages, rejections, request, xid)
        for position, message in enumerate(batch.messages):
            message.rejections = told_before.get(position, rejections[position])
        count = sum(map(len, arranged.readings.values()))
        return Written(
            outcomes=outcomes,
            xid=xid,
            copied=0 if merge else count,
            merged=count if merge else 0,
            changes=row.changes if row else 0,
            corrected={value_type: int(np.count_nonzero(part.revision)) for value_type, part in changes.items()},
        )

    async def _remember(
        self,
        connection: Connection,
        messages: Sequence[BatchMessage],
        rejections: Sequence[list[RejectedReading]],
        request: UnaryRequest,
        xid: int,
    ) -> None:
        told = [
            BatchMessage(m.tenant_id, m.entity_id, None, None, m.sequence, found)
            for m, found in zip(messages, rejections, strict=True)
        ]
        parameters = {
            "tenant": request.tenant_id,
            "request": request.request_id,
            "digest": request.digest,
            "response": request.respond(told, xid),
        }
        await connection.execute(_SQL["store_write_request"], parameters)
        await connection.commit()

    async def find_request(self, tenant_id: int, request_id: UUID) -> tuple[bytes, bytes] | None:
        """The digest and the stored response of a unary write that was carried out; None if it was not.

        Raises:
            StorageError: the database could not be asked.
        """
        with translated():
            async with self._pool.connection() as connection:
                cursor = await connection.execute(
                    _SQL["find_write_request"], {"tenant": tenant_id, "request": request_id}
                )
                row = await cursor.fetchone()
        return None if row is None else (bytes(row[0]), bytes(row[1]))

    async def find_refused(self, batch: WriteBatch) -> dict[ValueType, list[tuple[int, str]]]:
        """The readings of a batch that the database refuses, by position in their columns, each with its reason.

        Found by halving: parts are tried in transactions that are rolled back, so nothing is written. Costs about
        2 log2(n) trials for each offender.

        Raises:
            StorageError: a trial failed for another reason than its data.
        """
        found: dict[ValueType, list[tuple[int, str]]] = {}
        for value_type, readings in batch.readings.items():
            pending = [np.arange(len(readings))]
            while pending:
                positions = pending.pop()
                try:
                    await self._try(value_type, readings.take(positions))
                except DataRefused as refusal:
                    if len(positions) == 1:
                        found.setdefault(value_type, []).append((int(positions[0]), str(refusal)))
                    else:
                        pending += np.array_split(positions, 2)
        return found

    async def _try(self, value_type: ValueType, readings: Columns) -> None:
        outcomes = [Outcome.COMMITTED] * (int(readings.source.max()) + 1 if len(readings) else 0)
        with translated():
            async with self._pool.connection() as connection, connection.transaction(force_rollback=True):
                for part in arrange({value_type: readings}, outcomes, buckets=self._buckets).readings.values():
                    await _merge(connection, value_type, part)


async def _copy(connection: Connection, value_type: ValueType, readings: Columns) -> None:
    async with connection.cursor() as cursor, cursor.copy(_COPY[value_type]) as copy:
        await copy.write(binary.copy_rows(value_type, readings))


def _keyed(value_type: ValueType, readings: Columns | Changes) -> dict[str, object]:
    return {
        "tenant": Int4Array(readings.tenant),
        "entity": Int8Array(readings.entity),
        "attribute": Int4Array(readings.attribute),
        "ts": TimestampArray(readings.time_us),
        "value": value_array(value_type, readings.value),
    }


async def _merge(
    connection: Connection, value_type: ValueType, readings: Columns
) -> tuple[np.ndarray[Any, np.dtype[np.intp]], np.ndarray[Any, np.dtype[np.int32]]]:
    """Positions of the readings that changed something, and the revisions they took."""
    async with connection.cursor(binary=True) as cursor:
        await cursor.execute(_BY_TYPE["merge_history", value_type], _keyed(value_type, readings))
        *key, revision = received_arrays(cursor, ">i4", ">i8", ">i4", ">i8", ">i4")
    taken = dict(zip(zip(*(part.tolist() for part in key), strict=True), revision.tolist(), strict=True))
    if not taken:
        return np.empty(0, np.intp), np.empty(0, np.int32)
    columns = (readings.tenant, readings.entity, readings.attribute, readings.time_us)
    keys = zip(*(part.tolist() for part in columns), strict=True)
    changed = [(position, taken[k]) for position, k in enumerate(keys) if k in taken]
    return np.array([p for p, _ in changed], np.intp), np.array([r for _, r in changed], np.int32)


async def _raise_latest(connection: Connection, contenders: Mapping[ValueType, Columns]) -> None:
    for value_type, columns in contenders.items():
        if not len(columns):
            continue
        keyed = _keyed(value_type, columns)
        if columns.historical.any():
            keyed["historical"] = BoolArray(columns.historical)
            await connection.execute(_BY_TYPE["correct_latest", value_type], keyed)
        else:
            await connection.execute(_BY_TYPE["raise_latest", value_type], keyed)


async def _set_aside(connection: Connection, batch: WriteBatch, outcomes: Sequence[Outcome]) -> None:
    live = np.array([outcome is Outcome.COMMITTED for outcome in outcomes], bool)
    for value_type, columns in batch.quarantined.items():
        kept = columns.take(live[columns.source])
        if len(kept):
            await connection.execute(_BY_TYPE["set_aside", value_type], _keyed(value_type, kept))


def _rejections(
    messages: Sequence[BatchMessage], superseded: Sequence[tuple[int, RejectedReading]], outcomes: Sequence[Outcome]
) -> list[list[RejectedReading]]:
    """The rejections of each message; none for a message that is not written."""
    told = [
        list(message.rejections) if outcome is Outcome.COMMITTED else []
        for message, outcome in zip(messages, outcomes, strict=True)
    ]
    for source, rejection in superseded:
        told[source].append(rejection)
    return told


async def _append_outbox(connection: Connection, lane: int, row: OutboxRow) -> None:
    parameters = {
        "lane": lane,
        "batch": row.batch_id,
        "changes": row.changes,
        "tenants": Int4Array(row.tenants),
        "min_ts": TimestampArray(row.min_us),
        "max_ts": TimestampArray(row.max_us),
        "payload": row.payload,
    }
    # Binary, or the payload would travel as hexadecimal text, twice its size.
    await connection.execute(_SQL["append_outbox"], parameters)


async def _one(cursor: AsyncCursor[tuple[Any, ...]]) -> tuple[Any, ...]:
    row = await cursor.fetchone()
    if row is None:
        raise AssertionError("a statement that always has a row had none")
    return row
