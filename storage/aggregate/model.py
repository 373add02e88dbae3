"""What an aggregate asks and answers. Times are microseconds since 1970 UTC. Nothing here does I/O."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from storage.aggregate.buckets import Bucket
from storage.errors import StorageError
from storage.model import ValueType
from storage.reads.model import Scalar

MAX_SELECTED = 100_000
"""The most devices that a filter may select for an aggregate."""


class Function(StrEnum):
    """What is computed of a bucket's readings; see AggregateFunction in query.proto.

    A finite reading of 1e140 or beyond makes SUM, MEAN and STDDEV of its bucket NaN, for what is summed up of their
    squares may fit no double; of readings that lie closer than 1e-160, whose squares are lost, STDDEV may be 0 or
    inexact. PERCENTILE is exact here: interpolated between the two neighbours of the rank.
    """

    COUNT = "count"
    MIN = "min"
    MAX = "max"
    SUM = "sum"
    MEAN = "mean"
    FIRST = "first"
    LAST = "last"
    STDDEV = "stddev"
    PERCENTILE = "percentile"


NUMERIC = frozenset({Function.MIN, Function.MAX, Function.SUM, Function.MEAN, Function.STDDEV, Function.PERCENTILE})
"""Functions that exist for numbers only."""

_OF_ATTRIBUTE = frozenset({Function.MIN, Function.MAX, Function.FIRST, Function.LAST})


class AggregateTypeMismatch(StorageError):
    """The function does not exist for the attribute's type, or attributes of different types fall into one row."""

    def __init__(self, attribute: str, function: str, text: str) -> None:
        super().__init__(text)
        self.attribute = attribute
        self.function = function


class SelectionTooLarge(StorageError):
    """A filter selects more devices than an aggregate takes."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Devices; all that is given must hold. Names are distinct."""

    entities: Sequence[str] = ()
    entity_type: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    filter: str = ""

    @property
    def by_condition(self) -> bool:
        """Whether it takes more than names to tell the devices: their type, labels or values."""
        return bool(self.entity_type or self.labels or self.filter)


def selected_names(selection: Selection, only: str | None) -> list[str] | None:
    """The names that the selected devices must have; None: any. `only`: the one device that the caller may see."""
    if only is None:
        return list(selection.entities) or None
    return [only] if not selection.entities or only in selection.entities else []


@dataclass(frozen=True, slots=True)
class AggregateQuestion:
    """What to compute over the readings of the selected devices in [start_us, end_us). Attributes are distinct."""

    selection: Selection
    attributes: Sequence[str]
    start_us: int
    end_us: int
    functions: Sequence[Function]
    # None: the range is one bucket.
    bucket: Bucket | None = None
    # 0 to 100, for PERCENTILE.
    percentiles: Sequence[float] = ()
    by_entity: bool = False
    by_attribute: bool = False


@dataclass(frozen=True, slots=True)
class AggregateColumn:
    """The results of one function, one per bucket."""

    function: Function
    percentile: float
    type: ValueType
    values: Sequence[Scalar]


@dataclass(frozen=True, slots=True)
class AggregateSeries:
    """One group's buckets that hold readings, in order of time; names are empty unless grouped by."""

    entity: str
    attribute: str
    bucket_times_us: Sequence[int]
    columns: Sequence[AggregateColumn]


class AggregateSource(StrEnum):
    """What an answer was computed from."""

    READINGS = "readings"
    ROLLUP = "rollup"


@dataclass(frozen=True, slots=True)
class AggregateAnswer:
    """Series by device name, then attribute name.

    Everything committed before `as_of_us` is in it; what lies before `complete_from_us` is past retention and not.
    """

    as_of_us: int
    complete_from_us: int
    source: AggregateSource
    series: Sequence[AggregateSeries]


def result_type(function: Function, value_type: ValueType) -> ValueType:
    """The type of a function's results."""
    if function is Function.COUNT:
        return ValueType.BIGINT
    return value_type if function in _OF_ATTRIBUTE else ValueType.DOUBLE
