"""What a filter means, in Python: the reference that the SQL is tested against."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from storage.filter.bind import Bound, BoundAll, BoundAny, BoundNot, Comparison
from storage.filter.syntax import FieldKind, Operator
from storage.reads.model import Scalar


@dataclass(frozen=True, slots=True)
class Device:
    """A device in memory; values by attribute id."""

    name: str
    entity_type: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[int, Scalar] = field(default_factory=dict)


def matches(bound: Bound, device: Device) -> bool:
    """Whether the device meets the conditions."""
    match bound:
        case BoundAll(parts):
            return all(matches(part, device) for part in parts)
        case BoundAny(parts):
            return any(matches(part, device) for part in parts)
        case BoundNot(part):
            return not matches(part, device)
        case Comparison():
            return _holds(bound, _value(bound, device))


def _value(comparison: Comparison, device: Device) -> Scalar | None:
    match comparison.kind:
        case FieldKind.TYPE:
            return device.entity_type or (None if comparison.operator is Operator.HAS else "")
        case FieldKind.NAME:
            return device.name
        case FieldKind.LABEL:
            return device.labels.get(comparison.key)
        case FieldKind.ATTRIBUTE:
            assert comparison.attribute is not None
            return device.values.get(comparison.attribute.attribute_id)


def _holds(comparison: Comparison, value: Scalar | None) -> bool:
    if value is None:
        return False
    if comparison.operator is Operator.HAS:
        return True
    wanted = comparison.value
    if isinstance(wanted, str):
        assert isinstance(value, str)
        if comparison.operator is Operator.STARTS_WITH:
            return value.startswith(wanted)
        if comparison.open_ended:
            return value.startswith(wanted) is (comparison.operator is Operator.EQUAL)
        return _ordered(comparison.operator, (value > wanted) - (value < wanted))
    assert isinstance(wanted, float | int)
    assert not isinstance(value, str)
    if value != value:  # NaN  # noqa: PLR0124
        return comparison.operator is Operator.UNEQUAL
    return _ordered(comparison.operator, (value > wanted) - (value < wanted))


def _ordered(operator: Operator, sign: int) -> bool:
    match operator:
        case Operator.EQUAL:
            return sign == 0
        case Operator.UNEQUAL:
            return sign != 0
        case Operator.LESS:
            return sign < 0
        case Operator.AT_MOST:
            return sign <= 0
        case Operator.GREATER:
            return sign > 0
        case _:
            return sign >= 0
