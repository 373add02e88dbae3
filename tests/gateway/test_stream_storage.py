"""What a stream does to latest values, quarantine, registry and dictionaries; notices; rejections told again."""

from typing import Any

import pytest
from atlasco.telemetry.v1 import ingest_pb2

from tests.gateway.raw_stream import (
    ALIASES,
    DOUBLE,
    INT64,
    D,
    I,
    RawStream,
    S,
    definitions,
    now_us,
    readings,
    reason_name,
)
from tests.gateway.running_gateway import RunningGateway, running_gateway
from tests.gateway.stored import changes, history, latest, rows, values
from tests.storage.conftest import Database

SECOND = 1_000_000
DAY = 86_400 * SECOND


@pytest.fixture
def t0() -> int:
    return now_us() - 3600 * SECOND


async def opened(gateway: RunningGateway, tenant: str, name: str = "d", **hello: Any) -> RawStream:
    stream = RawStream(gateway.channel, tenant, name)
    await stream.hello(**hello)
    return stream


async def make_tenant(gateway: RunningGateway, database: Database, tenant: str, settings: str) -> None:
    """A tenant with settings, before any gateway has it in mind."""
    rows(database, "SELECT register_tenant(%s)", tenant)
    rows(database, f"UPDATE tenants SET {settings} WHERE name = %s", tenant)


