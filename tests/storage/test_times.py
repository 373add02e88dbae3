"""Times as the stores hold them: exact, whichever way."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.times import DAY_US, POSTGRES_EPOCH_US, microseconds, moment, naive, naive_microseconds


@given(st.integers(microseconds(datetime.min.replace(tzinfo=UTC)), microseconds(datetime.max.replace(tzinfo=UTC))))
def test_nothing_is_lost_either_way(time_us: int) -> None:
    assert microseconds(moment(time_us)) == naive_microseconds(naive(time_us)) == time_us
    assert moment(time_us) == naive(time_us).replace(tzinfo=UTC)


def test_a_zone_counts() -> None:
    assert microseconds(datetime(1970, 1, 2, 3, tzinfo=timezone(timedelta(hours=3)))) == DAY_US
    assert moment(POSTGRES_EPOCH_US) == datetime(2000, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize("convert", [moment, naive])
def test_what_is_no_date_is_refused(convert: object) -> None:
    assert callable(convert)
    for time_us in (2**63 - 1, -(2**63)):
        with pytest.raises(OverflowError):
            convert(time_us)
