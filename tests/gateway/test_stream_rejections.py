"""Bad readings get a typed rejection by index, and nothing good beside them is lost."""

import math

import pytest
from atlasco.telemetry.v1 import ingest_pb2

from tests.gateway.raw_stream import BOOL, DOUBLE, INT64, STRING, B, D, I, RawStream, S, now_us, readings
from tests.gateway.running_gateway import RunningGateway
from tests.gateway.stored import values
from tests.storage.conftest import Database

SECOND = 1_000_000
DAY = 86_400 * SECOND


@pytest.fixture
def t0() -> int:
    return now_us() - 60 * SECOND


async def one_message(
    gateway: RunningGateway, tenant: str, what: ingest_pb2.Readings, **hello: object
) -> dict[int | None, str]:
    """Send one message on a new stream; what was rejected of it."""
    stream = RawStream(gateway.channel, tenant, "d")
    await stream.hello(**hello)
    await stream.send(1, what)
    rejected = await stream.rejected(1)
    assert (await stream.half_close()).code == "OK"
    return rejected


async def test_unknown_alias(gateway: RunningGateway, module_database: Database, tenant: str, t0: int) -> None:
    what = readings(t0, doubles=[(D, 0, 1.0), (999, 0, 2.0), (0, 0, 3.0), (2**32 - 1, 0, 4.0), (D, 1, 5.0)])
    rejected = await one_message(gateway, tenant, what)
    assert rejected == dict.fromkeys([1, 2, 3], "UNKNOWN_ALIAS")
    assert values(module_database, tenant, "d") == {("temperature", t0): 1.0, ("temperature", t0 + 1): 5.0}


async def test_type_mismatch(gateway: RunningGateway, module_database: Database, tenant: str, t0: int) -> None:
    what = readings(
        t0,
        doubles=[(I, 0, 1.0), (D, 0, 1.5), (S, 0, 2.0)],
        int64s=[(I, 0, 7), (B, 0, 1)],
        bools=[(B, 0, True), (D, 5, False)],
        strings=[(S, 0, b"x"), (I, 9, b"9")],
    )
    rejected = await one_message(gateway, tenant, what)
    assert rejected == dict.fromkeys([0, 2, 4, 6, 8], "TYPE_MISMATCH")
    assert values(module_database, tenant, "d") == {
        ("temperature", t0): 1.5,
        ("rpm", t0): 7,
        ("door_open", t0): True,
        ("firmware", t0): "x",
    }


