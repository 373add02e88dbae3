"""What a client and any server must achieve together; see the `server` fixture."""

import asyncio
import math

import pytest

from device.buffer import Buffer
from device.dictionary import ValueType
from device.errors import BufferFullError, UndefinedAttributeError, ValueMismatchError
from device.outcomes import Rejected
from device.packing import Column, Packed
from tests.waiting import PATIENCE_S

T0 = 1_790_000_000_000_000


def define_all(client):
    return [
        client.define("temperature", ValueType.DOUBLE, "Cel"),
        client.define("rpm", ValueType.INT64),
        client.define("door_open", ValueType.BOOL),
        client.define("firmware", ValueType.STRING),
    ]


@pytest.fixture
def t0():
    import time

    return time.time_ns() // 1000 - 60_000_000


async def test_all_types_arrive_typed(server, connect, t0):
    sent = {
        ("temperature", t0): -18.25,
        ("temperature", t0 + 1): math.inf,
        ("rpm", t0): -(2**63),
        ("rpm", t0 + 5): 2**63 - 1,
        ("door_open", t0): True,
        ("firmware", t0): "1.4.2-β",
    }
    async with connect() as client:
        define_all(client)
        await client.send([(name, time_us, value) for (name, time_us), value in sent.items()])
        await client.flush(PATIENCE_S)
    assert await server.readings("device-1") == sent
    assert client.statistics().acked_readings == len(sent)


async def test_columns_and_single_readings_are_the_same(server, connect, t0):
    async with connect() as client:
        temperature, rpm, _, firmware = define_all(client)
        await client.send_columns(
            doubles=Column([temperature] * 3, [t0, t0 + 1, t0 + 2], [1.0, 2.0, 3.0]),
            int64s=Column([rpm], t0, [7]),
            strings=Column([firmware], t0, ["x"]),
        )
        await client.flush(PATIENCE_S)
    assert await server.readings("device-1") == {
        ("temperature", t0): 1.0,
        ("temperature", t0 + 1): 2.0,
        ("temperature", t0 + 2): 3.0,
        ("rpm", t0): 7,
        ("firmware", t0): "x",
    }


async def test_a_long_list_is_split_within_the_limits(server, connect, t0):
    async with connect() as client:
        define_all(client)
        await client.send([("temperature", t0, 0.0)])
        await client.flush(PATIENCE_S)
        tickets = await client.send([("temperature", t0 + i, float(i)) for i in range(25_000)])
        assert len(tickets) >= 3
        await client.flush(PATIENCE_S)
    assert len(await server.readings("device-1")) == 25_000


async def test_everything_survives_interruptions(server, connect, t0):
    async with connect() as client:
        define_all(client)
        for i in range(200):
            await client.send([("temperature", t0 + i, float(i)), ("rpm", t0 + i, i)])
            if i % 40 == 20:
                await server.interrupt()
                await asyncio.sleep(0)
        await client.flush(PATIENCE_S)
    readings = await server.readings("device-1")
    assert len(readings) == 400
    assert all(readings["rpm", t0 + i] == i for i in range(200))
    statistics = client.statistics()
    assert statistics.acked_readings == 400
    assert statistics.sent_readings == 400


async def test_disconnects_on_request_send_again(server, connect, t0):
    async with connect(buffer=Buffer(max_messages=50)) as client:
        define_all(client)
        for i in range(300):
            await client.send([("rpm", t0 + i, i)])
            if i % 50 == 49:
                client.disconnect()
        await client.flush(PATIENCE_S)
    assert len(await server.readings("device-1")) == 300
    assert client.statistics().reconnects >= 1


async def test_rejections_name_the_reading_and_cost_no_other(server, connect, t0):
    rejected: list[Rejected] = []
    async with connect(on_rejections=rejected.extend) as client:
        temperature, *_ = define_all(client)
        [ticket] = await client.send(
            [("temperature", t0, 1.0), ("temperature", 0, 2.0), ("firmware", t0, "nul\0"), ("rpm", t0, 3)]
        )
        await client.send_columns(int64s=Column([999], t0, [1]), doubles=Column([temperature], t0 + 9, [4.5]))
        await client.flush(PATIENCE_S)
    found = {(one.ticket - ticket, one.index): (one.reason, one.reading) for one in rejected}
    assert found == {
        (0, 1): ("TIMESTAMP_INVALID", ("temperature", 0, 2.0)),
        (0, 3): ("STRING_INVALID", ("firmware", t0, "nul\0")),
        (1, 1): ("UNKNOWN_ALIAS", None),
    }
    assert await server.readings("device-1") == {
        ("temperature", t0): 1.0,
        ("rpm", t0): 3,
        ("temperature", t0 + 9): 4.5,
    }
    assert client.statistics().rejected_readings == 3
    assert client.statistics().acked_readings == 3


