import math

import numpy as np
import pytest
from atlasco.telemetry.v1 import ingest_pb2
from hypothesis import given
from hypothesis import strategies as st

from device.dictionary import Attribute, Dictionary, ValueType
from device.errors import MessageTooLargeError, UndefinedAttributeError, ValueMismatchError
from device.packing import Column, Packed, PackingLimits, count_readings, iterate, pack, pack_columns
from device.wire import FRAME_OVERHEAD, data_frame, varint

DICTIONARY = Dictionary(
    [
        Attribute("d", ValueType.DOUBLE),
        Attribute("i", ValueType.INT64),
        Attribute("b", ValueType.BOOL),
        Attribute("s", ValueType.STRING),
    ]
)
TIMES = st.integers(-(2**61), 2**61)
READINGS = st.lists(
    st.one_of(
        st.tuples(st.just("d"), TIMES, st.floats()),
        st.tuples(st.just("i"), TIMES, st.integers(-(2**63), 2**63 - 1)),
        st.tuples(st.just("b"), TIMES, st.booleans()),
        st.tuples(st.just("s"), TIMES, st.text(max_size=30)),
    ),
    max_size=60,
)


def order_by_type(readings):
    return sorted(readings, key=lambda reading: "dibs".index(reading[0]))


def equal(one, other):
    return repr(one) == repr(other)


@given(READINGS, st.integers(1, 50), st.integers(300, 3000))
def test_what_is_packed_comes_out_in_index_order(readings, most, size):
    limits = PackingLimits(max_readings_per_message=most, max_message_bytes=size)
    packed = pack(readings, DICTIONARY, limits)
    unpacked = [reading for one in packed for reading in iterate(one.payload, DICTIONARY)]
    assert equal([tuple(reading) for reading in unpacked], order_by_type(readings))
    for one in packed:
        assert 1 <= one.count <= most
        assert len(one.payload) + FRAME_OVERHEAD <= size
        assert count_readings(ingest_pb2.Readings.FromString(one.payload)) == one.count


@given(st.integers(0, 2**64 - 1), READINGS)
def test_a_frame_is_the_protobuf_message(sequence, readings):
    for one in pack(readings, DICTIONARY, PackingLimits()):
        frame = data_frame(sequence, one.payload)
        request = ingest_pb2.StreamTelemetryRequest.FromString(frame)
        assert request.data.sequence == sequence
        assert request.data.readings.SerializeToString() == one.payload
        assert len(frame) <= len(one.payload) + FRAME_OVERHEAD


@pytest.mark.parametrize(("number", "encoded"), [(0, b"\0"), (127, b"\x7f"), (300, b"\xac\x02")])
def test_varint(number, encoded):
    assert varint(number) == encoded


def test_numpy_columns_equal_lists():
    times = [5, 6, 7]
    lists = pack_columns(PackingLimits(), doubles=Column([1, 1, 1], times, [0.5, math.inf, -0.0]))
    arrays = pack_columns(
        PackingLimits(),
        doubles=Column(np.array([1, 1, 1]), np.array(times), np.array([0.5, math.inf, -0.0])),
    )
    assert lists == arrays


def test_one_time_needs_no_deltas():
    [packed] = pack_columns(PackingLimits(), int64s=Column([1, 2], [9, 9], [1, 2]))
    message = ingest_pb2.Readings.FromString(packed.payload)
    assert (message.base_time_us, list(message.int64s.time_deltas_us)) == (9, [])


@pytest.mark.parametrize(
    ("reading", "error"),
    [
        pytest.param(("x", 1, 1), UndefinedAttributeError, id="undefined"),
        pytest.param(("i", 1, 1.0), ValueMismatchError, id="a fraction for an integer"),
        pytest.param(("i", 1, 2**63), ValueMismatchError, id="beyond 64 bits"),
        pytest.param(("b", 1, 1), ValueMismatchError, id="a number for a flag"),
        pytest.param(("d", 1, True), ValueMismatchError, id="a flag for a number"),
        pytest.param(("d", 1, 10**400), ValueMismatchError, id="beyond a double"),
        pytest.param(("s", 1, b"x"), ValueMismatchError, id="bytes for text"),
        pytest.param(("i", 2**63, 1), ValueMismatchError, id="a time beyond 64 bits"),
        pytest.param(("s", 1, "x" * 3000), MessageTooLargeError, id="a text beyond the message"),
    ],
)
def test_what_cannot_be_packed(reading, error):
    with pytest.raises(error):
        pack([reading], DICTIONARY, PackingLimits(max_message_bytes=2000))


def test_columns_must_be_of_one_length():
    with pytest.raises(ValueMismatchError):
        pack_columns(PackingLimits(), bools=Column([1, 2], [1, 2], [True]))


def test_what_cannot_be_named_is_none():
    message = ingest_pb2.Readings(base_time_us=5)
    message.doubles.aliases.extend([1, 99])
    message.doubles.values.extend([1.0, 2.0])
    message.bools.aliases.extend([3])
    message.bools.values.extend([True, False])
    message.strings.aliases.extend([4])
    message.strings.values.extend([b"\xff"])
    assert list(iterate(message.SerializeToString(), DICTIONARY)) == [("d", 5, 1.0), None, None, None, None]
    assert Packed(b"", 0) == Packed(b"", 0)
