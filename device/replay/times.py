"""When a row happened: from columns that hold a time, or from a column that counts cycles. Microseconds, UTC."""

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation

from device.replay.errors import ReplayError, RowError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_PERIOD = re.compile(r"([0-9]*\.?[0-9]+)\s*(us|ms|s|m|min|h|d|w)?")
_UNIT_US = {
    "us": 1,
    "ms": 1000,
    "s": 10**6,
    "m": 60 * 10**6,
    "min": 60 * 10**6,
    "h": 3600 * 10**6,
    "d": 86_400 * 10**6,
    "w": 7 * 86_400 * 10**6,
}
# Upper bounds that tell epoch units apart: 10^11 s is the year 5138, 10^11 ms is 1973.
_SECONDS_BELOW = 10**11
_MILLISECONDS_BELOW = 10**14
_MICROSECONDS_BELOW = 10**17

TimeOf = Callable[[Sequence[str]], int]


def microseconds(moment: datetime) -> int:
    """Microseconds since the epoch; a time without a zone is UTC."""
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - _EPOCH) // _MICROSECOND


def parse_period(text: str) -> int:
    """A duration such as `1h`, `250ms`, `0.5 s` or `90` (seconds), in microseconds. Raises ReplayError."""
    match = _PERIOD.fullmatch(text.strip())
    period = int(Decimal(match[1]) * _UNIT_US[match[2] or "s"]) if match else 0
    if period <= 0:
        raise ReplayError(f"{text!r} is not a duration such as 1h, 15m, 30s, 250ms")
    return period


def parse_time(text: str) -> int:
    """One time in ISO 8601, or as a number since the epoch in s, ms, µs or ns, told apart by size.

    Raises RowError.
    """
    text = text.strip()
    try:
        number = Decimal(text)
    except InvalidOperation:
        pass
    else:
        if number.is_finite():
            return _epoch_number(number)
    try:
        return microseconds(datetime.fromisoformat(text))
    except (ValueError, OverflowError):
        raise RowError(
            "ROW_TIME", f"{text[:60]!r} is neither ISO 8601 nor a number since the epoch; see --time-format"
        ) from None


def _epoch_number(number: Decimal) -> int:
    size = abs(number)
    if size < _SECONDS_BELOW:
        return int(number * 10**6)
    if size < _MILLISECONDS_BELOW:
        return int(number * 1000)
    if size < _MICROSECONDS_BELOW:
        return int(number)
    return int(number // 1000)


def time_from_columns(positions: Sequence[int], time_format: str | None) -> TimeOf:
    """The time of a row from one or several columns, joined by a blank.

    With a format (as for strptime) the text must match it. Without one, see `parse_time`; there several columns
    are an ISO date and time.
    """

    def of(fields: Sequence[str]) -> int:
        text = " ".join(fields[position] for position in positions)
        if time_format is None:
            return parse_time(text)
        try:
            return microseconds(datetime.strptime(text, time_format))
        except (ValueError, OverflowError):
            raise RowError("ROW_TIME", f"{text[:60]!r} does not match {time_format!r}") from None

    return of


def time_from_cycle(position: int, start_us: int, period_us: int) -> TimeOf:
    """The time of a row as start + cycle x period: `start` is the time of cycle 0."""

    def of(fields: Sequence[str]) -> int:
        try:
            cycle = Decimal(fields[position])
        except InvalidOperation:
            cycle = Decimal("NaN")
        if not cycle.is_finite():
            raise RowError("ROW_TIME", f"{fields[position][:60]!r} is not a cycle number")
        return start_us + int(cycle * period_us)

    return of
