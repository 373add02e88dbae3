import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.buffer import Buffer
from device.dictionary import Attribute, Dictionary, ValueType
from device.errors import (
    AttributeRedefinedError,
    BufferFullError,
    ClientClosedError,
    JournalError,
    JournalInUseError,
    MessageTooLargeError,
)
from device.journal import Fsync, Journal, replay
from device.packing import Packed
from tests.waiting import PATIENCE_S


def packed(number, size=10):
    return Packed(bytes([number % 256]) * size, 1)


def contents(buffer):
    return [(message.sequence, message.payload) for message in buffer.iterate_from(1)]


def test_offer_takes_all_or_nothing():
    buffer = Buffer(max_messages=3)
    buffer.offer([packed(1), packed(2)])
    with pytest.raises(BufferFullError) as caught:
        buffer.offer([packed(3), packed(4)])
    assert caught.value.retriable
    assert len(buffer) == 2
    with pytest.raises(MessageTooLargeError):
        buffer.offer([packed(i) for i in range(4)])


def test_bytes_are_bounded():
    buffer = Buffer(max_bytes=100)
    buffer.offer([packed(1, 60)])
    with pytest.raises(BufferFullError):
        buffer.offer([packed(1, 60)])
    with pytest.raises(MessageTooLargeError):
        buffer.offer([packed(1, 101)])
    buffer.drop_through(1)
    assert buffer.bytes == 0
    buffer.offer([packed(1, 60)])


async def test_put_waits_in_turn():
    buffer = Buffer(max_messages=1)
    await buffer.put(packed(0))
    order = []

    async def put(number):
        await buffer.put(packed(number))
        order.append(number)

    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
        waiting = [tasks.create_task(put(number)) for number in (1, 2, 3)]
        await asyncio.sleep(0)
        with pytest.raises(BufferFullError):
            buffer.offer([packed(9)])
        while not all(task.done() for task in waiting):
            buffer.drop_through(buffer.last)
            await asyncio.sleep(0)
    assert order == [1, 2, 3]


async def test_a_failure_reaches_everyone_who_waits():
    buffer = Buffer(max_messages=1)
    await buffer.put(packed(0))
    waiting = [asyncio.create_task(buffer.put(packed(number))) for number in (1, 2)]
    await asyncio.sleep(0)
    buffer.fail(ClientClosedError("closed"))
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [ClientClosedError] * 2


def test_a_new_session_keeps_tickets_and_content():
    buffer = Buffer()
    tickets = [message.ticket for message in buffer.offer([packed(i) for i in range(5)])]
    buffer.drop_through(2)
    before = buffer.session_id
    buffer.start_new_session()
    assert buffer.session_id != before
    assert contents(buffer) == [(1, packed(2).payload), (2, packed(3).payload), (3, packed(4).payload)]
    assert [message.ticket for message in buffer.iterate_from(1)] == tickets[2:]
    assert [buffer.ticket(sequence) for sequence in (1, 2, 3)] == tickets[2:]
    assert buffer.offer([packed(9)])[0].ticket == 6
    assert (buffer.acked_ticket, buffer.last_ticket) == (2, 6)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("offer"), st.integers(1, 40)),
        st.tuples(st.just("drop"), st.integers(0, 50)),
        st.tuples(st.just("renew"), st.just(0)),
        st.tuples(st.just("define"), st.integers(0, 9)),
        st.tuples(st.just("reopen"), st.just(0)),
        st.tuples(st.just("crash"), st.just(0)),
    ),
    max_size=40,
)


