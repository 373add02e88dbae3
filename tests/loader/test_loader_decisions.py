"""The loader's pure parts: decoding, positions, snapshots, buffers, and what compaction merges."""

import numpy as np
import pytest
from atlasco.telemetry.v1 import change_pb2
from hypothesis import given
from hypothesis import strategies as st

from storage.loader.buffer import PartitionBuffer, due
from storage.loader.decode import DecodedChanges, DecodedWatermark, Undecodable, decode, headers_of
from storage.loader.position import Begin, Continue, Halted, decide
from storage.loader.snapshot import visible
from storage.model import ValueType
from storage.times import DAY_US
from storage.warehouse.catalog import CataloguedFile
from storage.warehouse.compaction import plan_merges
from storage.warehouse.port import LoadState, SnapshotFilter
from tests.warehouse_fixtures import T0, Record, change_record, doubles, watermark_record

STATE = LoadState(0, "topic", 10, 1)


def decoded(record: Record) -> DecodedChanges | DecodedWatermark:
    return decode(headers_of(record.headers), record.key, record.value)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.floats(allow_nan=False)), min_size=1, max_size=50))
def test_decoding_gives_back_what_was_written(rows: list[tuple[int, int, float]]) -> None:
    readings = [(entity, attribute, T0 + i, value) for i, (entity, attribute, value) in enumerate(rows)]
    found = decoded(change_record(readings, revision=2))
    assert isinstance(found, DecodedChanges)
    part = found.changes.columns[ValueType.DOUBLE]
    assert isinstance(part.value, np.ndarray)
    columns = (part.entity, part.attribute, part.ts_us, part.value)
    assert list(zip(*(c.tolist() for c in columns), strict=True)) == readings
    assert part.revision is not None
    assert set(part.revision.tolist()) == {2}


def test_the_identity_is_of_transaction_tenant_bucket_operation_and_part() -> None:
    options = {"batch_id": b"i" * 16, "tenant": 1, "bucket": 2, "part": 4, "deletes": False}
    others = {"batch_id": b"j" * 16, "tenant": 7, "bucket": 3, "part": 5, "deletes": True}
    keys = []
    for changes in ({}, *({name: value} for name, value in others.items())):
        found = decoded(change_record(doubles(3), **options | changes))
        assert isinstance(found, DecodedChanges)
        keys.append(found.changes.key)
    assert keys[0] == (b"i" * 16, 1, 2, False, 4)
    assert len(set(keys)) == len(keys) == 6


def test_a_device_that_is_gone_has_no_name() -> None:
    found = decoded(change_record(doubles(1, entity=1), deletes=True, gone=[2]))
    assert isinstance(found, DecodedChanges)
    assert (found.changes.entities, found.changes.gone, found.changes.rows) == ({1: "device-1"}, {2}, 1)
    empty = decoded(change_record([], gone=[2]))
    assert isinstance(empty, DecodedChanges)
    assert (empty.changes.entities, empty.changes.gone, empty.changes.rows) == ({}, {2}, 0)


def _gone_with_values() -> Record:
    record = change_record(doubles(3), bucket=4)
    batch = change_pb2.ChangeBatch.FromString(record.value)
    batch.entities[0].gone = True
    return Record(batch.SerializeToString(), record.headers, record.key)


def _changed(**fields: object) -> Record:
    record = change_record(doubles(3), bucket=4)
    batch = change_pb2.ChangeBatch.FromString(record.value)
    for name, value in fields.items():
        setattr(batch, name, value)
    return Record(batch.SerializeToString(), record.headers, record.key)


def _column(name: str, value: int) -> Record:
    record = change_record(doubles(3), bucket=4)
    batch = change_pb2.ChangeBatch.FromString(record.value)
    getattr(batch.doubles, name).append(value)
    return Record(batch.SerializeToString(), record.headers, record.key)


def _far_index() -> Record:
    record = change_record(doubles(3), bucket=4)
    batch = change_pb2.ChangeBatch.FromString(record.value)
    batch.doubles.entities[0] = 99
    return Record(batch.SerializeToString(), record.headers, record.key)


GOOD = change_record(doubles(3), bucket=4)


@pytest.mark.parametrize(
    "record",
    [
        pytest.param(Record(b"", GOOD.headers, GOOD.key), id="empty"),
        pytest.param(Record(GOOD.value[:-3], GOOD.headers, GOOD.key), id="torn"),
        pytest.param(Record(GOOD.value, [("kind", b"changes"), ("schema", b"ChangeBatch/99")], GOOD.key), id="newer"),
        pytest.param(Record(GOOD.value, [("kind", b"poem")], GOOD.key), id="kind"),
        pytest.param(_changed(batch_id=b"short"), id="batch-id"),
        pytest.param(_changed(op=0), id="operation"),
        pytest.param(_changed(op=2), id="deletion-with-values"),
        pytest.param(_changed(base_time_us=2**63 - 1), id="time-overflow"),
        pytest.param(_column("entities", 0), id="unequal-columns"),
        pytest.param(_column("revisions", 1), id="unequal-revisions"),
        pytest.param(_far_index(), id="index-out-of-range"),
        pytest.param(_gone_with_values(), id="values-of-what-is-gone"),
    ],
)
def test_what_cannot_be_read_says_what_it_may_touch(record: Record) -> None:
    with pytest.raises(Undecodable) as raised:
        decoded(record)
    assert (raised.value.tenant_id, raised.value.bucket, raised.value.affects_readings) == (1, 4, True)


