"""Page tokens fit the request that made them and no other."""

from typing import Any

import pytest
from atlasco.telemetry.v1 import admin_pb2, query_pb2
from hypothesis import assume, given
from hypothesis import strategies as st

from gateway.paging import PageTokens, pack_position, unpack_position
from gateway.status import Reason, Refusal
from storage.reads.model import Position

positions = st.builds(
    Position,
    entity=st.integers(0, 999),
    attribute=st.integers(0, 999),
    time_us=st.integers(-(2**63), 2**63 - 1),
    entity_id=st.integers(1, 2**63 - 1),
    taken=st.integers(0, 1_000_000),
)
names = st.lists(st.text(max_size=5).filter(lambda t: t.isprintable()), max_size=3)
requests = st.builds(
    query_pb2.ReadSeriesRequest,
    entities=names,
    attributes=names,
    start_time_us=st.integers(1, 3),
    end_time_us=st.integers(1, 3),
    descending=st.booleans(),
)
freshnesses = st.builds(query_pb2.Freshness, max_staleness_us=st.integers(0, 9), explain=st.booleans())


def with_token(request: Any, token: str, **changes: Any) -> Any:
    changed = type(request)()
    changed.CopyFrom(request)
    changed.page_token = token
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def refused(tokens: PageTokens, tenant: str, request: Any) -> bool:
    with pytest.raises(Refusal) as caught:
        tokens.open(tenant, request)
    return caught.value.reason is Reason.PAGE_TOKEN_INVALID


@given(positions)
def test_positions_survive_packing(position: Position) -> None:
    assert unpack_position(pack_position(position)) == position


@given(requests, positions, st.integers(-1, 2**31 - 1), freshnesses)
def test_a_token_opens_for_its_request_whatever_the_page_size_and_freshness(
    request: query_pb2.ReadSeriesRequest, position: Position, size: int, freshness: query_pb2.Freshness
) -> None:
    token = PageTokens(b"k").seal(pack_position(position), "acme", request)
    again = with_token(request, token, page_size=size)
    again.freshness.CopyFrom(freshness)
    assert PageTokens(b"k").open("acme", again) == pack_position(position)
    # The next token is made from a request that carries this one.
    assert PageTokens(b"k").seal(pack_position(position), "acme", again) == token


@given(requests, requests, positions)
def test_a_token_does_not_open_for_other_arguments(
    one: query_pb2.ReadSeriesRequest, other: query_pb2.ReadSeriesRequest, position: Position
) -> None:
    assume(one != other)
    token = PageTokens().seal(pack_position(position), "acme", one)
    assert refused(PageTokens(), "acme", with_token(other, token))


@given(requests, positions, st.data())
def test_a_changed_token_does_not_open(
    request: query_pb2.ReadSeriesRequest, position: Position, data: st.DataObject
) -> None:
    token = PageTokens().seal(pack_position(position), "acme", request)
    place = data.draw(st.integers(0, len(token) - 1))
    char = data.draw(st.characters(exclude_categories=["Cs"]))
    assume(token[place] != char)
    assert refused(PageTokens(), "acme", with_token(request, token[:place] + char + token[place + 1 :]))


@given(st.text(min_size=1, alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_other_text_is_refused(text: str) -> None:
    assert refused(PageTokens(), "acme", query_pb2.ListEntitiesRequest(page_token=text))


@pytest.mark.parametrize(
    ("tokens", "tenant", "request_type"),
    [
        (PageTokens(b"other"), "acme", query_pb2.ListAttributesRequest),
        (PageTokens(), "rival", query_pb2.ListAttributesRequest),
        (PageTokens(), "acme", query_pb2.ListEntitiesRequest),
    ],
    ids=["another key", "another tenant", "another method"],
)
def test_a_token_from_elsewhere_is_refused(tokens: PageTokens, tenant: str, request_type: Any) -> None:
    token = PageTokens().seal(b"name", "acme", query_pb2.ListAttributesRequest())
    assert refused(tokens, tenant, request_type(page_token=token))


@pytest.mark.parametrize(
    ("request_", "position", "token"),
    [
        pytest.param(
            query_pb2.ReadSeriesRequest(entities=["pump"], attributes=["t"], start_time_us=1, end_time_us=9),
            pack_position(Position(0, 0, 5, 3, 1)),
            "ups2oxA97XAiEZaNjoS50gAAAAAAAAAAAAAABQAAAAAAAAADAAAAAQ",
            id="series",
        ),
        pytest.param(
            query_pb2.FindEntitiesRequest(filter="t > 1", attributes=["t"]),
            b"pump",
            "kcSOdhUVyClyO9tAZ1SQSHB1bXA",
            id="search",
        ),
        pytest.param(
            admin_pb2.ListOperationsRequest(),
            bytes(24),
            "Dj1zTAoNwv8m0yCkIfTbEAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
            id="operations",
        ),
    ],
)
def test_tokens_of_earlier_releases_open(request_: Any, position: bytes, token: str) -> None:
    assert PageTokens(b"k").open("acme", with_token(request_, token, page_size=7)) == position


def test_labels_are_bound_in_any_order() -> None:
    one = query_pb2.ListEntitiesRequest(labels={"a": "1", "b": "2"})
    two = query_pb2.ListEntitiesRequest(labels={"b": "2", "a": "1"})
    token = PageTokens().seal(b"name", "acme", one)
    assert PageTokens().open("acme", with_token(two, token)) == b"name"
    assert refused(PageTokens(), "acme", with_token(query_pb2.ListEntitiesRequest(labels={"a": "1"}), token))