async def test_rejections_can_be_iterated(connect, t0):
    async with connect(on_rejections=None) as client:
        define_all(client)
        await client.send([("temperature", 0, 1.0), ("temperature", -5, 2.0), ("temperature", t0, 3.0)])
        await client.flush(PATIENCE_S)
        async with asyncio.timeout(PATIENCE_S):
            iterator = client.rejections()
            first, second = await anext(iterator), await anext(iterator)
            await iterator.aclose()
    assert [first.index, second.index] == [0, 1]


async def test_a_correction_wins(server, connect, t0):
    async with connect() as client:
        define_all(client)
        await client.send([("rpm", t0, 1)])
        await client.send([("rpm", t0, 2)])
        await client.flush(PATIENCE_S)
    assert await server.readings("device-1") == {("rpm", t0): 2}


async def test_aliases_can_be_added_while_streaming(server, connect, t0):
    async with connect() as client:
        client.define("a", ValueType.INT64)
        await client.send([("a", t0, 1)])
        await client.flush(PATIENCE_S)
        client.define("b", ValueType.INT64)
        await client.send([("b", t0, 2)])
        await client.flush(PATIENCE_S)
        await server.interrupt()
        client.define("c", ValueType.INT64)
        await client.send([("a", t0 + 1, 4), ("b", t0 + 1, 5), ("c", t0, 3)])
        await client.flush(PATIENCE_S)
    assert await server.readings("device-1") == {
        ("a", t0): 1,
        ("b", t0): 2,
        ("c", t0): 3,
        ("a", t0 + 1): 4,
        ("b", t0 + 1): 5,
    }


async def test_an_equal_device_can_say_its_dictionary_by_id(server, connect, t0):
    for device_id in ("first", "second", "third"):
        async with connect(device_id, settings={"dictionary_known": True}) as client:
            define_all(client)
            await client.send([("rpm", t0, 1)])
            await client.flush(PATIENCE_S)
        assert await server.readings(device_id) == {("rpm", t0): 1}


async def test_a_persistent_buffer_goes_on_where_the_process_ended(server, connect, t0, tmp_path):
    path = tmp_path / "buffer"
    client = connect(buffer=Buffer.open(path))
    define_all(client)
    async with client:
        await client.send([("rpm", t0, 1)])
        await client.flush(PATIENCE_S)
    held = Buffer.open(path)
    session_id = held.session_id
    from device.packing import PackingLimits, pack

    [packed] = pack([("rpm", t0 + 1, 2)], held.dictionary, PackingLimits())
    held.offer([packed])
    held.close()
    async with connect(buffer=Buffer.open(path)) as client:
        await client.flush(PATIENCE_S)
    assert await server.readings("device-1") == {("rpm", t0): 1, ("rpm", t0 + 1): 2}
    again = Buffer.open(path)
    assert (again.session_id, len(again), again.acked) == (session_id, 0, 2)
    again.close()


async def test_misuse_is_told_before_anything_is_buffered(connect):
    async with connect() as client:
        define_all(client)
        with pytest.raises(UndefinedAttributeError):
            await client.send([("humidity", T0, 1.0)])
        for name, value in (("rpm", 1.5), ("rpm", 2**63), ("rpm", True), ("firmware", 1), ("door_open", 1)):
            with pytest.raises(ValueMismatchError):
                await client.send([("temperature", T0, 1.0), (name, T0, value)])
        assert client.statistics().buffered_messages == 0


async def test_a_full_buffer_is_a_named_outcome(connect):
    async with connect("nobody", buffer=Buffer(max_messages=2)) as client:
        # Readings that no server has taken yet: the client has not had a turn to connect.
        await client.send_packed([Packed(b"", 0), Packed(b"", 0)], wait=False)
        with pytest.raises(BufferFullError):
            await client.send_packed([Packed(b"", 0)], wait=False)
        await client.flush(PATIENCE_S)


async def test_a_message_of_nothing_but_bad_readings(connect, t0):
    rejected: list[Rejected] = []
    async with connect(on_rejections=rejected.extend) as client:
        define_all(client)
        await client.send([("temperature", -1 - i, float(i)) for i in range(900)])
        await client.send([("rpm", t0, 1)])
        await client.flush(PATIENCE_S)
    assert [one.reading.value for one in rejected] == [float(i) for i in range(900)]
    assert (client.statistics().rejected_readings, client.statistics().acked_readings) == (900, 1)
