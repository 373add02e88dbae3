"""The fence: which messages of a batch a transaction may write, decided under locks it holds until it ends.

A device moves from gateway A to gateway B while A still holds one of its messages. B commits that message, sent again,
and a newer value for one of its keys; then A flushes the old value as if it were the newest. The fence stops A: every
hello raises the device's epoch, and a write under an older epoch is dropped.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

from storage.arrange import judge
from storage.binary import Int4Array, Int8Array, received_arrays
from storage.database import Connection
from storage.model import BatchMessage, Outcome
from storage.statements import statements

_SQL = statements("ingest.sql")

Fence: TypeAlias = Callable[[Connection, Sequence[BatchMessage]], Awaitable[list[Outcome]]]
"""Begins a write transaction: takes its locks and says what becomes of each message of the batch, in order.

Only committed messages are written. What the fence itself changes commits, or not, together with them.
"""


async def fence_streams(connection: Connection, messages: Sequence[BatchMessage]) -> list[Outcome]:
    """The fence of device streams. Messages of unary writes, which have no epoch, pass without a lock."""
    streams: dict[int, BatchMessage] = {}
    for message in messages:
        if message.epoch is not None:
            held = streams.get(message.entity_id)
            # Of two streams of one device only the newer can pass; of one stream the last message counts.
            if held is None or (held.epoch or 0, held.sequence) < (message.epoch, message.sequence):
                streams[message.entity_id] = message
    if not streams:
        return judge(messages, {})
    fenced = sorted(streams.values(), key=lambda m: (m.tenant_id, m.entity_id))
    parameters = {
        "tenant": Int4Array([m.tenant_id for m in fenced]),
        "entity": Int8Array([m.entity_id for m in fenced]),
        "epoch": Int8Array([m.epoch for m in fenced]),
        "sequence": Int8Array([m.sequence for m in fenced]),
    }
    async with connection.cursor(binary=True) as cursor:
        # In a pipeline BEGIN travels with the statement.
        async with connection.pipeline():
            await cursor.execute(_SQL["fence_streams"], parameters)
        entities, committed = received_arrays(cursor, ">i8", ">i8")
    return judge(messages, dict(zip(entities.tolist(), committed.tolist(), strict=True)))
