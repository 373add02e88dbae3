"""Buckets of time, aligned to the clock and calendar of a time zone. Pure.

Up to an hour wide, buckets have that width always: the hour that comes twice when clocks are set back makes buckets of
its own each time. Wider ones begin at local times; a local time that does not exist on a day of change stands for the
moment of the change, one that comes twice for the first of the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from itertools import pairwise
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from storage.errors import StorageError
from storage.times import DAY_US, HOUR_US, MINUTE_US, SECOND_US, microseconds, moment

MAX_POINTS: Final = 100_000
"""Buckets times groups of one answer."""

AHEAD_US: Final = 8 * DAY_US
"""No reading lies further ahead of now: a tenant's clock window ends at most 7 days after it."""


# Files beside the database's: what the host is set to, and clocks that count leap seconds, which no reading's does.
_NOT_A_PLACE: Final = frozenset({"localtime", "posixrules"})


class TimeZoneUnknown(StorageError):
    """The IANA database has no time zone of this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no time zone {name!r}")
        self.name = name


class TooManyPoints(StorageError):
    """The answer would have more points than an answer may; `points` is how many at least."""

    def __init__(self, points: int) -> None:
        super().__init__(f"at least {points} points, more than {MAX_POINTS}: ask for wider buckets or a shorter range")
        self.points = points
        self.limit = MAX_POINTS


class BucketUnit(StrEnum):
    """What a bucket's width is counted in."""

    SECOND = "second"
    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"
    WEEK = "week"
    MONTH = "month"


_SUBDIVISIONS: Final = frozenset({1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30})
WIDTHS: Final = {
    BucketUnit.SECOND: _SUBDIVISIONS,
    BucketUnit.MINUTE: _SUBDIVISIONS,
    BucketUnit.HOUR: frozenset({1, 2, 3, 4, 6, 8, 12}),
    BucketUnit.DAY: frozenset({1}),
    BucketUnit.WEEK: frozenset({1}),
    BucketUnit.MONTH: frozenset({1}),
}
"""The widths of each unit: those that divide the next larger one."""

_FIXED: Final = {BucketUnit.SECOND: SECOND_US, BucketUnit.MINUTE: MINUTE_US, BucketUnit.HOUR: HOUR_US}


@dataclass(frozen=True, slots=True)
class Bucket:
    """How wide buckets are, and whose clock they follow. `width` is one of WIDTHS."""

    unit: BucketUnit
    width: int = 1
    time_zone: str = "UTC"


