"""The bounds within which sums of readings are computed follow from what a double holds."""

import math
import sys
from typing import Any

import duckdb
import pytest

from storage.aggregate import doubles
from storage.aggregate.doubles import is_huge_in_warehouse, is_tame_in_warehouse

SMALLEST = 5e-324
# Far more readings than a bucket can have.
MOST = 5e13


def test_nothing_on_the_way_to_a_variance_is_too_large() -> None:
    huge = float(doubles._HUGE)
    assert math.isfinite((2 * huge * MOST) ** 2)
    assert math.isfinite(huge * MOST)


def test_no_count_rounds_a_total_to_0_that_is_not_tiny_and_none_overflows_scaled() -> None:
    tiny = float(doubles._TINY)
    assert tiny / MOST > 0
    assert math.isfinite(2 * tiny * float(doubles._SCALE))
    assert float(doubles._SCALE) == 2.0**1000
    assert float(doubles._SCALED_SMALLEST) == SMALLEST * 2.0**1000


def test_the_square_of_a_distance_that_is_not_close_is_not_0() -> None:
    assert float(doubles._CLOSE) ** 2 >= 1000 * SMALLEST


@pytest.mark.parametrize(
    ("value", "huge", "tame"),
    [
        ("0", False, True),
        ("9.9e139", False, True),
        ("-1e140", True, False),
        (repr(sys.float_info.max), True, False),
        ("-Infinity", False, False),
        ("NaN", False, False),
    ],
)
def test_what_is_huge_in_a_warehouse(value: str, huge: bool, tame: bool) -> None:
    statement: Any = f"SELECT {is_huge_in_warehouse('value')}, {is_tame_in_warehouse('value')} FROM (SELECT ?::DOUBLE)"
    with duckdb.connect() as connection:
        assert connection.execute(f"{statement} t (value)", [value]).fetchone() == (huge, tame)
