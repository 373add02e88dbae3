"""The hello's parts on their own: names, aliases, and dictionaries that are resolved once."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import pytest
from atlasco.telemetry.v1 import common_pb2, ingest_pb2
from hypothesis import given
from hypothesis import strategies as st

from gateway.aliases import MAX_ALIAS, AliasTable, brief, check, define, name_problem
from gateway.auth import Identity, IdentityKind
from gateway.hello import Dictionaries, device_name
from gateway.status import Refusal
from storage.model import Attribute, Reason, ValueType
from storage.registry import AttributeWanted, Tenant

TENANT = Tenant(1, "t", 1, 1, False)
DOUBLE = common_pb2.ATTRIBUTE_TYPE_DOUBLE


class FakeRegistry:
    """Registers what it is asked for, of the names it knows a refusal for excepted."""

    def __init__(self, **refusals: str) -> None:
        self.refusals = refusals
        self.asked = 0
        self.dictionaries: dict[UUID, bytes] = {}

    async def attributes(self, tenant: Tenant, wanted: Sequence[AttributeWanted]) -> dict[str, Attribute | str]:
        self.asked += 1
        return {
            one.name: self.refusals.get(one.name) or Attribute(len(one.name), one.name, one.type, True)
            for one in wanted
        }

    async def find_dictionary(self, tenant: Tenant, dictionary_id: UUID) -> bytes | None:
        return self.dictionaries.get(dictionary_id)

    async def store_dictionary(self, tenant: Tenant, dictionary_id: UUID, definition: bytes) -> bytes:
        return self.dictionaries.setdefault(dictionary_id, definition)


def definition(alias: int, name: str, kind: Any = DOUBLE, unit: str = "") -> ingest_pb2.AliasDefinition:
    return ingest_pb2.AliasDefinition(alias=alias, name=name, type=kind, unit=unit)


@pytest.mark.parametrize("name", ["a", "é" * 64, "a b", "\u200b", "x" * 128, "\U0001f600"])
def test_names(name: str) -> None:
    assert name_problem(name) is None


@pytest.mark.parametrize("name", ["", "x" * 129, "é" * 65, "a\0", "\n", "\x7f", "\x80", "\u0085", "\u009f"])
def test_no_names(name: str) -> None:
    assert name_problem(name) is not None


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=300))
def test_a_text_for_a_person_is_brief(text: str) -> None:
    assert len(brief(text).encode()) <= 200
    if len(text.encode()) <= 200:
        assert brief(text) == text


def test_who_may_be_named() -> None:
    device = Identity("t", IdentityKind.DEVICE, "d")
    service = Identity("t", IdentityKind.SERVICE, "s")
    assert device_name(device, "", "f") == device_name(device, "d", "f") == "d"
    assert device_name(service, "any", "f") == "any"
    for identity, named in ((device, "other"), (service, "")):
        with pytest.raises(Refusal):
            device_name(identity, named, "f")


alias_numbers = st.one_of(st.integers(1, 6), st.integers(0, 2**32 - 1), st.just(MAX_ALIAS), st.just(MAX_ALIAS + 1))
names = st.sampled_from(["a", "b", "quota", "unknown", "", "x" * 129, "c\u0085"])
rounds = st.lists(st.lists(st.tuples(alias_numbers, names, st.integers(0, 5)), max_size=6), max_size=6)


@given(rounds)
async def test_an_alias_means_one_thing_for_ever(defined: list[list[tuple[int, str, int]]]) -> None:
    registry: Any = FakeRegistry(quota="quota", unknown="unknown")
    table = AliasTable()
    for one_round in defined:
        before = table
        asked = [definition(alias, name, kind) for alias, name, kind in one_round]
        table, problems = await define(registry, TENANT, table, asked, most_aliases=5)
        assert before.definitions.items() <= table.definitions.items()
        assert len(table.definitions) <= 5
        assert set(table.problems) <= set(range(1, MAX_ALIAS + 1))
        assert len(table.attribute) <= MAX_ALIAS + 2
        # The last element is for every alias beyond.
        assert table.reason[-1] == Reason.UNKNOWN_ALIAS
        told = {problem.alias for problem in problems}
        for alias, name, _ in one_round:
            usable = 0 < alias < len(table.reason) - 1 and table.reason[alias] == 0
            # Whatever cannot be used was said, now and every time it is defined again.
            assert usable or alias in told
            assert alias in told or table.definitions[alias][0] == name
        for alias, problem in table.problems.items():
            assert table.reason[alias] == problem.reason != 0


def test_a_table_does_not_change() -> None:
    empty = AliasTable()
    wanted, problems = check(empty, [definition(1, "a"), definition(1, "a"), definition(1, "b")], most_aliases=9)
    assert list(wanted) == [1]
    assert [problem.reason for problem in problems] == [Reason.ALIAS_REDEFINED]
    more = empty.with_aliases({1: ("a", ValueType.DOUBLE)}, {1: Attribute(1, "a", ValueType.DOUBLE, True)}, {})
    assert len(empty.attribute) == 1
    assert more.reason.tolist() == [Reason.UNKNOWN_ALIAS, 0, Reason.UNKNOWN_ALIAS]


async def test_equal_dictionaries_are_resolved_once_for_a_while() -> None:
    registry: Any = FakeRegistry()
    now = [0.0]
    dictionaries = Dictionaries(registry, most_aliases=9, clock=lambda: now[0])
    sent = ingest_pb2.Dictionary(aliases=[definition(1, "a")])
    first = await dictionaries.resolve(TENANT, sent)
    assert await dictionaries.resolve(TENANT, sent) is first
    assert await dictionaries.resolve(Tenant(2, "u", 1, 1, False), sent) is not first
    now[0] = 31.0
    assert await dictionaries.resolve(TENANT, sent) is not first
    assert registry.asked == 3


async def test_an_unknown_id_is_asked_for_again() -> None:
    registry: Any = FakeRegistry()
    dictionaries = Dictionaries(registry, most_aliases=9, clock=lambda: 0.0)
    by_id = ingest_pb2.Dictionary(id=b"x" * 16)
    unknown = await dictionaries.resolve(TENANT, by_id)
    assert unknown.status == ingest_pb2.Welcome.DICTIONARY_STATUS_UNKNOWN
    await dictionaries.resolve(TENANT, ingest_pb2.Dictionary(id=b"x" * 16, aliases=[definition(1, "a")]))
    known = await dictionaries.resolve(TENANT, by_id)
    assert known.status == ingest_pb2.Welcome.DICTIONARY_STATUS_DEFINED
    assert known.table.reason[1] == 0


async def test_what_is_remembered_of_dictionaries_has_a_bound() -> None:
    registry: Any = FakeRegistry()
    dictionaries = Dictionaries(registry, most_aliases=16_000, clock=lambda: 0.0)
    for number in range(30):
        aliases = [definition(16_000, "high"), definition(1, f"a{number}")]
        await dictionaries.resolve(TENANT, ingest_pb2.Dictionary(aliases=aliases))
    assert 1 <= len(dictionaries._cache) <= 6
    await dictionaries.resolve(TENANT, ingest_pb2.Dictionary(aliases=aliases))
    assert registry.asked == 30
