"""A change batch that is larger than the log takes, in pieces. Pure.

The changes of a batch, in the order doubles, int64s, bools, strings, are halved until every piece fits. A piece's
number is its place in that tree: the whole would be 1, its halves are 2 and 3, those of 2 are 4 and 5, and so on. So a
number stands for the same changes for ever. Were the pieces just counted, "piece 1" would mean something else after
the topic's limit was changed, and a consumer that saw the old piece 1 would take the new one for a repetition.
"""

from collections.abc import Iterator
from typing import Any

from atlasco.telemetry.v1 import change_pb2

_COLUMNS = ("doubles", "int64s", "bools", "strings")


class ChangeTooLarge(Exception):
    """A single change is larger than the topic takes: raise the topic's max.message.bytes."""


def split(value: bytes, limit: int) -> Iterator[bytes]:
    """A serialized ChangeBatch as serialized pieces of at most `limit` bytes each.

    Raises:
        ChangeTooLarge: not even a single change fits.
        google.protobuf.message.DecodeError: the value is no ChangeBatch.
    """
    batch = change_pb2.ChangeBatch.FromString(value)
    todo = [(1, 0, sum(len(getattr(batch, name).entities) for name in _COLUMNS))]
    while todo:
        number, start, stop = todo.pop()
        piece = _piece(batch, number, start, stop).SerializeToString()
        if len(piece) <= limit:
            yield piece
        elif stop - start <= 1:
            raise ChangeTooLarge(f"a change takes {len(piece)} bytes and the topic no more than {limit}")
        else:
            middle = (start + stop) // 2
            todo += [(2 * number + 1, middle, stop), (2 * number, start, middle)]


def _piece(batch: change_pb2.ChangeBatch, number: int, start: int, stop: int) -> change_pb2.ChangeBatch:
    piece = change_pb2.ChangeBatch(
        batch_id=batch.batch_id,
        tenant_id=batch.tenant_id,
        tenant=batch.tenant,
        bucket=batch.bucket,
        op=batch.op,
        base_time_us=batch.base_time_us,
        part=number,
    )
    # Names are often most of a batch: a piece carries those it needs.
    entities: dict[int, int] = {}
    attributes: dict[int, int] = {}
    before = 0
    for name in _COLUMNS:
        source: Any = getattr(batch, name)
        size = len(source.entities)
        first, end = max(start - before, 0), min(stop - before, size)
        before += size
        if first >= end:
            continue
        target: Any = getattr(piece, name)
        target.entities.extend(entities.setdefault(i, len(entities)) for i in source.entities[first:end])
        target.attributes.extend(attributes.setdefault(i, len(attributes)) for i in source.attributes[first:end])
        for parallel in ("time_deltas_us", "values", "revisions"):
            getattr(target, parallel).extend(getattr(source, parallel)[first:end])
    if start == 0:
        # That a device is gone belongs to no reading: the first piece says it.
        for i, entity in enumerate(batch.entities):
            if entity.gone:
                entities.setdefault(i, len(entities))
    piece.entities.extend(batch.entities[i] for i in entities)
    piece.attributes.extend(batch.attributes[i] for i in attributes)
    return piece
