"""Times as commands take them, and as they show them: UTC wherever no zone is given."""

import argparse
import re
from datetime import UTC, datetime, timedelta

from cli.query_arguments import BadArgument

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_UNITS_US = {"s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000, "d": 86_400_000_000, "w": 604_800_000_000}
_RELATIVE = re.compile(r"(?:now)?([+-])([0-9]{1,9})([smhdw])")
_EXAMPLE = "ISO 8601 (2026-01-31T12:00:00Z)"

ABSOLUTE = "ISO 8601, UTC unless it says otherwise"
"""What `moment` takes, for the help of an argument."""


def moment(text: str) -> datetime:
    """A time in ISO 8601, to the microsecond; the `type` of an argument.

    The time of the machine that a command happens to run on never counts: the same line means the same everywhere.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: use {_EXAMPLE}") from None
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


def microseconds(time: datetime) -> int:
    """A time as microseconds since 1970, exactly."""
    return (time - _EPOCH) // timedelta(microseconds=1)


def parse_time(text: str, now_us: int, flag: str) -> int:
    """A time in microseconds since 1970: what `moment` takes, `now`, or relative to now.

    Raises:
        BadArgument: it is none of these.
    """
    if text == "now":
        return now_us
    relative = _RELATIVE.fullmatch(text)
    if relative is not None:
        sign, count, unit = relative.groups()
        return now_us + (1 if sign == "+" else -1) * int(count) * _UNITS_US[unit]
    try:
        return microseconds(moment(text))
    except argparse.ArgumentTypeError:
        raise BadArgument(f"{flag} {text!r} is no time: use {_EXAMPLE}, now, or -90s, -15m, -1h, -7d, -2w") from None


def time_text(time_us: int) -> str:
    """A time as ISO 8601 in UTC with microseconds; beyond the calendar, the number itself."""
    try:
        return (_EPOCH + timedelta(microseconds=time_us)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    except OverflowError:
        return str(time_us)
