"""The relay with a real database and a real broker: what is committed arrives, whatever else happens."""

from collections import Counter
from uuid import UUID, uuid4

from atlasco.telemetry.v1 import change_pb2

from runtime.metrics import MemoryMetrics
from tests.relay.relay_support import LANES, PARTITIONS, Bench, change_batch, changes_of, insert, running
from tests.waiting import eventually


def arrived(bench: Bench) -> bool:
    return bench.read().contents() == bench.outbox()


async def test_what_is_committed_is_published_once_with_key_headers_and_watermarks(bench: Bench) -> None:
    bench.write(40)
    async with running(bench.relay()):
        await eventually(lambda: arrived(bench), "all changes in the topic")
        committed_by = bench.now_us()
        await eventually(lambda: (bench.read().complete_through() or 0) > committed_by, "watermarks")
    assert set(bench.log.seen().values()) == {1}
    records = bench.log.records(b"changes")
    assert len(records) == 120
    for message in records:
        batch = change_pb2.ChangeBatch.FromString(message.value())
        headers = dict(message.headers())
        assert message.key() == f"{batch.tenant_id}:{batch.bucket}".encode()
        assert headers["batch"] == batch.batch_id
        assert headers["schema"] == b"atlasco.telemetry.v1.ChangeBatch/1"
        assert int(headers["lane"]) in range(LANES)
        assert int(headers["xid"]) > 0
    marks = bench.log.watermarks()
    assert {(m.lane, m.partition) for m in marks} == {(x, p) for x in range(LANES) for p in range(PARTITIONS)}
    assert {(m.lanes, m.partitions) for m in marks} == {(LANES, PARTITIONS)}


async def test_a_backlog_is_drained_page_by_page_inside_one_snapshot(bench: Bench) -> None:
    with bench.connect() as connection:
        # One transaction, one xid, many rows: the page must also resume between rows of one transaction.
        for _ in range(50):
            batch_id = uuid4()
            insert(connection, 0, batch_id, [change_batch(batch_id)])
    bench.write(40)
    async with running(bench.relay(page_rows=7)):
        await eventually(lambda: arrived(bench), "all changes in the topic")
        assert set(bench.log.seen().values()) == {1}
    bench.write(30, values=[float(i) for i in range(2000)])
    async with running(bench.relay(page_bytes=1)):
        await eventually(lambda: arrived(bench), "all changes in the topic, a batch a page")
    assert set(bench.log.seen().values()) == {1}


async def test_an_open_transaction_neither_stalls_the_drain_nor_is_lost(bench: Bench) -> None:
    late = uuid4()
    with bench.connect() as stalled:
        insert(stalled, 1, late, [change_batch(late, bucket=5, values=[42.0])])
        async with running(bench.relay()):
            for _ in range(3):
                bench.write(20)
                committed_by = bench.now_us()
                await eventually(lambda: arrived(bench), "what others committed")
                await eventually(
                    lambda after=committed_by: (bench.read().complete_through() or 0) > after,
                    "a watermark past what others committed",
                )
            stalled.commit()
            after_commit = bench.now_us()
            await eventually(lambda: arrived(bench), "what the stalled transaction wrote")
    assert set(bench.log.seen().values()) == {1}
    # Honest: no watermark that stands before the late batch in its partition claims the moment of its commit.
    partition = next(p for p, found in bench.log.partitions.items() if any(m.key() == b"1:5" for m in found))
    messages = bench.log.partitions[partition]
    place = next(i for i, message in enumerate(messages) if message.key() == b"1:5")
    claims = [
        change_pb2.Watermark.FromString(message.value())
        for message in messages[:place]
        if dict(message.headers())["kind"] == b"watermark"
    ]
    claimed = max(mark.complete_through_us for mark in claims if mark.lane == 1)
    assert committed_by < claimed < after_commit
    # What the record itself says about the past is no newer.
    assert int(dict(messages[place].headers())["watermark"]) <= claimed


async def test_watermarks_never_claim_what_is_not_there(bench: Bench) -> None:
    """Each batch is stamped with a moment before its commit; a watermark past its commit must stand behind it."""
    committed: dict[str, int] = {}
    async with running(bench.relay(watermark_s=0.0, idle_watermark_s=0.0, poll_s=0.001)):
        for i in range(60):
            batch_id = uuid4()
            with bench.connect() as connection:
                insert(connection, i % LANES, batch_id, [change_batch(batch_id, bucket=i % 7)])
            # Read after the commit returned: the commit lies before this moment.
            committed[str(batch_id)] = bench.now_us()
        await eventually(lambda: arrived(bench), "all changes in the topic")
        await eventually(lambda: (bench.read().complete_through() or 0) > max(committed.values()), "watermarks")
    for messages in bench.log.partitions.values():
        claimed: Counter[int] = Counter()
        for message in messages:
            headers = dict(message.headers())
            lane = int(headers["lane"])
            if headers["kind"] == b"watermark":
                mark = change_pb2.Watermark.FromString(message.value())
                claimed[lane] = max(claimed[lane], mark.complete_through_us)
            else:
                assert claimed[lane] < committed[str(UUID(bytes=headers["batch"]))]


async def test_idle_lanes_keep_telling_how_far_they_are(bench: Bench) -> None:
    async with running(bench.relay()):
        for _ in range(3):
            now = bench.now_us()
            await eventually(
                lambda after=now: (bench.read().complete_through() or 0) > after, "watermarks without data"
            )
    assert not bench.log.records(b"changes")


async def test_writers_of_one_key_in_the_wrong_order_are_told_apart_by_revision(bench: Bench) -> None:
    first, second = uuid4(), uuid4()
    with bench.connect() as early, bench.connect() as late:
        # The earlier transaction id commits the correction, the later one the first value.
        early.execute("SELECT pg_current_xact_id()")
        insert(late, 2, first, [change_batch(first, values=[1.0])])
        late.commit()
        insert(early, 2, second, [change_batch(second, values=[2.0], revision=1)])
        early.commit()
    async with running(bench.relay()):
        await eventually(lambda: arrived(bench), "both changes")
    order = [change[6] for message in bench.log.batches() for change in changes_of(message)]
    assert order == [2.0, 1.0]
    newest: dict[tuple[int, str, int, int], tuple[int, float]] = {}
    for _, tenant, _, device, attribute, time_us, value, revision in bench.log.contents():
        key = (tenant, device, attribute, time_us)
        newest[key] = max(newest.get(key, (-1, 0.0)), (revision, value))
    assert list(newest.values()) == [(1, 2.0)]


async def test_a_record_larger_than_the_topic_takes_is_split(bench: Bench) -> None:
    metrics = MemoryMetrics()
    async with running(bench.relay(metrics)):
        bench.write(1)
        await eventually(lambda: arrived(bench), "the topic")
        with bench.connect() as connection:
            big, text, gone = uuid4(), uuid4(), uuid4()
            insert(connection, 0, big, [change_batch(big, values=[i * 0.5 for i in range(200_000)])])
            insert(connection, 0, text, [change_batch(text, values=["x" * 60_000 + str(i) for i in range(60)])])
            times = [0.0] * 300_000
            insert(connection, 0, gone, [change_batch(gone, values=times, op=change_pb2.CHANGE_OP_DELETE)])
        await eventually(lambda: arrived(bench), "the large batches")
    parts = [b.part for b in bench.log.batches() if b.batch_id == big.bytes]
    assert len(parts) > 1 and 0 not in parts and len(set(parts)) == len(parts)
    assert max(len(m.value()) for m in bench.log.records(b"changes")) <= 1_048_588
    assert metrics.value("atlasco_relay_failures", source="data") == 0
