"""Times as the stores hold them, microseconds since 1970 in UTC, next to datetimes. Pure.

All of it is exact: a float of seconds would round microseconds away.
"""

from datetime import UTC, datetime, timedelta
from typing import Final

SECOND_US: Final = 1_000_000
MINUTE_US: Final = 60 * SECOND_US
HOUR_US: Final = 60 * MINUTE_US
DAY_US: Final = 24 * HOUR_US

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
POSTGRES_EPOCH_US: Final = 946_684_800_000_000
"""2000-01-01, from which PostgreSQL's binary format counts."""

_NAIVE_EPOCH: Final = EPOCH.replace(tzinfo=None)
_MICROSECOND: Final = timedelta(microseconds=1)


def microseconds(time: datetime) -> int:
    """A time with a zone as microseconds since 1970."""
    return (time - EPOCH) // _MICROSECOND


def moment(time_us: int) -> datetime:
    """The inverse of `microseconds`, in UTC.

    Raises:
        OverflowError: it lies outside of the years 1 to 9999.
    """
    return EPOCH + timedelta(microseconds=time_us)


def naive(time_us: int) -> datetime:
    """The UTC time without a zone, which is how a warehouse's tables hold it. Raises as `moment`."""
    return _NAIVE_EPOCH + timedelta(microseconds=time_us)


def naive_microseconds(time: datetime) -> int:
    """The inverse of `naive`."""
    return (time - _NAIVE_EPOCH) // _MICROSECOND
