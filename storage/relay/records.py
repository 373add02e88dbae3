"""What the log gets: the records of a page, and watermarks. Pure; the format is specified in change.proto."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from zlib import crc32

from atlasco.telemetry.v1 import change_pb2

from storage.relay.cursor import Batch
from storage.relay.split import split
from storage.times import microseconds

CHANGES_SCHEMA = b"atlasco.telemetry.v1.ChangeBatch/1"
WATERMARK_SCHEMA = b"atlasco.telemetry.v1.Watermark/1"

ENVELOPE_BYTES = 1024
"""More than key, headers and framing of a record ever take."""

Headers = list[tuple[str, str | bytes | None]]


@dataclass(frozen=True, slots=True)
class Record:
    """A record for one partition of the topic."""

    partition: int
    key: bytes | None
    value: bytes
    headers: Headers


def partition_of(key: bytes, partitions: int) -> int:
    """The partition of a key: CRC-32 modulo their number, which is also librdkafka's "consistent" partitioner."""
    return crc32(key) % partitions


def change_records(
    batches: Iterable[Batch], *, lane: int, complete_through: datetime | None, partitions: int, max_message_bytes: int
) -> Iterator[Record]:
    """The records of some batches: one for each frame, more where a frame is too large for the topic.

    `complete_through` is the lane's watermark before these batches; None when it has none yet. Frames are forwarded
    as they are; only one that must be split is decoded.

    Raises:
        google.protobuf.message.DecodeError: a payload is no OutboxPayload.
        storage.relay.split.ChangeTooLarge: a single change is larger than the topic takes.
    """
    common: Headers = [("kind", b"changes"), ("schema", CHANGES_SCHEMA), ("lane", b"%d" % lane)]
    if complete_through is not None:
        common.append(("watermark", b"%d" % microseconds(complete_through)))
    room = max_message_bytes - ENVELOPE_BYTES
    for batch in batches:
        headers = [*common, ("batch", batch.batch_id), ("xid", b"%d" % batch.xid)]
        for frame in change_pb2.OutboxPayload.FromString(batch.payload).frames:
            key = b"%d:%d" % (frame.tenant_id, frame.bucket)
            partition = partition_of(key, partitions)
            value = frame.change_batch
            for piece in (value,) if len(value) <= room else split(value, room):
                yield Record(partition, key, piece, headers)


def watermark_records(
    *, lane: int, lanes: int, partitions: int, complete_through: datetime, epoch: int
) -> Sequence[Record]:
    """The lane's watermark, a copy for every partition."""
    headers: Headers = [("kind", b"watermark"), ("schema", WATERMARK_SCHEMA), ("lane", b"%d" % lane)]
    watermark = change_pb2.Watermark(
        lane=lane,
        lanes=lanes,
        partitions=partitions,
        complete_through_us=microseconds(complete_through),
        lease_epoch=epoch,
    )
    records = []
    for partition in range(partitions):
        watermark.partition = partition
        records.append(Record(partition, None, watermark.SerializeToString(), headers))
    return records