@given(OPERATIONS, st.sampled_from(Fsync))
def test_a_file_holds_what_the_memory_holds(tmp_path_factory, operations, fsync):
    path = tmp_path_factory.mktemp("journal") / "buffer"
    buffer = Buffer.open(path, fsync=fsync)
    number = 0
    for name, argument in operations:
        if name == "offer":
            number += 1
            buffer.offer([packed(number, argument)])
        elif name == "drop":
            buffer.drop_through(argument)
        elif name == "renew":
            buffer.start_new_session()
        elif name == "define":
            buffer.define(Attribute(f"a{argument}", ValueType.INT64))
        else:
            held = [content for _, content in contents(buffer)]
            state = (buffer.session_id, contents(buffer), buffer.acked, buffer.last)
            definitions = list(buffer.dictionary)
            if name == "reopen":
                buffer.close()
            else:
                buffer._journal._release()
            buffer = Buffer.open(path, fsync=fsync)
            assert list(buffer.dictionary) == definitions
            if name == "crash" and fsync is Fsync.NEVER:
                # Numbers may have been lost with the power: the same content goes on in a new session.
                assert buffer.session_id != state[0]
                assert contents(buffer) == list(enumerate(held, 1))
            else:
                assert (buffer.session_id, contents(buffer), buffer.acked, buffer.last) == state
    buffer.close()


@given(st.data())
def test_a_torn_tail_is_cut_and_nothing_before_it_is_lost(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("journal") / "buffer"
    buffer = Buffer.open(path)
    sizes = [path.stat().st_size]
    for number in range(1, 6):
        buffer.offer([packed(number, 20)])
        sizes.append(path.stat().st_size)
    session_id = buffer.session_id
    buffer._journal._release()
    cut = data.draw(st.integers(sizes[0], sizes[-1]))
    path.write_bytes(path.read_bytes()[:cut])
    again = Buffer.open(path)
    whole = sum(size <= cut for size in sizes) - 1
    assert [sequence for sequence, _ in contents(again)] == list(range(1, whole + 1))
    assert again.session_id == session_id
    again.offer([packed(99)])
    again.close()
    final = Buffer.open(path)
    assert len(final) == whole + 1
    final.close()


def test_damage_in_the_middle_starts_a_new_session(tmp_path):
    path = tmp_path / "buffer"
    buffer = Buffer.open(path)
    buffer.offer([packed(1, 50)])
    position = path.stat().st_size
    buffer.offer([packed(2, 50), packed(3, 50)])
    session_id = buffer.session_id
    buffer.close()
    content = bytearray(path.read_bytes())
    content[position + 20] ^= 0xFF
    path.write_bytes(content)
    again = Buffer.open(path)
    assert again.session_id != session_id
    assert contents(again) == [(1, packed(1, 50).payload)]
    again.close()


def test_compaction_keeps_what_is_held(tmp_path):
    path = tmp_path / "buffer"
    journal = Journal(path, fsync=Fsync.NEVER, compact_above_bytes=2000)
    buffer = Buffer(journal=journal)
    buffer.define(Attribute("a", ValueType.BOOL))
    for number in range(200):
        buffer.offer([packed(number, 100)])
        buffer.drop_through(number - 2)
    assert path.stat().st_size < 4000
    before = (buffer.session_id, contents(buffer))
    buffer.close()
    again = Buffer.open(path)
    assert (again.session_id, contents(again)) == before
    assert len(again.dictionary) == 1
    again.close()


def test_one_file_has_one_owner(tmp_path):
    buffer = Buffer.open(tmp_path / "buffer")
    with pytest.raises(JournalInUseError):
        Buffer.open(tmp_path / "buffer")
    buffer.start_new_session()
    with pytest.raises(JournalInUseError):
        Buffer.open(tmp_path / "buffer")
    buffer.close()


def test_another_file_is_not_overwritten(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("something precious")
    with pytest.raises(JournalError):
        Buffer.open(path)
    assert path.read_text() == "something precious"


@given(st.binary(max_size=300))
def test_any_bytes_can_be_read(tail):
    state, size, _, _ = replay(b"ATLSBUF1" + tail)
    assert size <= 8 + len(tail)
    assert state.acked >= 0


def test_a_dictionary_is_append_only():
    dictionary = Dictionary([Attribute("a", ValueType.DOUBLE, "Cel")])
    assert dictionary.define(Attribute("a", ValueType.DOUBLE, "Cel")) == 1
    first = dictionary.id
    assert dictionary.define(Attribute("b", ValueType.BOOL)) == 2
    assert dictionary.id != first
    with pytest.raises(AttributeRedefinedError):
        dictionary.define(Attribute("a", ValueType.INT64))
    assert len(dictionary) == 2
