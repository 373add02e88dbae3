"""Rejections of stream messages: stored with the message, told until the device confirms them."""

from collections.abc import Sequence
from typing import cast
from uuid import UUID

from atlasco.telemetry.v1 import ingest_pb2

from storage.binary import ByteaArray, Int4Array, Int8Array, UuidArray
from storage.database import Connection
from storage.model import BatchMessage, Outcome, Reason, RejectedReading
from storage.statements import statements

_SQL = statements("ingest.sql")


def wire_rejections(sequence: int, rejections: Sequence[RejectedReading]) -> list[ingest_pb2.Rejection]:
    """A message's rejections as the device is told them."""
    return [
        ingest_pb2.Rejection(
            sequence=sequence,
            index=rejection.index,
            reason=cast("ingest_pb2.RejectionReason.ValueType", int(rejection.reason)),
            text=rejection.text,
            quarantined=rejection.quarantined,
        )
        for rejection in rejections
    ]


async def store_rejections(
    connection: Connection, messages: Sequence[BatchMessage], rejections: Sequence[list[RejectedReading]]
) -> None:
    """Store the rejections of stream messages; unary writes are answered with theirs once."""
    rows = [
        (message, message.session_id, ingest_pb2.Ack(rejections=wire_rejections(message.sequence, told)))
        for message, told in zip(messages, rejections, strict=True)
        if told and message.session_id is not None
    ]
    if rows:
        parameters = _keys([message for message, _, _ in rows], [session for _, session, _ in rows])
        parameters["rejections"] = ByteaArray([ack.SerializeToString() for _, _, ack in rows])
        await connection.execute(_SQL["store_rejections"], parameters)


async def stored_rejections(
    connection: Connection, messages: Sequence[BatchMessage], outcomes: Sequence[Outcome]
) -> dict[int, list[RejectedReading]]:
    """The unconfirmed rejections of the repeated messages, by their position in the batch."""
    repeated = [
        (position, message, message.session_id)
        for position, (message, outcome) in enumerate(zip(messages, outcomes, strict=True))
        if outcome is Outcome.REPEATED and message.session_id is not None
    ]
    if not repeated:
        return {}
    parameters = _keys([message for _, message, _ in repeated], [session for _, _, session in repeated])
    cursor = await connection.execute(_SQL["stored_rejections"], parameters)
    stored = {tuple(row[:4]): ingest_pb2.Ack.FromString(bytes(row[4])) for row in await cursor.fetchall()}
    found = {}
    for position, message, session in repeated:
        ack = stored.get((message.tenant_id, message.entity_id, session, message.sequence))
        if ack is not None:
            found[position] = [_rejected(rejection) for rejection in ack.rejections]
    return found


def _rejected(rejection: ingest_pb2.Rejection) -> RejectedReading:
    return RejectedReading(
        index=rejection.index if rejection.HasField("index") else None,
        reason=Reason(rejection.reason),
        text=rejection.text,
        quarantined=rejection.quarantined,
    )


def _keys(messages: Sequence[BatchMessage], sessions: Sequence[UUID]) -> dict[str, object]:
    return {
        "tenant": Int4Array([m.tenant_id for m in messages]),
        "entity": Int8Array([m.entity_id for m in messages]),
        "session": UuidArray([session.bytes for session in sessions]),
        "sequence": Int8Array([m.sequence for m in messages]),
    }
