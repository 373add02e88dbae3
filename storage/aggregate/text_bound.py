"""How much text an aggregate may answer. FIRST and LAST of texts are the only results that are not a few bytes each:
a hundred thousand buckets of them would be hundreds of megabytes, which no message holds.

The databases are told to stop where the bound is passed, so that the rest is never held here; what is refused is
decided here, alike for every source.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final

from psycopg import sql

from storage.aggregate.model import AggregateQuestion, Function
from storage.errors import StorageError
from storage.statements import statements

MAX_AGGREGATE_TEXT_BYTES: Final = 8 * 1024 * 1024
"""The most text that one answer holds, in bytes of UTF-8: it has no pages."""

_SQL = statements("aggregate.sql")


class TooMuchText(StorageError):
    """The texts of the answer would be more than an answer may hold; `limit` is that in bytes."""

    def __init__(self) -> None:
        self.limit = MAX_AGGREGATE_TEXT_BYTES
        super().__init__(
            f"texts of more than {self.limit} bytes: ask for wider buckets, a shorter range, or fewer devices"
        )


def check_text(values: Iterable[Any]) -> None:
    """Raises TooMuchText when the texts among the values are more than an answer may hold."""
    left = MAX_AGGREGATE_TEXT_BYTES
    for value in values:
        if isinstance(value, str):
            left -= len(value.encode())
            if left < 0:
                raise TooMuchText


def text_results(question: AggregateQuestion) -> Sequence[int]:
    """Which results are texts, of attributes that are: their places among the functions."""
    return [place for place, f in enumerate(question.functions) if f in (Function.FIRST, Function.LAST)]


def within_text(question: AggregateQuestion, statement: sql.Composed) -> sql.Composed:
    """The statement that ends with the row whose texts pass the bound; its results are of text attributes."""
    texts = text_results(question)
    if not texts:
        return statement
    columns = [f"key_{place}" for place in range(3)] + [f"result_{place}" for place in range(len(question.functions))]
    lengths = [sql.SQL("octet_length({})").format(sql.Identifier(f"result_{place}")) for place in texts]
    return sql.SQL(_SQL["within_text"]).format(
        answer=statement,
        columns=sql.SQL(", ").join(map(sql.Identifier, columns)),
        bytes=sql.SQL(" + ").join(lengths),
        most=sql.Literal(MAX_AGGREGATE_TEXT_BYTES),
    )
