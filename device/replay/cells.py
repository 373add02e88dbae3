"""Cells to typed values: null markers, the type of a column, and conversion.

How a column's type is found, over all its cells that are not null:

  INT64    every number is written as an integer (digits with an optional sign) and fits 64 bits. A column that
           only ever says `100.0` is DOUBLE: who writes a fraction means a measured quantity, and the next file of
           the same device may well hold 100.4.
  DOUBLE   any other numbers; `nan`, `inf`, `-inf` count as numbers. Integers beyond 64 bits make the column DOUBLE
           too, with a warning, for a double keeps only their first 15 digits.
  BOOL     `true` and `false` in any case. 0 and 1 are integers, unless --type says otherwise.
  STRING   anything else.

The majority decides: a few cells that are no numbers in a column of numbers are reported, one by one, and do not turn
thousands of numbers into text.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from device.dictionary import ValueType
from device.packing import INT64_MAX, INT64_MIN
from device.replay.errors import RowError

Cell = float | int | bool | bytes

_INTEGER = re.compile(r"[+-]?[0-9]+", re.ASCII)
_NUMBER = re.compile(
    r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|nan|inf|infinity)", re.ASCII | re.IGNORECASE
)
_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+", re.ASCII)
_TRUE = frozenset(("true", "1", "t", "yes", "y", "on"))
_FALSE = frozenset(("false", "0", "f", "no", "n", "off"))


class NullMarkers:
    """Cells that stand for "no value": the empty cell always, and what the user names.

    A marker that is a number matches every way to write that number: -200 also matches -200.0 and -2e2.
    """

    def __init__(self, markers: Iterable[str] = (), *, decimal: str = ".") -> None:
        self._texts = {"", *(marker.strip() for marker in markers)}
        self._decimal = decimal
        self._numbers = {number for marker in self._texts if (number := as_number(marker, decimal)) is not None}
        self._nan = any(math.isnan(number) for number in self._numbers)

    def __contains__(self, cell: str) -> bool:
        if cell in self._texts:
            return True
        if not self._numbers:
            return False
        number = as_number(cell, self._decimal)
        return number is not None and (number in self._numbers or (self._nan and math.isnan(number)))


def as_number(cell: str, decimal: str = ".") -> float | None:
    """The number a cell is written as, None when it is not one."""
    if decimal != ".":
        cell = cell.replace(decimal, ".")
    return float(cell) if _NUMBER.fullmatch(cell) else None


@dataclass(slots=True)
class ColumnSurvey:
    """What the cells of one column look like."""

    integers: int = 0
    large_integers: int = 0
    fractions: int = 0
    booleans: int = 0
    texts: int = 0
    comma_numbers: int = 0
    nulls: int = 0

    def note(self, cell: str, decimal: str = ".") -> None:
        """Count one cell that is not null."""
        if _INTEGER.fullmatch(cell):
            # 18 digits always fit; only longer ones have to be looked at.
            if len(cell) > 18 and not INT64_MIN <= int(cell[:400]) <= INT64_MAX:
                self.large_integers += 1
            else:
                self.integers += 1
        elif as_number(cell, decimal) is not None:
            self.fractions += 1
        elif cell.lower() in ("true", "false"):
            self.booleans += 1
        else:
            self.texts += 1
            self.comma_numbers += decimal == "." and _DECIMAL_COMMA.fullmatch(cell) is not None

    @property
    def values(self) -> int:
        """Cells that are not null."""
        return self.integers + self.large_integers + self.fractions + self.booleans + self.texts

    def type(self) -> ValueType | None:
        """The column's type; None when every cell is null."""
        numbers = self.integers + self.large_integers + self.fractions
        if not self.values:
            return None
        if 2 * numbers > self.values:
            return ValueType.DOUBLE if self.fractions or self.large_integers else ValueType.INT64
        if 2 * self.booleans > self.values:
            return ValueType.BOOL
        return ValueType.STRING

    def warning(self) -> str:
        """What a person should know about the choice of type; empty when there is nothing."""
        kind = self.type()
        if kind is ValueType.DOUBLE and self.large_integers:
            return (
                f"{self.large_integers} integers beyond 64 bits: the column is double and keeps about 15 of their "
                "digits; `--type COLUMN=string` keeps all"
            )
        if kind is ValueType.STRING and 2 * self.comma_numbers > self.texts:
            return "text that looks like numbers with a decimal comma; did you mean `--decimal ,`?"
        if kind is None:
            return "every cell is null: nothing is sent"
        return ""


def converter(kind: ValueType, decimal: str = ".") -> Callable[[str], Cell]:
    """A function from a cell that is not null to a value of this type; it raises RowError."""

    def double(cell: str) -> Cell:
        number = as_number(cell, decimal)
        if number is None:
            raise RowError("VALUE_UNPARSABLE", f"{cell[:40]!r} is not a number")
        if math.isinf(number) and "n" not in cell.lower():
            raise RowError("VALUE_OUT_OF_RANGE", f"{cell[:40]!r} is beyond what a double holds")
        return number

    def int64(cell: str) -> Cell:
        if not _INTEGER.fullmatch(cell):
            raise RowError("VALUE_UNPARSABLE", f"{cell[:40]!r} is not an integer")
        number = int(cell[:400])
        if not INT64_MIN <= number <= INT64_MAX:
            raise RowError("VALUE_OUT_OF_RANGE", f"{cell[:40]!r} is beyond 64 bits")
        return number

    def boolean(cell: str) -> Cell:
        lowered = cell.lower()
        if lowered in _TRUE:
            return True
        if lowered in _FALSE:
            return False
        raise RowError("VALUE_UNPARSABLE", f"{cell[:40]!r} is not true or false")

    def string(cell: str) -> Cell:
        return cell.encode("utf-8", "surrogateescape")

    return {
        ValueType.DOUBLE: double,
        ValueType.INT64: int64,
        ValueType.BOOL: boolean,
        ValueType.STRING: string,
    }[kind]
