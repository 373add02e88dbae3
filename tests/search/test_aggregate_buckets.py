"""Buckets follow the clock and calendar of their zone."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest

from storage.aggregate.buckets import (
    HOUR_US,
    WIDTHS,
    Bucket,
    BucketUnit,
    TimeZoneUnknown,
    TooManyPoints,
    bucket_edges,
    bucket_holding,
)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def us(text: str) -> int:
    return (datetime.fromisoformat(text).astimezone(UTC) - EPOCH) // timedelta(microseconds=1)


def local(edges: list[int], zone: str) -> list[str]:
    return [(EPOCH + timedelta(microseconds=e)).astimezone(ZoneInfo(zone)).isoformat() for e in edges]


def test_the_day_of_a_change_has_23_or_25_hours() -> None:
    berlin = Bucket(BucketUnit.DAY, 1, "Europe/Berlin")
    spring = bucket_edges(berlin, us("2026-03-28T12:00Z"), us("2026-03-30T12:00Z"))
    assert local(spring, "Europe/Berlin") == [
        "2026-03-28T00:00:00+01:00", "2026-03-29T00:00:00+01:00", "2026-03-30T00:00:00+02:00",
    ]  # fmt: skip
    assert [b - a for a, b in pairwise(spring)] == [24 * HOUR_US, 23 * HOUR_US]
    autumn = bucket_edges(berlin, us("2026-10-24T12:00Z"), us("2026-10-26T12:00Z"))
    assert [b - a for a, b in pairwise(autumn)] == [24 * HOUR_US, 25 * HOUR_US]


def test_the_hour_that_comes_twice_makes_two_buckets() -> None:
    edges = bucket_edges(Bucket(BucketUnit.HOUR, 1, "Europe/Berlin"), us("2026-10-25T00:00Z"), us("2026-10-25T03:00Z"))
    assert local(edges, "Europe/Berlin") == [
        "2026-10-25T02:00:00+02:00", "2026-10-25T02:00:00+01:00", "2026-10-25T03:00:00+01:00",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("bucket", "start", "first"),
    [
        (Bucket(BucketUnit.HOUR, 1, "Asia/Kolkata"), "2026-05-05T10:45Z", "2026-05-05T10:30Z"),
        (Bucket(BucketUnit.MINUTE, 20, "Asia/Kathmandu"), "2026-05-05T10:20Z", "2026-05-05T10:15Z"),
        (Bucket(BucketUnit.SECOND, 30, "UTC"), "2026-05-05T10:00:59Z", "2026-05-05T10:00:30Z"),
        (Bucket(BucketUnit.HOUR, 6, "America/New_York"), "2026-05-05T10:45Z", "2026-05-05T10:00Z"),
        (Bucket(BucketUnit.WEEK, 1, "Europe/Berlin"), "2026-05-07T10:45Z", "2026-05-03T22:00Z"),
        (Bucket(BucketUnit.MONTH, 1, "Asia/Tokyo"), "2026-05-07T10:45Z", "2026-04-30T15:00Z"),
        # Midnight does not exist on this day, and the one before is another day's.
        (Bucket(BucketUnit.DAY, 1, "Africa/Cairo"), "2026-04-24T05:00Z", "2026-04-23T22:00Z"),
        # Midnight comes twice: the first one begins the day.
        (Bucket(BucketUnit.DAY, 1, "America/Havana"), "2026-11-01T04:30Z", "2026-11-01T04:00Z"),
        (Bucket(BucketUnit.DAY, 1, "America/Havana"), "2026-11-01T05:30Z", "2026-11-01T04:00Z"),
    ],
)
def test_the_first_bucket_holds_the_start(bucket: Bucket, start: str, first: str) -> None:
    assert bucket_edges(bucket, us(start), us(start) + 1) == [us(first)]


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "Australia/Lord_Howe", "Asia/Kathmandu", "America/Havana"])
@pytest.mark.parametrize("unit", list(BucketUnit))
def test_buckets_ascend_and_cover_the_range(unit: BucketUnit, zone: str) -> None:
    days = {BucketUnit.SECOND: 0.02, BucketUnit.MINUTE: 1.0, BucketUnit.MONTH: 800.0}.get(unit, 200.0)
    for width in sorted(WIDTHS[unit]):
        start = us("2026-03-28T17:13:07Z")
        end = start + int(days * 24 * HOUR_US)
        edges = bucket_edges(Bucket(unit, width, zone), start, end)
        assert edges[0] <= start < (edges[1] if len(edges) > 1 else end)
        assert edges[-1] < end
        assert all(a < b for a, b in pairwise(edges))


@pytest.mark.parametrize(
    ("zone", "shift"),
    [
        ("Australia/Lord_Howe", "2025-10-04T15:30Z"),
        ("Australia/Lord_Howe", "2026-04-04T15:00Z"),
        ("Asia/Kathmandu", "1985-12-31T18:30Z"),
        ("America/Caracas", "2007-12-09T07:00Z"),
        ("Europe/Berlin", "2026-03-29T01:00Z"),
        ("Europe/Berlin", "2026-10-25T01:00Z"),
    ],
)
def test_where_buckets_lie_does_not_depend_on_the_range(zone: str, shift: str) -> None:
    at, minute = us(shift), 60_000_000
    for unit in (BucketUnit.MINUTE, BucketUnit.HOUR):
        for width in sorted(WIDTHS[unit]):
            bucket = Bucket(unit, width, zone)
            start, end = at - 13 * HOUR_US, at + 13 * HOUR_US
            whole = bucket_edges(bucket, start, end)
            for cut in range(at - 2 * HOUR_US, at + 2 * HOUR_US, 7 * minute):
                older, newer = bucket_edges(bucket, start, cut), bucket_edges(bucket, cut, end)
                assert older == [edge for edge in whole if edge < cut]
                assert newer == [max(edge for edge in whole if edge <= cut), *(edge for edge in whole if edge > cut)]
                assert bucket_holding(bucket, start, cut) == newer[0]


def test_limits() -> None:
    start = us("2026-01-01T00:00Z")
    with pytest.raises(TooManyPoints) as many:
        bucket_edges(Bucket(BucketUnit.SECOND), start, start + 100_002 * 1_000_000)
    assert many.value.limit == 100_000
    for name in ("Europe/Atlantis", "Europe", "/etc/passwd", "../x", "", "\0", "localtime", "right/UTC"):
        with pytest.raises(TimeZoneUnknown):
            bucket_edges(Bucket(BucketUnit.DAY, 1, name), start, start + HOUR_US)
