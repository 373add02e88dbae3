"""Arithmetic on doubles, as SQL that cannot fail, whatever the readings are: on PostgreSQL, Redshift and DuckDB.

PostgreSQL refuses what IEEE 754 rounds: a finite result that is too large, and a product or a quotient other than 0
that is rounded to 0. A single reading would end a statement over a whole fleet, again and again. So nothing else
multiplies or divides doubles of readings in SQL; the server's own aggregates, avg() and those of variance, are free of
the second.

Arguments are SQL, and are repeated: no function among them may be volatile.
"""

from typing import LiteralString


def is_huge(value: LiteralString) -> LiteralString:
    """Whether a finite number is so large that no double holds its square, nor a sum of such."""
    return f"(abs({value}::double precision) >= 1e140 AND abs({value}::double precision) < 'Infinity')"


def quotient(total: LiteralString, count: LiteralString) -> LiteralString:
    """`total / count`, which may be tiny or 0; `total` is not huge, `count` is 1 or more."""
    # Half of the smallest double, 2^-1074, or less is rounded to 0. Told apart exactly, as multiples of powers of two:
    # both sides times 2^1000, for the smallest double itself is no literal that every server reads. Nested, because AND
    # does not say what is computed first.
    doubled: LiteralString = f"2 * abs({total}) * '1.0715086071862673e301'::double precision"
    rounds_to_0: LiteralString = f"{doubled} <= ({count})::double precision * '5.293955920339377e-23'::double precision"
    quotient: LiteralString = f"{total} / ({count})"
    return (
        f"CASE WHEN abs({total}) < '1e-290'::double precision THEN CASE WHEN {rounds_to_0} THEN 0 ELSE {quotient} END "
        f"ELSE {quotient} END"
    )


def squares(count: LiteralString, distance: LiteralString) -> LiteralString:
    """`count` times the square of `distance`; 0 where the square is at the end of what a double can tell from 0."""
    return f"CASE WHEN abs({distance}) < 1e-160 THEN 0 ELSE ({count}) * ({distance}) * ({distance}) END"