def test_a_watermark_that_cannot_be_read_hides_no_reading() -> None:
    good = watermark_record(5)
    with pytest.raises(Undecodable) as raised:
        decoded(Record(b"\xff", good.headers))
    assert not raised.value.affects_readings


@pytest.mark.parametrize(
    ("xid", "seen"),
    [(94, True), (95, False), (96, True), (97, False), (99, True), (100, False), (2**40, False)],
)
def test_visibility_is_postgres_rule(xid: int, seen: bool) -> None:
    assert visible(xid, "95:100:95,97") is seen


@pytest.mark.parametrize(
    ("state", "topic", "low", "high", "kind"),
    [
        pytest.param(None, "topic", 0, 5, Begin, id="first-time"),
        pytest.param(None, "topic", 3, 5, Halted, id="first-time-too-late"),
        pytest.param(STATE, "topic", 0, 10, Continue, id="caught-up"),
        pytest.param(STATE, "topic", 10, 12, Continue, id="at-the-start"),
        pytest.param(STATE, "topic", 11, 12, Halted, id="gap"),
        pytest.param(STATE, "topic", 0, 9, Halted, id="truncated"),
        pytest.param(STATE, "other", 0, 20, Halted, id="made-anew"),
    ],
)
def test_where_to_go_on(state: LoadState | None, topic: str, low: int, high: int, kind: type) -> None:
    assert isinstance(decide(state, topic, low, high), kind)


def test_a_buffer_keeps_offsets_contiguous_and_is_due_by_size_or_age() -> None:
    buffer = PartitionBuffer.at(STATE)
    assert buffer.take() is None
    assert not due([buffer], 1e9, age_s=0.0, size_bytes=0)
    found = decoded(change_record(doubles(3)))
    assert isinstance(found, DecodedChanges)
    buffer.add_changes(12, 100, 5.0, found)
    assert not buffer.expects(12)
    assert buffer.expects(13)
    assert not due([buffer], 6.0, age_s=2.0, size_bytes=101)
    assert due([buffer], 7.0, age_s=2.0, size_bytes=101)
    assert due([buffer], 5.0, age_s=2.0, size_bytes=100)
    unit = buffer.take()
    assert unit is not None
    assert (unit.first, unit.end) == (10, 13)
    assert buffer.take() is None
    buffer.pass_over(13, 1, 8.0)
    following = buffer.take()
    assert following is not None
    assert (following.first, following.end) == (13, 14)


def test_after_a_rebuild_only_what_it_lacks_is_taken() -> None:
    state = LoadState(0, "topic", 0, 2, "", SnapshotFilter("50:60:55", {1: T0 + 1_000_000}))
    rows = {}
    for name, options in {
        "held": {"xid": 40},
        "running": {"xid": 55},
        "later": {"xid": 70},
        "stranger": {"xid": 40, "tenant": 2},
    }.items():
        buffer = PartitionBuffer.at(state)
        found = decoded(change_record(doubles(3), **options))
        assert isinstance(found, DecodedChanges)
        buffer.add_changes(0, 1, 0.0, found)
        rows[name] = buffer.changes[0].rows
        assert bool(buffer.changes[0].entities) == (name in {"running", "later"}), "a device deleted since has no name"
    # The one reading before the floor is not in what the rebuild brought.
    assert rows == {"held": 1, "running": 3, "later": 3, "stranger": 0}
    with pytest.raises(Undecodable):
        found = decoded(change_record(doubles(1), xid=None))
        assert isinstance(found, DecodedChanges)
        PartitionBuffer.at(state).add_changes(0, 1, 0.0, found)


def _file(number: int, size: int, day: int = 0, kind: str = "base_double") -> CataloguedFile:
    return CataloguedFile(number, kind, f"{number}", 1, size, 1, 1, day * DAY_US, day * DAY_US + 1)


def test_small_files_of_a_day_are_merged_up_to_the_target() -> None:
    files = [_file(i, 30) for i in range(10)] + [_file(20, 90), _file(21, 10, day=1)]
    bins = plan_merges(files, target_bytes=100, least=3)
    assert [[f.file_id for f in b.files] for b in bins] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_corrected_files_are_rewritten_whatever_their_size() -> None:
    bins = plan_merges([_file(1, 90), _file(2, 90), _file(3, 5, day=3)], target_bytes=100, must={2, 3})
    assert sorted(f.file_id for b in bins for f in b.files) == [2, 3]
