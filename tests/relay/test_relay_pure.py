"""Decisions of the relay without any I/O."""

from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from atlasco.telemetry.v1 import change_pb2
from hypothesis import given
from hypothesis import strategies as st

from storage.kafka import KafkaConfig, client_config, consumer_config, producer_config
from storage.leases import share
from storage.relay.cursor import Batch, Cursor, Page, Place, Recovery, after, end_of, open_in, recovery
from storage.relay.records import change_records, partition_of, watermark_records
from storage.relay.split import ChangeTooLarge, split
from storage.times import microseconds
from tests.relay.relay_support import change_batch, changes_of, payload_of

NOW = datetime(2026, 3, 1, 12, 0, 0, 123456, UTC)
PLACE = Place("7000", "00000001", NOW)
BATCH = UUID(int=1)


def page(*batches: Batch, last: bool, cursor: Cursor | None = None) -> Page:
    return Page(PLACE, cursor or Cursor(published="3:10:5"), "3:20:12", NOW, batches, last)


def test_a_finished_target_becomes_what_is_published() -> None:
    done = after(page(Batch(11, 1, b"", 1, b""), last=True), "topic")
    assert (done.published, done.published_through) == ("3:20:12", NOW)
    assert (done.target, done.target_at, done.sent_xid, done.sent_id) == (None, None, None, None)
    assert (done.server, done.timeline, done.topic_id) == ("7000", "00000001", "topic")


def test_within_a_target_the_cursor_moves_to_the_last_batch_sent() -> None:
    done = after(page(Batch(11, 1, b"", 1, b""), Batch(11, 2, b"", 1, b""), last=False), "topic")
    assert (done.published, done.published_through) == ("3:10:5", None)
    assert (done.target, done.target_at, done.sent_xid, done.sent_id) == ("3:20:12", NOW, 11, 2)


def test_snapshots_are_taken_apart() -> None:
    assert end_of("5:9:5,7") == "9"
    assert open_in("5:9:5,7") == ["5", "7"]
    assert open_in("5:5:") == []


STORED = Cursor(published="3:100:", server="7000", timeline="00000001", topic_id="topic")


@pytest.mark.parametrize(
    ("cursor", "place", "next_xid", "topic_id", "expected"),
    [
        pytest.param(Cursor(), PLACE, 3, "topic", Recovery.NONE, id="never stored"),
        pytest.param(STORED, PLACE, 100, "topic", Recovery.NONE, id="nothing changed"),
        pytest.param(STORED, Place("7001", "00000001", NOW), 900, "topic", Recovery.RENUMBER, id="copied elsewhere"),
        pytest.param(STORED, PLACE, 99, "topic", Recovery.RENUMBER, id="ids behind the cursor"),
        pytest.param(STORED, PLACE, 100, "other", Recovery.REWIND, id="another topic"),
        pytest.param(STORED, Place("7000", "00000002", NOW), 100, "topic", Recovery.REWIND, id="another timeline"),
        pytest.param(STORED, Place("7000", "00000001", NOW + timedelta(1)), 100, "topic", Recovery.NONE, id="restart"),
    ],
)
def test_recovery(cursor: Cursor, place: Place, next_xid: int, topic_id: str, expected: Recovery) -> None:
    assert recovery(cursor, place, next_xid, topic_id) is expected


@given(st.lists(st.uuids(), min_size=1, max_size=9, unique=True), st.integers(0, 64))
def test_shares_add_up_and_are_even(members: list[UUID], items: int) -> None:
    shares = [share(member, members, items) for member in members]
    assert sum(shares) == items
    assert max(shares) - min(shares) <= 1
    assert share(uuid4(), members, items) == 0


@given(
    st.one_of(
        st.lists(st.floats(allow_nan=False), min_size=1, max_size=60),
        st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=60),
        st.lists(st.booleans(), min_size=1, max_size=60),
        st.lists(st.text(max_size=40), min_size=1, max_size=60),
    ),
    st.integers(300, 1500),
    st.integers(0, 3),
)
def test_pieces_hold_each_change_once_and_fit(values: list[object], limit: int, revision: int) -> None:
    batch = change_batch(BATCH, values=values, revision=revision)
    pieces = list(split(batch.SerializeToString(), limit))
    assert all(len(piece) <= limit for piece in pieces)
    parsed = [change_pb2.ChangeBatch.FromString(piece) for piece in pieces]
    assert [change for piece in parsed for change in changes_of(piece)] == changes_of(batch)
    assert len({piece.part for piece in parsed}) == len(parsed)
    assert all(piece.part > 0 for piece in parsed)


def test_a_piece_number_means_the_same_changes_whatever_the_limit() -> None:
    batch = change_batch(BATCH, values=[i * 1.5 for i in range(1000)])
    meaning: dict[int, list[object]] = {}
    for limit in range(300, 20_000, 700):
        for piece in split(batch.SerializeToString(), limit):
            parsed = change_pb2.ChangeBatch.FromString(piece)
            assert meaning.setdefault(parsed.part, list(changes_of(parsed))) == changes_of(parsed)
    assert len(meaning) > 10


def test_pieces_of_several_types_carry_only_the_names_they_need() -> None:
    batch = change_batch(BATCH, values=[1.0, 2.0])
    batch.entities.add(entity_id=9, external_id="n" * 400)
    batch.attributes.add(attribute_id=8, name="text")
    batch.strings.entities.extend([1, 1])
    batch.strings.attributes.extend([1, 1])
    batch.strings.time_deltas_us.extend([0, 1])
    batch.strings.values.extend(["a" * 300, "b" * 300])
    pieces = [change_pb2.ChangeBatch.FromString(piece) for piece in split(batch.SerializeToString(), 900)]
    assert [change for piece in pieces for change in changes_of(piece)] == changes_of(batch)
    assert [[entity.external_id[:1] for entity in piece.entities] for piece in pieces] == [["d"], ["n"], ["n"]]


