"""The filter language: what parses, what is refused and where, and that nothing but a typed error comes out."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import StorageError
from storage.filter.bind import (
    Bound,
    BoundAll,
    BoundAny,
    Comparison,
    attribute_names,
    bind,
    needs_a_value,
    required_type,
)
from storage.filter.evaluate import Device, matches
from storage.filter.syntax import MAX_BYTES, MAX_CONDITIONS, MAX_DEPTH, FilterInvalid, parse
from storage.model import Attribute, ValueType
from storage.reads.model import AttributeNotFound, LatestNotKept

ATTRIBUTES = {
    "temperature": Attribute(1, "temperature", ValueType.DOUBLE, True),
    "count": Attribute(2, "count", ValueType.BIGINT, True),
    "on": Attribute(3, "on", ValueType.BOOLEAN, True),
    "status": Attribute(4, "status", ValueType.TEXT, True),
    "hidden": Attribute(5, "hidden", ValueType.TEXT, False),
    "type": Attribute(6, "type", ValueType.DOUBLE, True),
    "odd name": Attribute(7, "odd name", ValueType.DOUBLE, True),
}


def bound(text: str) -> Bound:
    return bind(parse(text), ATTRIBUTES)


def holds(text: str, **values: object) -> bool:
    ids = {ATTRIBUTES[name].attribute_id: value for name, value in values.items()}
    return matches(bound(text), Device("pump-1", "pump", {"site": "a"}, ids))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        ("temperature > 80", True),
        ("temperature>80 count<=3", True),
        ("temperature > 80 AND count = 4", False),
        ("temperature > 99 or count = 3", True),
        # AND binds tighter than OR.
        ("count = 3 OR temperature > 99 AND on = true", True),
        ("(count = 3 OR temperature > 99) AND on = true", False),
        ("NOT count = 4", True),
        ("-count = 4", True),
        ("-(count = 4 or on = false)", False),
        ("not not count = 3", True),
        ("count > 2.5", True),
        ("count >= 3.5", False),
        ("count = 3.0", True),
        ("count != 3.5", True),
        ("count < 1e999", True),
        ("count > -1e30", True),
        ("count = -5", False),
        ('status = "active"', True),
        ("status = 'active'", True),
        ('status = "act*"', True),
        (r'status = "act\*"', False),
        ('status != "act*"', False),
        ('status starts with "act"', True),
        ('status STARTS  WITH "x"', False),
        ('status >= "active" status < "b"', True),
        ("status:*", True),
        ('attributes."odd name":*', False),
        ('"odd name" != 3', False),
        ('NOT "odd name" != 3', True),
        ("attributes.type > 3", False),
        ('type = "pump"', True),
        ("type:*", True),
        ('name = "pump-*"', True),
        ('labels.site = "a" and labels."site" != "b"', True),
        ('labels.none != "b"', False),
        ("labels.none:*", False),
    ],
)
def test_what_a_filter_means(text: str, expected: bool) -> None:
    assert holds(text, temperature=80.5, count=3, on=False, status="active") is expected


@pytest.mark.parametrize("zero", ["0e30", "-0e25", "0e999999999", "0e-99999", "-0.0"])
def test_zero_is_zero_whatever_its_exponent(zero: str) -> None:
    for count in (-1, 0, 1):
        assert holds(f"count = {zero}", count=count) is (count == 0)
        assert holds(f"count < {zero}", count=count) is (count < 0)
        assert holds(f"count >= {zero}", count=count) is (count >= 0)


@pytest.mark.parametrize(
    ("text", "position", "expected"),
    [
        ("temperature >", 13, "a value"),
        ("temperature 80", 12, "an operator"),
        ("temperature ~ 80", 12, "an operator"),
        ("> 80", 0, "a condition"),
        ("(count = 3", 10, '")"'),
        ("count = 3)", 9, "the end"),
        ("count = 3 or", 12, "a condition"),
        ("count = 3 and or on = true", 14, "a field"),
        ("status = active", 9, "in quotes"),
        ('status = "active', 9, "a closing quote"),
        ("labels. = 3", 7, "a name after labels."),
        ('labels."" = "x"', 0, "a field"),
        ("status : 3", 9, "*"),
        ("temperature > 3x", 14, "a value"),
        # Of the wrong type: the position of the literal, or of the operator.
        ('temperature > "80"', 14, "a number"),
        ("temperature > true", 14, "a number"),
        ("temperature > 1e999", 14, "a double"),
        ("status = 3", 9, "a text"),
        ("on = 1", 5, "true or false"),
        ("on > true", 3, "= or !="),
        ("temperature starts with 3", 12, "= or !="),
        # In any case, but of these letters alone: this s is another one.
        ('name \u017ftarts with "d"', 5, "an operator"),
        ('name start\u017f with "d"', 5, "an operator"),
        ('name starts withä "d"', 5, "an operator"),
        # Bytes, not characters.
        ("labels.größe ? 3", 15, "an operator"),
        ('status = "a\0b"', 9, "without NUL"),
        ("\ud800", 0, "UTF-8"),
    ],
)
def test_what_is_refused_and_where(text: str, position: int, expected: str) -> None:
    with pytest.raises(FilterInvalid) as refused:
        bound(text)
    assert refused.value.position == position
    assert expected in refused.value.expected


def test_attributes_are_checked_against_the_registry() -> None:
    with pytest.raises(AttributeNotFound) as missing:
        bound("humidity > 3")
    assert missing.value.name == "humidity"
    with pytest.raises(LatestNotKept):
        bound('hidden = "x"')
    assert attribute_names(parse('a > 1 or (b = "x" and not a < 3) type = "t" labels.c = "d"')) == ["a", "b"]


@pytest.mark.parametrize(
    "text",
    [
        "count = 1 " * (MAX_CONDITIONS + 1),
        "(" * (MAX_DEPTH + 2) + "count = 1" + ")" * (MAX_DEPTH + 2),
        "not " * 500 + "count = 1",
        "-" * 4_000,
        'status = "' + "x" * MAX_BYTES + '"',
        'status = "' + "ü" * (MAX_BYTES // 2) + '"',
    ],
    ids=["conditions", "parentheses", "negations", "dashes", "bytes", "bytes-not-characters"],
)
def test_size_and_depth_are_bounded(text: str) -> None:
    with pytest.raises(FilterInvalid):
        parse(text)


def test_what_a_projection_needs_to_know() -> None:
    assert needs_a_value(bound("temperature > 80"))
    assert needs_a_value(bound('type = "pump" and (count = 3 or on = true)'))
    assert not needs_a_value(bound("not temperature > 80"))
    assert not needs_a_value(bound('count = 3 or type = "pump"'))
    assert not needs_a_value(bound(""))
    assert required_type(bound('count = 3 and type = "pump"')) == "pump"
    assert required_type(bound('count = 3 or type = "pump"')) is None
    assert required_type(bound('type = "pu*"')) is None


_PIECES = st.sampled_from(
    ["\u017ftarts with", "0e30",
     "count", "temperature", "on", "status", "type", "name", "labels.a", 'labels."b c"', "nothing", "attributes.type",
     "and", "OR", "not", "-", "(", ")", "=", "!=", "<", ">=", ":", "*", "starts with", "3", "-1.5e3", "1e9999999999",
     "1e-99999999999999999999", "true", '"x*"', "'y'", '"', "\\", "\0", "é", " ", "\n", "--", ";", "%s", "{}"]
)  # fmt: skip


@settings(max_examples=1500, deadline=None)
@given(st.one_of(st.lists(_PIECES, max_size=30).map(" ".join), st.lists(_PIECES, max_size=30).map("".join), st.text()))
def test_any_text_is_a_tree_or_a_typed_error(text: str) -> None:
    try:
        tree = bound(text)
    except (FilterInvalid, AttributeNotFound, LatestNotKept) as error:
        assert isinstance(error, StorageError)
        assert not isinstance(error, FilterInvalid) or 0 <= error.position <= len(text.encode(errors="replace"))
    else:
        assert isinstance(tree, BoundAll | BoundAny | Comparison) or tree is not None
        matches(tree, Device("x"))
