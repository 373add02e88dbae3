"""Times as commands take them, and as they show them: UTC wherever no zone is given."""

import argparse
import re
from datetime import UTC, datetime

from cli.query_arguments import BadArgument
from storage import times

_UNITS_US = {
    "s": times.SECOND_US,
    "m": times.MINUTE_US,
    "h": times.HOUR_US,
    "d": times.DAY_US,
    "w": 7 * times.DAY_US,
}
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
        return times.microseconds(moment(text))
    except argparse.ArgumentTypeError:
        raise BadArgument(f"{flag} {text!r} is no time: use {_EXAMPLE}, now, or -90s, -15m, -1h, -7d, -2w") from None


def time_text(time_us: int) -> str:
    """A time as ISO 8601 in UTC with microseconds; beyond the calendar, the number itself."""
    try:
        return times.moment(time_us).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    except OverflowError:
        return str(time_us)