def bucket_edges(bucket: Bucket, start_us: int, end_us: int) -> list[int]:
    """Where the buckets of [start_us, end_us) begin, ascending; the first at or before the start.

    Raises:
        TimeZoneUnknown: there is no such time zone.
        TooManyPoints: there are more than MAX_POINTS.
    """
    zone = _zone(bucket.time_zone)
    if bucket.unit in _FIXED and (width_us := _FIXED[bucket.unit] * bucket.width) <= HOUR_US:
        _check((end_us - start_us) // width_us)
        return _fixed(zone, width_us, start_us, end_us)
    _check((end_us - start_us) // (HOUR_US * bucket.width if bucket.unit is BucketUnit.HOUR else DAY_US * 32))
    return _calendar(bucket, zone, start_us, end_us)


def bucket_holding(bucket: Bucket, start_us: int, time_us: int) -> int:
    """Where the bucket begins that holds `time_us`, of those of a range that begins at `start_us`, at or before it."""
    return bucket_edges(bucket, max(start_us, time_us - HOUR_US), time_us + 1)[-1]


@dataclass(frozen=True, slots=True)
class Run:
    """Buckets that begin at `start_us` and then every `width_us`, up to the next run."""

    start_us: int
    width_us: int


def runs(edges: Sequence[int], end_us: int) -> list[Run]:
    """The runs of equally wide buckets that those of a range, which ends at `end_us`, consist of."""
    found: list[Run] = []
    for start_us, next_us in pairwise([*edges, max(end_us, edges[-1] + 1)]):
        width_us = next_us - start_us
        # The last bucket ends with the range: one that is cut short fits a run of wider ones.
        fits = found and (width_us == found[-1].width_us or (start_us == edges[-1] and width_us < found[-1].width_us))
        if not fits:
            found.append(Run(start_us, width_us))
    return found


def _check(points: int) -> None:
    if points > MAX_POINTS:
        raise TooManyPoints(points)


@lru_cache(maxsize=256)
def _zone(name: str) -> ZoneInfo:
    if name in _NOT_A_PLACE or name.startswith("right/"):
        raise TimeZoneUnknown(name)
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        # OSError: the name of a directory of the database.
        raise TimeZoneUnknown(name) from None


def _fixed(zone: ZoneInfo, width_us: int, start_us: int, end_us: int) -> list[int]:
    """Edges of equally wide buckets; where they lie depends on the zone alone, not on the range."""
    edges = [_fixed_start(zone, width_us, start_us)]
    while True:
        at = edges[-1]
        following = _fixed_end(zone, width_us, at)
        # Within a day whose offset is the same at both ends nothing has to be looked up.
        until = min(end_us, at + DAY_US)
        if _offset_us(zone, at) == _offset_us(zone, until):
            edges += range(following, until, width_us)
            _check(len(edges))
            if until == end_us:
                return edges
        elif following < end_us:
            edges.append(following)
        else:
            return edges


def _fixed_start(zone: ZoneInfo, width_us: int, time_us: int) -> int:
    """Where the bucket begins that holds a time."""
    offset_us = _offset_us(zone, time_us)
    aligned_us = time_us - (time_us + offset_us) % width_us
    if (offset_us - _offset_us(zone, aligned_us)) % width_us:
        return _shift(zone, aligned_us, time_us)
    return aligned_us


def _fixed_end(zone: ZoneInfo, width_us: int, start_us: int) -> int:
    """Where the bucket ends that begins at a time; a shift that is no multiple of the width cuts it short."""
    offset_us = _offset_us(zone, start_us)
    aligned_us = start_us + width_us - (start_us + offset_us) % width_us
    if (offset_us - _offset_us(zone, aligned_us)) % width_us:
        return _shift(zone, start_us, aligned_us)
    return aligned_us


def _shift(zone: ZoneInfo, before_us: int, after_us: int) -> int:
    """When the zone's clock was shifted: the first moment that has another offset than `before_us`."""
    offset_us = _offset_us(zone, before_us)
    while after_us - before_us > 1:
        middle_us = (before_us + after_us) // 2
        if _offset_us(zone, middle_us) == offset_us:
            before_us = middle_us
        else:
            after_us = middle_us
    return after_us


def _calendar(bucket: Bucket, zone: ZoneInfo, start_us: int, end_us: int) -> list[int]:
    local = moment(start_us).astimezone(zone).replace(tzinfo=None, fold=0)
    day = local.replace(hour=0, minute=0, second=0, microsecond=0)
    step: timedelta | None
    match bucket.unit:
        case BucketUnit.HOUR:
            # Of two local times an earlier one may be the later bucket's: begin a day early, and skip.
            at, step = day - timedelta(days=1), timedelta(hours=bucket.width)
        case BucketUnit.WEEK:
            at, step = day - timedelta(days=day.weekday()), timedelta(days=7)
        case BucketUnit.MONTH:
            at, step = day.replace(day=1), None
        case _:
            at, step = day - timedelta(days=1), timedelta(days=1)
    edges: list[int] = []
    while (instant := _instant_us(zone, at)) < end_us:
        if instant <= start_us:
            edges = [instant]
        elif instant > edges[-1]:
            edges.append(instant)
            if len(edges) > MAX_POINTS:
                raise TooManyPoints(len(edges))
        at = at + step if step is not None else (at + timedelta(days=32)).replace(day=1)
    return edges


def _instant_us(zone: ZoneInfo, local: datetime) -> int:
    """The moment of a local time; fold 0 is the first of two, and for a time that is skipped the moment after."""
    return microseconds(local.replace(tzinfo=zone))


def _offset_us(zone: ZoneInfo, time_us: int) -> int:
    offset = moment(time_us).astimezone(zone).utcoffset()
    assert offset is not None
    return offset // timedelta(microseconds=1)
