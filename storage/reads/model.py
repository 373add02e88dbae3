"""What reads take and give: questions, answers, refusals, and the parts a page is read in. Nothing here does I/O.

Times are microseconds since 1970 UTC.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from storage.errors import StorageError
from storage.model import Attribute, Int64s, ValueType

Scalar: TypeAlias = float | int | bool | str

MAX_LATEST_VALUES = 50_000
"""The most values one answer about latest values holds: it has no pages, and a message must stay a message."""

MAX_TEXT_BYTES = 2 * 1024 * 1024
"""A page of a series, or an answer about latest values, ends with the text that passes this many bytes of text."""

ENTITIES_PER_STATEMENT = 128
"""Bounds how long one statement searches when most of the devices asked for have nothing in the range."""


class EntityNotFound(StorageError):
    """The tenant has no device of this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no device named {name!r}")
        self.name = name


class AttributeNotFound(StorageError):
    """The tenant has no attribute of this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no attribute named {name!r}")
        self.name = name


class EntityReplaced(StorageError):
    """The device in which the last page ended was deleted since, and another one registered by its name.

    Series come in the order of ids, and the new one's lies anywhere: to go on behind it would leave devices out, or
    show them twice.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"{name!r} is another device than the one in which the last page ended")
        self.name = name


class LatestNotKept(StorageError):
    """The attribute opted out of latest values; only its history can be read."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no latest value is kept for attribute {name!r}; read its series")
        self.name = name


class AnswerTooLarge(StorageError):
    """The answer would not fit a message: ask for fewer devices or fewer attributes."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The newest reading of one attribute."""

    attribute: str
    time_us: int
    value: Scalar


@dataclass(frozen=True, slots=True)
class LatestAnswer:
    """Latest values by device, in the order asked; each device's by attribute name."""

    as_of_us: int
    entities: Mapping[str, Sequence[Reading]]
    # Devices asked for that do not exist, in the order asked.
    missing: Sequence[str]


@dataclass(frozen=True, slots=True)
class SeriesQuestion:
    """Readings of the given attributes of the given devices in [start_us, end_us). Names are distinct."""

    entities: Sequence[str]
    attributes: Sequence[str]
    start_us: int
    end_us: int
    descending: bool = False
    # The most readings of each series over all pages, from the end that comes first; 0: all.
    limit_per_series: int = 0


@dataclass(frozen=True, slots=True)
class Position:
    """The last reading of a page: device and attribute by their places in the question's own lists."""

    entity: int
    attribute: int
    time_us: int
    # The device's id, too: its name may be another device's by the time of the next page.
    entity_id: int
    # Readings of this series so far; 0 where the question has no limit per series.
    taken: int = 0


@dataclass(frozen=True, slots=True)
class SeriesPart:
    """A run of readings of one series in the order asked; arrays have one element per reading."""

    entity: str
    attribute: str
    type: ValueType
    times_us: Int64s
    # float64, int64, bool, or for text objects of type str.
    values: NDArray[Any]
    revisions: NDArray[np.int32]
    # Ids of device and attribute: series come in this order, or in its reverse.
    place: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class SeriesPage:
    """A page and, unless it is the last, the position that the next one starts after."""

    as_of_us: int
    parts: Sequence[SeriesPart]
    last: Position | None


@dataclass(frozen=True, slots=True)
class Entity:
    """A device."""

    name: str
    entity_type: str
    labels: Mapping[str, str]
    create_time_us: int


@dataclass(frozen=True, slots=True)
class EntityPage:
    """Devices by name; `last` is the name to go on after, None at the end."""

    as_of_us: int
    entities: Sequence[Entity]
    last: str | None


@dataclass(frozen=True, slots=True)
class AttributeEntry:
    """An attribute as the tenant registered it."""

    name: str
    type: ValueType
    unit: str
    keeps_latest: bool
    create_time_us: int


@dataclass(frozen=True, slots=True)
class AttributePage:
    """Attributes by name; `last` is the name to go on after, None at the end."""

    as_of_us: int
    attributes: Sequence[AttributeEntry]
    last: str | None


@dataclass(frozen=True, slots=True)
class Span:
    """A box of (devices x attributes x [start_us, end_us)) that one statement reads in order."""

    entities: Sequence[int]
    attributes: Sequence[Attribute]
    start_us: int
    end_us: int
    # The most readings of each series; 0: all.
    limit_per_series: int = 0


@dataclass(frozen=True, slots=True)
class Cursor:
    """The last reading that was read, by ids; `taken` as in Position."""

    entity: int
    attribute: int
    time_us: int
    taken: int = 0


def spans(
    entities: Sequence[int],
    attributes: Sequence[Attribute],
    start_us: int,
    end_us: int,
    *,
    after: Cursor | None,
    descending: bool,
    limit_per_series: int = 0,
    step: int = ENTITIES_PER_STATEMENT,
) -> Iterator[Span]:
    """The boxes that together hold what comes after `after`, in order; `entities` and `attributes` in that order too.

    Why boxes and not one row comparison: an index scan over lists of keys cannot start at a row in the middle, it
    would walk through everything that earlier pages returned.
    """
    first = 0
    if after is not None:
        first = entities.index(after.entity)
        place = next(i for i, a in enumerate(attributes) if a.attribute_id == after.attribute)
        rest = (start_us, min(end_us, after.time_us)) if descending else (max(start_us, after.time_us + 1), end_us)
        left = limit_per_series - after.taken
        if rest[0] < rest[1] and (left > 0 or not limit_per_series):
            yield Span([after.entity], [attributes[place]], *rest, max(left, 0) if limit_per_series else 0)
        if place + 1 < len(attributes):
            yield Span([after.entity], attributes[place + 1 :], start_us, end_us, limit_per_series)
        first += 1
    for at in range(first, len(entities), step):
        yield Span(entities[at : at + step], attributes, start_us, end_us, limit_per_series)
