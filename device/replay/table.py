"""Rows of a text file: records, separators, fields. Reads a line at a time, whatever the file's size."""

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from device.replay.errors import ReplayError, RowError

WHITESPACE = " "
# In order of preference: a semicolon or a tab is hardly ever part of a value, a comma may be a decimal comma.
_CANDIDATES = ("\t", ";", ",", WHITESPACE)
_SAMPLE_RECORDS = 100
# A quoted field may span lines, but a stray quote must not swallow the rest of the file.
_MOST_LINES_PER_RECORD = 100

_NAMES = {"tab": "\t", "\\t": "\t", "space": WHITESPACE, "whitespace": WHITESPACE, "comma": ",", "semicolon": ";"}


class Record(NamedTuple):
    """One row as text: the number of its first line (from 1), and where it starts in the file, in bytes.

    `problem` is set when the row could not be told from its neighbours; its text is then the first line alone.
    """

    line: int
    offset: int
    text: str
    problem: str = ""


def records(path: Path) -> Iterator[Record]:
    """The file's rows in order, without its empty lines. Raises OSError."""
    with path.open("rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":
            file.seek(0)
        offset = file.tell()
        number = 0
        waiting: list[bytes] = []
        while True:
            first = waiting.pop(0) if waiting else file.readline()
            if not first:
                return
            number += 1
            lines = [first]
            if first.count(b'"') % 2:
                _complete(lines, waiting, file.readline)
            problem = ""
            if b"".join(lines).count(b'"') % 2:
                problem = "a quoted field is never closed"
                waiting = lines[1:] + waiting
                lines = lines[:1]
            raw = b"".join(lines)
            if raw.strip():
                yield Record(number, offset, _decode(raw), problem)
            offset += len(raw)
            number += len(lines) - 1


def _complete(lines: list[bytes], waiting: list[bytes], readline: Callable[[], bytes]) -> None:
    quotes = lines[0].count(b'"')
    while quotes % 2 and len(lines) < _MOST_LINES_PER_RECORD:
        following = waiting.pop(0) if waiting else readline()
        if not following:
            return
        lines.append(following)
        quotes += following.count(b'"')


def read_at(path: Path, offsets: Iterator[tuple[int, int]]) -> Iterator[Record]:
    """The rows at these (line, offset) places, in the order asked for."""
    with path.open("rb") as file:
        for line, offset in offsets:
            file.seek(offset)
            lines = [file.readline()]
            if lines[0].count(b'"') % 2:
                _complete(lines, [], file.readline)
            yield Record(line, offset, _decode(b"".join(lines)))


def _decode(raw: bytes) -> str:
    # Bytes that are not UTF-8 are carried through, for the server to reject as what they are.
    return raw.decode("utf-8", "surrogateescape").rstrip("\r\n")


def split(text: str, separator: str) -> list[str]:
    """The fields of a row, stripped of blanks around them. Raises RowError for broken quotes."""
    if '"' in text:
        try:
            [fields] = csv.reader(
                [text.strip()] if separator == WHITESPACE else text.splitlines(keepends=True),
                delimiter=separator,
                skipinitialspace=True,
                strict=True,
            )
        except (csv.Error, ValueError) as error:
            raise RowError("ROW_QUOTES", f"the quotes do not match: {error}") from None
        return [field.strip() for field in fields]
    if separator == WHITESPACE:
        return text.split()
    return [field.strip() for field in text.split(separator)]


def sniff_separator(sample: Sequence[str]) -> str:
    """The separator that gives nearly every row the same number of fields, at least two."""
    for candidate in _CANDIDATES:
        widths = Counter(_width(text, candidate) for text in sample)
        if not widths:
            break
        width, rows = widths.most_common(1)[0]
        if width > 1 and rows >= 0.9 * len(sample):
            return candidate
    # A few short or long rows among few: the most common width still tells, if it is wide enough.
    best = max(_CANDIDATES, key=lambda candidate: _typical_width(sample, candidate))
    return best if _typical_width(sample, best) > 1 else ","


def _typical_width(sample: Sequence[str], separator: str) -> int:
    widths = Counter(_width(text, separator) for text in sample)
    if not widths:
        return 0
    width, rows = widths.most_common(1)[0]
    return width if 2 * rows > len(sample) else 0


def _width(text: str, separator: str) -> int:
    try:
        return len(split(text, separator))
    except RowError:
        return 0


def sample_of(path: Path) -> list[str]:
    """The first rows of the file. Raises ReplayError when it cannot be read or holds none."""
    sample = []
    try:
        for record in records(path):
            sample.append(record.text)
            if len(sample) == _SAMPLE_RECORDS:
                break
    except OSError as error:
        raise ReplayError(f"cannot read {path}: {error.strerror}") from error
    if not sample:
        raise ReplayError(f"{path} is empty")
    return sample


def named_separator(name: str) -> str:
    """The separator that a user wrote: one character, or its name. Raises ReplayError."""
    separator = _NAMES.get(name.lower(), name)
    if len(separator) != 1 or separator == '"':
        raise ReplayError(f"a separator is one character or one of {', '.join(_NAMES)}; not {name!r}")
    return separator