@pytest.mark.parametrize("limit", [400, 900, 20_000])
def test_the_first_piece_says_that_a_device_is_gone(limit: int) -> None:
    batch = change_batch(BATCH, values=[1.0] * 60, op=change_pb2.CHANGE_OP_DELETE)
    batch.entities[0].gone = True
    batch.entities.add(entity_id=9, gone=True)
    pieces = [change_pb2.ChangeBatch.FromString(piece) for piece in split(batch.SerializeToString(), limit)]
    assert all(piece.entities[0].gone for piece in pieces)
    assert [[e.entity_id for e in piece.entities[1:] if e.gone] for piece in pieces] == [[9], *[[]] * (len(pieces) - 1)]
    assert [change for piece in pieces for change in changes_of(piece)] == changes_of(batch)


def test_a_batch_without_changes_is_a_record() -> None:
    batch = change_pb2.ChangeBatch(batch_id=BATCH.bytes, tenant_id=1, op=change_pb2.CHANGE_OP_DELETE)
    batch.entities.add(entity_id=9, gone=True)
    (piece,) = split(batch.SerializeToString(), 400)
    assert change_pb2.ChangeBatch.FromString(piece).entities[0].gone


def test_a_single_change_that_does_not_fit_is_an_error() -> None:
    batch = change_batch(BATCH, values=["x" * 5000])
    with pytest.raises(ChangeTooLarge):
        list(split(batch.SerializeToString(), 1000))


def test_frames_are_forwarded_as_they_are() -> None:
    batches = [change_batch(BATCH, tenant=t, bucket=b) for t, b in ((1, 0), (1, 5), (700, 5))]
    row = Batch(77, 1, BATCH.bytes, 3, payload_of(batches))
    records = list(change_records([row], lane=2, complete_through=NOW, partitions=12, max_message_bytes=1_000_000))
    assert [record.value for record in records] == [batch.SerializeToString() for batch in batches]
    assert [record.key for record in records] == [b"1:0", b"1:5", b"700:5"]
    assert [record.partition for record in records] == [partition_of(k, 12) for k in (b"1:0", b"1:5", b"700:5")]
    headers = dict(records[0].headers)
    assert headers == {
        "kind": b"changes",
        "schema": b"atlasco.telemetry.v1.ChangeBatch/1",
        "lane": b"2",
        "watermark": str(microseconds(NOW)).encode(),
        "batch": BATCH.bytes,
        "xid": b"77",
    }


def test_a_watermark_goes_to_every_partition() -> None:
    records = watermark_records(lane=1, lanes=4, partitions=3, complete_through=NOW, epoch=9)
    assert [record.partition for record in records] == [0, 1, 2]
    marks = [change_pb2.Watermark.FromString(record.value) for record in records]
    assert [mark.partition for mark in marks] == [0, 1, 2]
    assert {(m.lane, m.lanes, m.partitions, m.complete_through_us, m.lease_epoch) for m in marks} == {
        (1, 4, 3, microseconds(NOW), 9)
    }


def test_partitions_are_those_of_the_consistent_partitioner() -> None:
    # The check value of CRC-32, by which implementations recognise each other.
    assert partition_of(b"123456789", 1 << 32) == 0xCBF43926
    assert {partition_of(b"%d:%d" % (t, b), 12) for t in range(20) for b in range(16)} == set(range(12))


def test_kafka_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="go together"):
        KafkaConfig(bootstrap_servers="b:9092", sasl_mechanism="PLAIN")
    with pytest.raises(ValueError, match="SASL_SSL"):
        KafkaConfig(bootstrap_servers="b:9092", sasl_mechanism="AWS_MSK_IAM", security_protocol="SASL_PLAINTEXT")
    with pytest.raises(ValueError, match="USERNAME"):
        KafkaConfig(bootstrap_servers="b:9092", sasl_mechanism="PLAIN", security_protocol="SASL_SSL")


def test_client_settings() -> None:
    config = KafkaConfig(
        bootstrap_servers="b:9092",
        security_protocol="SASL_SSL",
        sasl_mechanism="SCRAM-SHA-512",
        sasl_username="u",
        sasl_password="secret",
        ssl_ca_file="/ca.pem",
    )
    assert "secret" not in repr(config)
    client = client_config(config, "c")
    assert client["sasl.mechanisms"] == "SCRAM-SHA-512" and client["ssl.ca.location"] == "/ca.pem"
    producer = producer_config(config, "c", max_message_bytes=1000, timeout_s=2.5)
    assert (producer["enable.idempotence"], producer["acks"], producer["message.timeout.ms"]) == (True, "all", 2500)
    consumer = consumer_config(config, "c", "g")
    assert (consumer["enable.auto.commit"], consumer["auto.offset.reset"]) == (False, "error")


def test_msk_iam_signs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aws_msk_iam_sasl_signer", reason="the extra 'msk' is not installed")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    config = KafkaConfig(
        bootstrap_servers="b:9098",
        security_protocol="SASL_SSL",
        sasl_mechanism="AWS_MSK_IAM",
        aws_region="eu-central-1",
    )
    client = client_config(config, "c")
    assert client["sasl.mechanisms"] == "OAUTHBEARER"
    token, expiry = client["oauth_cb"]("")
    assert token and expiry > 1_700_000_000
