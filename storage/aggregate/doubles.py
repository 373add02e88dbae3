"""Arithmetic on doubles, as SQL that cannot fail, whatever the readings are: on PostgreSQL, Redshift and DuckDB.

PostgreSQL refuses what IEEE 754 rounds: a finite result that is too large, and a product or a quotient other than 0
that is rounded to 0. A single reading would end a statement over a whole fleet, again and again. So nothing else
multiplies or divides doubles of readings in SQL, with one exception: `storage.rollup.buckets` has a variance times the
count that it is of, which is neither too large (see `_HUGE`) nor rounded to 0, unless the variance is 0. The server's
own aggregates, avg() and those of variance, are free of the second.

Arguments are SQL, and are repeated: no function among them may be volatile.
"""

from typing import Final, LiteralString

# A double holds up to 1.8e308, and the largest number on the way to a variance is the square of a count times a
# distance from the mean (PostgreSQL's float8_accum), at most of (2e140 n)^2 = 4e280 n^2: that fits for up to 6.7e13
# readings in a bucket. What follows from it here is smaller: n squares of 1e140 are 1e280 n, and fit up to 1.8e28.
_HUGE: Final[LiteralString] = "1e140"

# A total from here on is not rounded to 0 by any count, for half of the smallest double is 2.5e-324: only a count of
# 4e33 gets there. Below it, twice the total times 2^1000 is below 2.2e11, far from too large.
_TINY: Final[LiteralString] = "1e-290"

# The square, 1e-320, is 2,000 times the smallest double. It loses digits there, and from 1.6e-162 down it is rounded
# to 0.
_CLOSE: Final[LiteralString] = "1e-160"

# 2^1000, and 2^1000 times the smallest double, 2^-1074, which itself is no literal that every server reads.
_SCALE: Final[LiteralString] = "1.0715086071862673e301"
_SCALED_SMALLEST: Final[LiteralString] = "5.293955920339377e-23"


def is_huge(value: LiteralString) -> LiteralString:
    """Whether a number is finite and so large that no sum of squares may hold its own; on PostgreSQL."""
    return f"({_absolute(value)} >= {_HUGE} AND {_absolute(value)} < 'Infinity')"


def is_tame(value: LiteralString) -> LiteralString:
    """Whether a number is neither huge, nor infinite, nor NaN; on PostgreSQL."""
    return f"{_absolute(value)} < {_HUGE}"


def is_huge_in_warehouse(value: LiteralString) -> LiteralString:
    """The same as `is_huge` on either warehouse; false for NaN whether it is above all numbers there or unordered."""
    return f"abs(CAST({value} AS DOUBLE PRECISION)) BETWEEN {_double(_HUGE)} AND {_double('1.7976931348623157e308')}"


def is_tame_in_warehouse(value: LiteralString) -> LiteralString:
    """The same as `is_tame` on either warehouse."""
    return f"abs(CAST({value} AS DOUBLE PRECISION)) < {_double(_HUGE)}"


def quotient(total: LiteralString, count: LiteralString) -> LiteralString:
    """`total / count`, which may be tiny or 0; `count` is 1 or more."""
    # Half of the smallest double or less is rounded to 0. Told apart exactly, as multiples of powers of two: both sides
    # times 2^1000. Nested, because AND does not say what is computed first.
    doubled: LiteralString = f"2 * abs({total}) * '{_SCALE}'::double precision"
    rounds_to_0: LiteralString = f"{doubled} <= ({count})::double precision * '{_SCALED_SMALLEST}'::double precision"
    quotient: LiteralString = f"{total} / ({count})"
    return (
        f"CASE WHEN abs({total}) < '{_TINY}'::double precision THEN CASE WHEN {rounds_to_0} THEN 0 ELSE {quotient} END "
        f"ELSE {quotient} END"
    )


def squares(count: LiteralString, distance: LiteralString) -> LiteralString:
    """`count` times the square of `distance`; 0 where the square is at the end of what a double can tell from 0."""
    return f"CASE WHEN abs({distance}) < {_CLOSE} THEN 0 ELSE ({count}) * ({distance}) * ({distance}) END"


def _absolute(value: LiteralString) -> LiteralString:
    return f"abs({value}::double precision)"


def _double(number: LiteralString) -> LiteralString:
    # The cast of a text: a bare 1e140 is a NUMERIC to some dialects, and more than it holds.
    return f"CAST('{number}' AS DOUBLE PRECISION)"
