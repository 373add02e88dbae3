"""Names become attributes, literals get the attribute's type. What is left compares like with like.

Meaning, for `evaluate` and `compile` alike: a comparison is false for a device that has no such value or label, also
with !=. NaN is unequal to every number and neither less nor greater. Texts compare by code points.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import TypeAlias

from storage.filter.syntax import (
    All,
    Any,
    Anything,
    Condition,
    Expression,
    Field,
    FieldKind,
    FilterInvalid,
    Not,
    Number,
    Operator,
    Text,
)
from storage.model import Attribute, ValueType
from storage.reads.model import AttributeNotFound, LatestNotKept

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


@dataclass(frozen=True, slots=True)
class Comparison:
    """A typed condition.

    `value` is a float (finite), int (of 64 bits), bool or str, as `subject` is; None for HAS. With `open_ended`, =
    and != look at the beginning only.
    """

    kind: FieldKind
    # The label's key; else empty.
    key: str
    # Of kind ATTRIBUTE.
    attribute: Attribute | None
    operator: Operator
    value: float | int | bool | str | None
    open_ended: bool = False


@dataclass(frozen=True, slots=True)
class BoundAll:
    """Every part holds."""

    parts: tuple["Bound", ...]


@dataclass(frozen=True, slots=True)
class BoundAny:
    """At least one part holds."""

    parts: tuple["Bound", ...]


@dataclass(frozen=True, slots=True)
class BoundNot:
    """The part does not hold."""

    part: "Bound"


Bound: TypeAlias = BoundAll | BoundAny | BoundNot | Comparison

NOTHING = BoundAny(())
"""Never true."""


def attribute_names(expression: Expression) -> list[str]:
    """The attributes that a filter names, each once, in order."""
    return list(dict.fromkeys(c.field.key for c in _conditions(expression) if c.field.kind is FieldKind.ATTRIBUTE))


def bind(expression: Expression, attributes: Mapping[str, Attribute]) -> Bound:
    """The typed tree; `attributes` holds those of the named ones that exist.

    Raises:
        FilterInvalid: an operator or a literal does not fit its field.
        AttributeNotFound: an attribute does not exist.
        LatestNotKept: an attribute keeps no latest value, so there is nothing to compare.
    """
    match expression:
        case All(parts):
            return BoundAll(tuple(bind(part, attributes) for part in parts))
        case Any(parts):
            return BoundAny(tuple(bind(part, attributes) for part in parts))
        case Not(part):
            return BoundNot(bind(part, attributes))
        case Condition():
            return _bind_condition(expression, attributes)


def compared_attributes(bound: Bound) -> list[Attribute]:
    """The attributes whose values a typed tree needs, each once."""
    found: dict[int, Attribute] = {}
    for comparison in comparisons(bound):
        if comparison.attribute is not None:
            found[comparison.attribute.attribute_id] = comparison.attribute
    return list(found.values())


def comparisons(bound: Bound) -> Iterator[Comparison]:
    """All comparisons of a tree."""
    match bound:
        case BoundAll(parts) | BoundAny(parts):
            for part in parts:
                yield from comparisons(part)
        case BoundNot(part):
            yield from comparisons(part)
        case Comparison():
            yield bound


def needs_a_value(bound: Bound) -> bool:
    """Whether no device can match that has none of the attributes compared, whatever its name, type and labels."""
    return _without_values(bound) is False


def required_type(bound: Bound) -> str | None:
    """The device type that every match has, if the filter says so at its top level."""
    match bound:
        case Comparison(FieldKind.TYPE, operator=Operator.EQUAL, value=str(value), open_ended=False):
            return value
        case BoundAll(parts):
            return next((found for part in parts if (found := required_type(part)) is not None), None)
        case _:
            return None


def _without_values(bound: Bound) -> bool | None:
    """The outcome for a device without values; None: it depends on the device."""
    match bound:
        case BoundAll(parts):
            outcomes = [_without_values(part) for part in parts]
            return False if False in outcomes else None if None in outcomes else True
        case BoundAny(parts):
            outcomes = [_without_values(part) for part in parts]
            return True if True in outcomes else None if None in outcomes else False
        case BoundNot(part):
            outcome = _without_values(part)
            return None if outcome is None else not outcome
        case Comparison():
            return False if bound.kind is FieldKind.ATTRIBUTE else None


def _conditions(expression: Expression) -> Iterator[Condition]:
    match expression:
        case All(parts) | Any(parts):
            for part in parts:
                yield from _conditions(part)
        case Not(part):
            yield from _conditions(part)
        case Condition():
            yield expression


def _bind_condition(condition: Condition, attributes: Mapping[str, Attribute]) -> Bound:
    field = condition.field
    key = field.key if field.kind is FieldKind.LABEL else ""
    attribute = _attribute(field, attributes)
    value_type = attribute.type if attribute else ValueType.TEXT
    if isinstance(condition.literal, Anything):
        return Comparison(field.kind, key, attribute, Operator.HAS, None)
    match value_type:
        case ValueType.DOUBLE | ValueType.BIGINT:
            if not isinstance(condition.literal, Number):
                raise _wrong_literal(condition, "a number")
            _check_operator(condition, starts=False, orders=True)
            if value_type is ValueType.BIGINT:
                return _integer(condition, attribute, condition.literal)
            value = float(condition.literal.text)
            if not math.isfinite(value):
                raise _wrong_literal(condition, "a number that a double can hold")
            return Comparison(field.kind, key, attribute, condition.operator, value)
        case ValueType.BOOLEAN:
            if not isinstance(condition.literal, bool):
                raise _wrong_literal(condition, "true or false")
            _check_operator(condition, starts=False, orders=False)
            return Comparison(field.kind, key, attribute, condition.operator, condition.literal)
        case ValueType.TEXT:
            if not isinstance(condition.literal, Text):
                raise _wrong_literal(condition, "a text in quotes")
            return _text(condition, key, attribute, condition.literal)


def _attribute(field: Field, attributes: Mapping[str, Attribute]) -> Attribute | None:
    if field.kind is not FieldKind.ATTRIBUTE:
        return None
    attribute = attributes.get(field.key)
    if attribute is None:
        raise AttributeNotFound(field.key)
    if not attribute.keeps_latest:
        raise LatestNotKept(field.key)
    return attribute


def _text(condition: Condition, key: str, attribute: Attribute | None, literal: Text) -> Comparison:
    open_ended = literal.open_ended and condition.operator in (Operator.EQUAL, Operator.UNEQUAL)
    text = literal.text[:-1] if open_ended else literal.text
    return Comparison(condition.field.kind, key, attribute, condition.operator, text, open_ended)


def _integer(condition: Condition, attribute: Attribute | None, literal: Number) -> Bound:
    """A comparison of integers that means the same for every integer: 2.5 lies between 2 and 3."""
    try:
        exact = Decimal(literal.text)
    except InvalidOperation:
        raise _wrong_literal(condition, "a number with a smaller exponent") from None
    if not exact:
        # With an exponent that says nothing, and may be one of millions.
        exact = Decimal(0)
    # Beyond the range every integer is on one side; Decimal would write 1e999999 out.
    if exact.adjusted() > 20:
        exact = Decimal(2**65 if exact > 0 else -(2**65))
    floor = math.floor(exact) if exact.adjusted() > -40 else (-1 if exact < 0 else 0)
    whole = floor == exact
    operator, value = condition.operator, floor
    has = Comparison(FieldKind.ATTRIBUTE, "", attribute, Operator.HAS, None)
    if not whole:
        match operator:
            case Operator.EQUAL:
                return NOTHING
            case Operator.UNEQUAL:
                return has
            case Operator.LESS:
                operator = Operator.AT_MOST
            case Operator.AT_LEAST:
                operator = Operator.GREATER
            case _:
                pass
    if not INT64_MIN <= value <= INT64_MAX:
        above = value > INT64_MAX
        always = operator is Operator.UNEQUAL or (
            operator in (Operator.LESS, Operator.AT_MOST)
            if above
            else operator in (Operator.GREATER, Operator.AT_LEAST)
        )
        return has if always else NOTHING
    return Comparison(FieldKind.ATTRIBUTE, "", attribute, operator, value)


def _check_operator(condition: Condition, *, starts: bool, orders: bool) -> None:
    allowed = "= or !=" + (", < <= > >=" if orders else "") + (" or `starts with`" if starts else "")
    refused = (not starts and condition.operator is Operator.STARTS_WITH) or (
        not orders and condition.operator not in (Operator.EQUAL, Operator.UNEQUAL)
    )
    if refused:
        problem = f"{condition.operator.value!r} for {condition.field.key!r}"
        raise FilterInvalid(problem, condition.operator_position, allowed)


def _wrong_literal(condition: Condition, expected: str) -> FilterInvalid:
    match condition.literal:
        case Text():
            problem = "a text"
        case Number(text):
            problem = f"the number {text[:40]}"
        case literal:
            problem = f"{str(literal).lower()}"
    return FilterInvalid(f"{problem} for {condition.field.key!r}", condition.literal_position, expected)