async def test_an_attribute_registered_with_another_type(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    assert not await one_message(gateway, tenant, readings(t0, doubles=[(D, 0, 1.0)]))
    stream = RawStream(gateway.channel, tenant, "other")
    welcome = await stream.hello(aliases={1: ("temperature", STRING), 2: ("rpm", INT64)})
    [error] = welcome.alias_errors
    assert (error.alias, error.reason) == (1, ingest_pb2.REJECTION_REASON_TYPE_MISMATCH)
    await stream.send(1, readings(t0, strings=[(1, 0, b"warm")], int64s=[(2, 0, 5)]))
    assert await stream.rejected(1) == {1: "TYPE_MISMATCH"}
    assert values(module_database, tenant, "other") == {("rpm", t0): 5}
    stream.drop()


async def test_values_at_the_edge_are_stored_as_they_are(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    doubles = [math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.7976931348623157e308]
    integers = [2**63 - 1, -(2**63), 0, -1]
    texts = ["", "x" * 4096, "é" * 2048, "\u0001\u007f\n", "\U0001f600"]
    what = readings(
        t0,
        doubles=[(D, i, value) for i, value in enumerate(doubles)],
        int64s=[(I, i, value) for i, value in enumerate(integers)],
        bools=[(B, 0, True), (B, 1, False)],
        strings=[(S, i, text.encode()) for i, text in enumerate(texts)],
    )
    assert not await one_message(gateway, tenant, what)
    stored = values(module_database, tenant, "d")
    assert [repr(stored["temperature", t0 + i]) for i in range(len(doubles))] == [repr(v) for v in doubles]
    assert [stored["rpm", t0 + i] for i in range(len(integers))] == integers
    assert [stored["firmware", t0 + i] for i in range(len(texts))] == texts
    assert [stored["door_open", t0 + i] for i in range(2)] == [True, False]


async def test_integers_for_a_double_are_widened_or_refused(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    exact = [0, -5, 2**53, -(2**53), 2**53 + 2, 2**62, -(2**63)]
    inexact = [2**53 + 1, -(2**53) - 1, 2**63 - 1, 2**62 + 1]
    what = readings(t0, int64s=[(D, i, value) for i, value in enumerate(exact + inexact)])
    rejected = await one_message(gateway, tenant, what)
    assert rejected == dict.fromkeys(range(len(exact), len(exact + inexact)), "VALUE_NOT_REPRESENTABLE")
    stored = values(module_database, tenant, "d")
    assert stored == {("temperature", t0 + i): float(value) for i, value in enumerate(exact)}
    assert all(isinstance(value, float) for value in stored.values())


async def test_an_alias_defined_as_integer_of_a_double_attribute(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    assert not await one_message(gateway, tenant, readings(t0, doubles=[(D, 0, 1.5)]))
    aliases = {7: ("temperature", INT64)}
    assert not await one_message(gateway, tenant, readings(t0, int64s=[(7, 1, 2)]), aliases=aliases)
    assert values(module_database, tenant, "d") == {("temperature", t0): 1.5, ("temperature", t0 + 1): 2.0}


async def test_the_last_message_wins_whatever_column_it_used(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    stream = RawStream(gateway.channel, tenant, "d")
    await stream.hello()
    await stream.send(1, readings(t0, int64s=[(D, 0, 1)]))
    await stream.send(2, readings(t0, doubles=[(D, 0, 2.5)]))
    assert not await stream.acks_through(2)
    assert values(module_database, tenant, "d") == {("temperature", t0): 2.5}
    stream.drop()


async def test_texts(gateway: RunningGateway, module_database: Database, tenant: str, t0: int) -> None:
    texts = [b"good", b"x" * 4097, b"\0", b"a\0b", b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"also good"]
    what = readings(t0, strings=[(S, i, text) for i, text in enumerate(texts)])
    rejected = await one_message(gateway, tenant, what)
    assert rejected == {1: "STRING_TOO_LONG", **dict.fromkeys(range(2, 7), "STRING_INVALID")}
    assert values(module_database, tenant, "d") == {("firmware", t0): "good", ("firmware", t0 + 7): "also good"}


async def test_timestamps(gateway: RunningGateway, module_database: Database, tenant: str, t0: int) -> None:
    cases = {
        "TIMESTAMP_INVALID": [0, -1, -(2**63), 2**63 - 1, 253_402_300_800_000_000],
        "TIMESTAMP_TOO_OLD": [1, t0 - 7 * DAY, 946_684_800_000_000],
        "TIMESTAMP_TOO_NEW": [now_us() + 700 * SECOND, 253_402_300_799_999_999],
    }
    times = [(time_us, reason) for reason, found in cases.items() for time_us in found]
    # From a base of zero, so that the deltas alone make the time.
    good = [t0, t0 - 6 * DAY, now_us() + 500 * SECOND]
    what = readings(0, doubles=[(D, time_us, 1.0) for time_us in (*(time for time, _ in times), *good)])
    rejected = await one_message(gateway, tenant, what)
    assert rejected == {i: reason for i, (_, reason) in enumerate(times)}
    assert values(module_database, tenant, "d") == {("temperature", time_us): 1.0 for time_us in good}


@pytest.mark.parametrize(
    ("base", "delta"),
    [(2**63 - 1, 1), (-(2**63), -1), (2**63 - 1, 2**63 - 1), (-(2**63), 2**63 - 1), (2**62, 2**62)],
    ids=["above", "below", "both far", "cancelling", "to the edge"],
)
async def test_a_base_and_a_delta_that_overflow(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int, base: int, delta: int
) -> None:
    stream = RawStream(gateway.channel, tenant, "d")
    await stream.hello()
    await stream.send(1, readings(base, doubles=[(D, delta, 1.0)]))
    await stream.send(2, readings(t0, doubles=[(D, 0, 2.0)]))
    assert await stream.rejected(1) == {0: "TIMESTAMP_INVALID"}
    await stream.acks_through(2)
    assert values(module_database, tenant, "d") == {("temperature", t0): 2.0}
    stream.drop()


async def test_a_column_of_unequal_lists_harms_no_other(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    what = readings(t0, int64s=[(I, 0, 5)], bools=[(B, 0, True)])
    what.doubles.aliases.extend([D, D, D])
    what.doubles.values.extend([1.0])
    what.strings.values.extend([b"nobody's"])
    rejected = await one_message(gateway, tenant, what)
    assert rejected == dict.fromkeys([0, 1, 2, 5], "COLUMN_LENGTH_MISMATCH")
    assert values(module_database, tenant, "d") == {("rpm", t0): 5, ("door_open", t0): True}


async def test_a_column_without_deltas_is_at_the_base_time(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    what = ingest_pb2.Readings(base_time_us=t0)
    what.doubles.aliases.extend([D, 9])
    what.doubles.values.extend([1.0, 2.0])
    assert not await one_message(gateway, tenant, what, aliases={D: ("a", DOUBLE), 9: ("b", DOUBLE)})
    assert values(module_database, tenant, "d") == {("a", t0): 1.0, ("b", t0): 2.0}


async def test_two_values_of_one_key_in_a_message(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    what = readings(
        t0,
        doubles=[(D, 0, 1.0), (D, 0, 2.0), (D, 1, math.nan), (D, 1, math.nan), (D, 0, 3.0)],
        int64s=[(D, 0, 4), (I, 0, 9), (I, 0, 9)],
    )
    rejected = await one_message(gateway, tenant, what)
    # The same value twice is no conflict; the double and the integer meet in one attribute.
    assert rejected == dict.fromkeys([0, 1, 4], "SUPERSEDED_IN_MESSAGE")
    stored = values(module_database, tenant, "d")
    assert stored.pop(("temperature", t0 + 1)) != stored
    assert stored == {("temperature", t0): 4.0, ("rpm", t0): 9}


async def test_a_bad_reading_of_every_kind_among_good_ones(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    bad = [(999, 0, 0.0), (I, 0, 0.0), (D, -t0, 0.0), (D, -8 * DAY, 0.0), (D, 3600 * SECOND, 0.0)]
    rows = []
    for i, row in enumerate(bad):
        rows += [(D, i, float(i)), row]
    rejected = await one_message(gateway, tenant, readings(t0, doubles=rows))
    assert rejected == {
        1: "UNKNOWN_ALIAS",
        3: "TYPE_MISMATCH",
        5: "TIMESTAMP_INVALID",
        7: "TIMESTAMP_TOO_OLD",
        9: "TIMESTAMP_TOO_NEW",
    }
    assert values(module_database, tenant, "d") == {("temperature", t0 + i): float(i) for i in range(len(bad))}


async def test_too_many_readings(gateway: RunningGateway, module_database: Database, tenant: str, t0: int) -> None:
    stream = RawStream(gateway.channel, tenant, "d")
    welcome = await stream.hello(aliases={D: ("temperature", DOUBLE), B: ("door_open", BOOL)})
    most = welcome.limits.max_readings_per_message
    await stream.send(1, readings(t0, bools=[(B, i, True) for i in range(most + 1)]))
    await stream.send(2, readings(t0, doubles=[(D, i, 1.0) for i in range(most)]))
    assert await stream.rejected(1) == {None: "TOO_MANY_READINGS"}
    assert not await stream.acks_through(2)
    assert len(values(module_database, tenant, "d")) == most
    stream.drop()


async def test_a_message_over_the_soft_limit_is_rejected_and_the_stream_goes_on(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    stream = RawStream(gateway.channel, tenant, "d")
    welcome = await stream.hello()
    text = b"x" * 4096
    await stream.send(1, readings(t0, strings=[(S, i, text) for i in range(welcome.limits.max_message_bytes // 4000)]))
    await stream.send(2, readings(t0, doubles=[(D, 0, 1.0)]))
    assert await stream.rejected(1) == {None: "MESSAGE_TOO_LARGE"}
    await stream.acks_through(2)
    assert values(module_database, tenant, "d") == {("temperature", t0): 1.0}
    stream.drop()