async def test_back_fill_leaves_latest_alone_but_a_correction_reaches_it(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    stream = await opened(gateway, tenant)
    await stream.send(1, readings(t0, doubles=[(D, 0, 1.0)]))
    await stream.acks_through(1)
    await stream.send(2, readings(t0, doubles=[(D, 10, 5.0), (D, -10, 4.0)], historical=True))
    await stream.acks_through(2)
    assert latest(module_database, tenant, "d") == {"temperature": (t0, 1.0)}
    # The very reading that latest holds, corrected by a back-fill; beside it one that was back-filled before.
    await stream.send(3, readings(t0, doubles=[(D, 0, 1.5), (D, 10, 5.5)], historical=True))
    await stream.acks_through(3)
    assert latest(module_database, tenant, "d") == {"temperature": (t0, 1.5)}
    await stream.send(4, readings(t0, doubles=[(D, 5, 2.0), (D, 3, 9.0)]))
    await stream.acks_through(4)
    assert latest(module_database, tenant, "d") == {"temperature": (t0 + 5, 2.0)}
    assert {key[1] - t0: value for key, value in history(module_database, tenant, "d").items()} == {
        0: (1.5, 1),
        10: (5.5, 1),
        -10: (4.0, 0),
        5: (2.0, 0),
        3: (9.0, 0),
    }
    stream.drop()


async def test_an_older_reading_does_not_move_latest(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    stream = await opened(gateway, tenant)
    for sequence, (delta, text) in enumerate([(0, b"a"), (-5, b"b"), (5, b"c"), (4, b"d")], 1):
        await stream.send(sequence, readings(t0, strings=[(S, delta, text)]))
        await stream.acks_through(sequence)
    assert latest(module_database, tenant, "d") == {"firmware": (t0 + 5, "c")}
    stream.drop()


async def test_an_attribute_that_keeps_no_latest(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    await make_tenant(gateway, module_database, tenant, "retention = retention")
    statement = """INSERT INTO attributes (tenant_id, name, type, keeps_latest)
                   SELECT tenant_id, 'temperature', 'double', false FROM tenants WHERE name = %s"""
    rows(module_database, statement, tenant)
    stream = await opened(gateway, tenant)
    await stream.send(1, readings(t0, doubles=[(D, 0, 1.0)], int64s=[(I, 0, 7)]))
    await stream.acks_through(1)
    assert latest(module_database, tenant, "d") == {"rpm": (t0, 7)}
    assert len(values(module_database, tenant, "d")) == 2
    stream.drop()


async def test_quarantine(gateway: RunningGateway, module_database: Database, tenant: str, t0: int) -> None:
    await make_tenant(gateway, module_database, tenant, "outside_window = 'quarantine'")
    stream = await opened(gateway, tenant)
    old, new = t0 - 8 * DAY, now_us() + DAY
    what = readings(0, doubles=[(D, old, 1.0), (D, t0, 2.0), (D, 0, 3.0)], strings=[(S, new, b"x")])
    await stream.send(1, what)
    await stream.acks_through(1)
    told = {one.index: (reason_name(one), one.quarantined) for one in stream.told}
    assert told == {
        0: ("TIMESTAMP_TOO_OLD", True),
        2: ("TIMESTAMP_INVALID", False),
        3: ("TIMESTAMP_TOO_NEW", True),
    }
    statement = """SELECT (extract(epoch FROM ts) * 1000000)::bigint, double_value, text_value, q.reason
                     FROM quarantine q JOIN tenants t USING (tenant_id) WHERE t.name = %s ORDER BY ts"""
    kept = rows(module_database, statement, tenant)
    assert [row[:3] for row in kept] == [(old, 1.0, None), (new, None, "x")]
    assert values(module_database, tenant, "d") == {("temperature", t0): 2.0}
    # Sent again it is not kept twice.
    await stream.send(1, what)
    await stream.next_ack()
    assert len(rows(module_database, statement, tenant)) == 2
    stream.drop()


async def test_an_open_window_takes_a_back_fill_of_years(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    await make_tenant(gateway, module_database, tenant, "window_past = '20 years', retention = '20 years'")
    stream = await opened(gateway, tenant)
    assert stream.welcome is not None
    assert stream.welcome.limits.window_past_us == 20 * 31_557_600 * SECOND
    times = [t0 - years * 365 * DAY for years in range(19)]
    await stream.send(1, readings(0, doubles=[(D, at, 1.0) for at in times]))
    assert not await stream.acks_through(1)
    assert set(values(module_database, tenant, "d")) == {("temperature", at) for at in times}
    # The operator closes the window again; the stream was opened under the old one and may still send.
    rows(module_database, "UPDATE tenants SET window_past = '1 day' WHERE name = %s", tenant)
    await stream.send(2, readings(0, doubles=[(D, t0 - 4000 * DAY, 1.0), (D, t0, 2.0)]))
    assert await stream.rejected(2) == {0: "TIMESTAMP_TOO_OLD"}
    assert values(module_database, tenant, "d")["temperature", t0] == 2.0
    stream.drop()


async def test_a_tenant_that_registers_nothing_by_itself(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    await make_tenant(gateway, module_database, tenant, "register_entities = false, register_attributes = false")
    stream = RawStream(gateway.channel, tenant, "d")
    await stream.say_hello(aliases={})
    end = await stream.ended()
    assert (end.code, end.reason) == ("PERMISSION_DENIED", "DEVICE_UNKNOWN")
    for statement in (
        "SELECT register_entity(tenant_id, 'd', '', '{}', true) FROM tenants WHERE name = %s",
        "SELECT register_attributes(tenant_id, '{rpm}', '{bigint}', '{\"\"}', true) FROM tenants WHERE name = %s",
    ):
        rows(module_database, statement, tenant)
    stream = RawStream(gateway.channel, tenant, "d")
    welcome = await stream.hello()
    assert {error.alias: reason_name(error) for error in welcome.alias_errors} == dict.fromkeys(
        set(ALIASES) - {I}, "ATTRIBUTE_UNKNOWN"
    )
    await stream.send(1, readings(t0, doubles=[(D, 0, 1.0)], int64s=[(I, 0, 7)]))
    assert await stream.rejected(1) == {0: "ATTRIBUTE_UNKNOWN"}
    assert values(module_database, tenant, "d") == {("rpm", t0): 7}
    stream.drop()


async def test_a_gateway_that_registers_no_tenants(module_database: Database, tenant: str) -> None:
    async with running_gateway(module_database, register_tenants=False) as strict:
        stream = RawStream(strict.channel, tenant, "d")
        await stream.say_hello()
        end = await stream.ended()
        assert (end.code, end.reason) == ("PERMISSION_DENIED", "DEVICE_UNKNOWN")
    assert rows(module_database, "SELECT 1 FROM tenants WHERE name = %s", tenant) == []


async def test_the_10_001st_attribute(module_database: Database, tenant: str, t0: int) -> None:
    async with running_gateway(module_database, max_aliases=16_000) as gateway:
        names = {alias: (f"a{alias}", DOUBLE) for alias in range(1, 10_002)}
        stream = await opened(gateway, tenant, aliases=names)
        assert stream.welcome is not None
        assert [(one.alias, reason_name(one)) for one in stream.welcome.alias_errors] == [
            (10_001, "ATTRIBUTE_QUOTA_EXCEEDED")
        ]
        await stream.send(1, readings(t0, doubles=[(alias, 0, 1.0) for alias in (1, 10_000, 10_001)]))
        assert await stream.rejected(1) == {2: "ATTRIBUTE_QUOTA_EXCEEDED"}
        # Asked again, it is said again.
        assert await stream.define({10_001: ("a10001", DOUBLE)}) == [(10_001, "ATTRIBUTE_QUOTA_EXCEEDED")]
        stream.drop()
    assert set(values(module_database, tenant, "d")) == {("a1", t0), ("a10000", t0)}


async def test_aliases_added_redefined_and_invalid(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    stream = await opened(gateway, tenant, aliases={1: ("a", DOUBLE)})
    assert await stream.define({1: ("a", DOUBLE), 2: ("b", INT64)}) == []
    assert await stream.define({1: ("other", DOUBLE), 2: ("b", DOUBLE)}) == [
        (1, "ALIAS_REDEFINED"),
        (2, "ALIAS_REDEFINED"),
    ]
    assert await stream.define(
        {3: ("", DOUBLE), 4: ("x" * 129, DOUBLE), 5: ("a\0b", DOUBLE), 6: ("c\u0085", DOUBLE)}
    ) == [(alias, "ATTRIBUTE_NAME_INVALID") for alias in (3, 4, 5, 6)]
    assert await stream.define({0: ("zero", DOUBLE), 16_384: ("far", DOUBLE), 7: ("typeless", 0), 8: ("odd", 99)}) == [
        (0, "ALIAS_OUT_OF_RANGE"),
        (16_384, "ALIAS_OUT_OF_RANGE"),
        (7, "ATTRIBUTE_DEFINITION_INVALID"),
        (8, "ATTRIBUTE_DEFINITION_INVALID"),
    ]
    await stream.send(1, readings(t0, doubles=[(1, 0, 1.0), (3, 0, 2.0), (6, 0, 3.0), (7, 0, 4.0), (16_384, 0, 5.0)]))
    assert await stream.rejected(1) == {
        1: "ATTRIBUTE_NAME_INVALID",
        2: "ATTRIBUTE_NAME_INVALID",
        3: "ATTRIBUTE_DEFINITION_INVALID",
        4: "UNKNOWN_ALIAS",
    }
    # A definition that failed was none: the alias is still free.
    assert await stream.define({3: ("three", DOUBLE)}) == []
    await stream.send(2, readings(t0, doubles=[(3, 1, 2.0)]))
    assert not await stream.acks_through(2)
    assert values(module_database, tenant, "d") == {("a", t0): 1.0, ("three", t0 + 1): 2.0}
    stream.drop()


@pytest.mark.parametrize("unit", ["x" * 33, "a\0", "\u0085"], ids=["long", "nul", "control"])
async def test_a_unit_that_cannot_be_stored(gateway: RunningGateway, tenant: str, unit: str) -> None:
    stream = RawStream(gateway.channel, tenant, "d")
    bad = ingest_pb2.AliasDefinition(alias=1, name="a", type=DOUBLE, unit=unit)
    welcome = await stream.hello(aliases={2: ("b", DOUBLE)}, dictionary=ingest_pb2.Dictionary(aliases=[bad]))
    assert [(one.alias, reason_name(one)) for one in welcome.alias_errors] == [(1, "ATTRIBUTE_DEFINITION_INVALID")]
    stream.drop()


async def test_a_dictionary_by_id(gateway: RunningGateway, module_database: Database, tenant: str, t0: int) -> None:
    dictionary_id = b"0123456789abcdef"
    by_id = ingest_pb2.Dictionary(id=dictionary_id)
    whole = ingest_pb2.Dictionary(id=dictionary_id, aliases=definitions(ALIASES))
    other = ingest_pb2.Dictionary(id=dictionary_id, aliases=definitions({1: ("x", DOUBLE)}))
    status = ingest_pb2.Welcome
    for name, sent, expected in (
        ("first", by_id, status.DICTIONARY_STATUS_UNKNOWN),
        ("second", whole, status.DICTIONARY_STATUS_DEFINED),
        ("third", by_id, status.DICTIONARY_STATUS_DEFINED),
    ):
        stream = await opened(gateway, tenant, name, aliases={}, dictionary=sent)
        assert stream.welcome is not None
        assert (stream.welcome.dictionary, list(stream.welcome.alias_errors)) == (expected, [])
        if expected == status.DICTIONARY_STATUS_UNKNOWN:
            await stream.define(ALIASES)
        await stream.send(1, readings(t0, doubles=[(D, 0, 1.0)]))
        assert not await stream.acks_through(1)
        stream.drop()
    stream = await opened(gateway, tenant, "fourth", aliases={}, dictionary=other)
    assert stream.welcome is not None
    assert [(one.alias, reason_name(one)) for one in stream.welcome.alias_errors] == [(1, "DICTIONARY_CONFLICT")]
    await stream.send(1, readings(t0, doubles=[(1, 0, 1.0)]))
    assert await stream.rejected(1) == {0: "DICTIONARY_CONFLICT"}
    stream.drop()
    # Of another tenant the same id is another dictionary.
    stream = await opened(gateway, f"{tenant}-other", aliases={}, dictionary=by_id)
    assert stream.welcome is not None
    assert stream.welcome.dictionary == status.DICTIONARY_STATUS_UNKNOWN
    stream.drop()


async def test_rejections_are_told_until_confirmed(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    first = await opened(gateway, tenant)
    for sequence in range(1, 4):
        await first.send(sequence, readings(t0, doubles=[(D, sequence, 1.0), (99, 0, 1.0)]))
    expected = [(sequence, 1, "UNKNOWN_ALIAS") for sequence in (1, 2, 3)]
    await first.acks_through(3)
    assert [(one.sequence, one.index, reason_name(one)) for one in first.told] == expected
    first.drop()
    for confirmed in (0, 1, 3):
        stream = RawStream(gateway.channel, tenant, "d", session=first.session)
        assert (await stream.hello()).committed_sequence == 3
        while len(stream.told) < len(expected):
            await stream.next_ack()
        assert [(one.sequence, one.index, reason_name(one)) for one in stream.told] == expected
        if confirmed:
            await stream.confirm(confirmed)
        assert (await stream.half_close()).code == "OK"
        expected = [one for one in expected if one[0] > confirmed]
    # All confirmed, and another session was never concerned.
    for session in (first.session, b""):
        stream = RawStream(gateway.channel, tenant, "d", session=session)
        await stream.hello()
        assert (await stream.half_close()).code == "OK"
        assert not stream.heard("ack")
    assert len(values(module_database, tenant, "d")) == 3


async def test_a_confirmation_does_not_reach_beyond_what_was_told(
    gateway: RunningGateway, tenant: str, t0: int
) -> None:
    stream = await opened(gateway, tenant)
    await stream.confirm(2**64 - 1)
    await stream.send(1, readings(t0, doubles=[(99, 0, 1.0)]))
    await stream.acks_through(1)
    again = RawStream(gateway.channel, tenant, "d", session=stream.session)
    await again.hello()
    assert [one.sequence for one in await again.next_ack()] == [1]
    again.drop()


async def test_more_rejections_than_one_ack_holds(gateway: RunningGateway, tenant: str, t0: int) -> None:
    stream = await opened(gateway, tenant)
    for sequence in range(1, 11):
        await stream.send(sequence, readings(t0, doubles=[(99, i, 1.0) for i in range(600)]))
    await stream.acks_through(10)
    found = sorted((one.sequence, one.index) for one in stream.told)
    assert found == [(sequence, i) for sequence in range(1, 11) for i in range(600)]
    stream.drop()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"idle_timeout": 0.2}, ingest_pb2.ReconnectNotice.REASON_IDLE),
        ({"max_stream_age": 0.2}, ingest_pb2.ReconnectNotice.REASON_MAX_AGE),
    ],
    ids=["idle", "old"],
)
async def test_a_stream_is_asked_to_leave(
    module_database: Database, tenant: str, t0: int, changes: dict[str, float], reason: int
) -> None:
    async with running_gateway(module_database, **changes) as gateway:
        stream = await opened(gateway, tenant)
        notice = (await stream.hear("reconnect_notice")).reconnect_notice
        drain_ms = gateway.config.drain_timeout * 1000
        assert (notice.reason, notice.drain_ms, notice.max_delay_ms) == (reason, drain_ms, 50)
        # What is still on its way counts.
        await stream.send(1, readings(t0, doubles=[(D, 0, 1.0)]))
        assert not await stream.acks_through(1)
        assert (await stream.half_close()).code == "OK"
    assert values(module_database, tenant, "d") == {("temperature", t0): 1.0}


async def test_a_stream_that_does_not_leave_is_ended_well(module_database: Database, tenant: str) -> None:
    async with running_gateway(module_database, drain_timeout=0.2, idle_timeout=0.2) as gateway:
        stream = await opened(gateway, tenant)
        await stream.hear("reconnect_notice")
        assert (await stream.ended()).code == "OK"


async def test_a_value_that_the_database_refuses(
    gateway: RunningGateway, module_database: Database, tenant: str, t0: int
) -> None:
    stream = await opened(gateway, tenant)
    await stream.send(1, readings(t0, doubles=[(D, -1, 0.0)]))
    await stream.acks_through(1)
    [(leaf,)] = rows(
        module_database,
        "SELECT DISTINCT h.tableoid::regclass::text FROM entity_attributes_double h JOIN tenants t USING (tenant_id) "
        "WHERE t.name = %s",
        tenant,
    )
    rows(module_database, f"ALTER TABLE {leaf} ADD CONSTRAINT refuses CHECK (value <> 666)")
    try:
        poisoned = [(D, i, 666.0 if i in (3, 17) else float(i)) for i in range(40)]
        await stream.send(2, readings(t0, doubles=poisoned, int64s=[(I, 0, 7)], strings=[(S, 0, b"fine")]))
        await stream.send(3, readings(t0, doubles=[(D, 100, 1.0)]))
        assert await stream.rejected(2) == dict.fromkeys([3, 17], "STORAGE_REFUSED")
        await stream.acks_through(3)
    finally:
        rows(module_database, f"ALTER TABLE {leaf} DROP CONSTRAINT refuses")
    stored = values(module_database, tenant, "d")
    assert len(stored) == 1 + 38 + 2 + 1
    assert 666.0 not in stored.values()
    assert len(changes(module_database, tenant)) == len(stored)
    stream.drop()
