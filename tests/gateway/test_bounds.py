"""Bounds that keep one client's input from filling a gateway's memory."""

import pytest
from atlasco.telemetry.v1 import ingest_pb2

from gateway.aliases import MAX_ALIAS, AliasTable
from gateway.decode import Received, decode, weight
from gateway.hello import check_hello
from gateway.status import Reason, Refusal
from storage.registry import Tenant

NOW = 1_700_000_000_000_000


@pytest.mark.parametrize(
    ("readings", "size", "expected"),
    [(0, 0, 1), (0, 12, 1), (100, 1_400, 100), (1, 1 << 20, 16_384), (10_000, 20_012, 10_000)],
    ids=["empty", "nearly-empty", "usual", "one-long-text", "booleans"],
)
def test_a_message_weighs_by_readings_or_by_bytes(readings: int, size: int, expected: int) -> None:
    assert weight(readings, size) == expected


def test_a_hello_cannot_define_more_aliases_than_there_are() -> None:
    hello = ingest_pb2.Hello(protocol_version=1, session_id=bytes(16))
    hello.dictionary.aliases.extend(ingest_pb2.AliasDefinition() for _ in range(MAX_ALIAS))
    check_hello(hello)
    hello.dictionary.aliases.add()
    with pytest.raises(Refusal) as refused:
        check_hello(hello)
    assert (refused.value.reason, refused.value.field) == (Reason.HELLO_INVALID, "dictionary.aliases")


@pytest.mark.parametrize("values", [500, 499], ids=["unknown alias", "lists of unequal length"])
def test_only_the_first_rejections_of_a_message_carry_a_text(values: int) -> None:
    column = ingest_pb2.DoubleColumn(aliases=[7] * 500, values=[1.0] * values)
    readings = ingest_pb2.Readings(base_time_us=NOW, doubles=column)
    tenant = Tenant(1, "acme", 3_600_000_000, 60_000_000, False)
    message = Received(tenant, 1, "d", AliasTable(), readings, size=5_000, count=500)
    [rejections] = decode([message], now_us=NOW, max_string_bytes=10).rejections
    assert [rejection.index for rejection in rejections] == list(range(500))
    assert [bool(rejection.text) for rejection in rejections] == [True] * 100 + [False] * 400
