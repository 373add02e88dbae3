"""Pages of series apart from where they are read: where one ends, and two parts of one as one. Pure."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from storage.model import ValueType
from storage.reads.model import MAX_TEXT_BYTES, Position, SeriesPage, SeriesPart, SeriesQuestion


def head(part: SeriesPart, count: int) -> SeriesPart:
    """The first `count` readings."""
    return replace(part, times_us=part.times_us[:count], values=part.values[:count], revisions=part.revisions[:count])


def concatenated(run: Sequence[SeriesPart]) -> SeriesPart:
    """Parts of one series, of which each begins where the one before it ends, as one."""
    if len(run) == 1:
        return run[0]
    return replace(
        run[0],
        times_us=np.concatenate([part.times_us for part in run]),
        values=np.concatenate([part.values for part in run]),
        revisions=np.concatenate([part.revisions for part in run]),
    )


def text_bytes(part: SeriesPart) -> int:
    """How much of MAX_TEXT_BYTES it takes; 0 for other types than text."""
    return sum(len(text.encode()) for text in part.values) if part.type is ValueType.TEXT else 0


def end_of_page(question: SeriesQuestion, parts: Sequence[SeriesPart], after: Position | None) -> Position:
    """The last reading of a page that began behind `after`, for the next one to begin behind it. Parts are not empty,
    and there is one for each series.
    """
    part = parts[-1]
    return Position(
        list(question.entities).index(part.entity),
        list(question.attributes).index(part.attribute),
        int(part.times_us[-1]),
        part.place[0],
        _taken_before(question, part, after) + len(part.times_us) if question.limit_per_series else 0,
    )


def join_pages(
    question: SeriesQuestion, older: SeriesPage, newer: SeriesPage, page_size: int, after: Position | None
) -> SeriesPage:
    """The page after `after`, of two pages after it that hold the older and the newer part of the same series."""
    first, second = (newer, older) if question.descending else (older, newer)
    runs: dict[tuple[int, int], list[SeriesPart]] = {}
    for page in (first, second):
        for part in page.parts:
            runs.setdefault(part.place, []).append(part)
    ends = [page.parts[-1] for page in (first, second) if page.last is not None]
    is_cut = bool(ends)
    parts: list[SeriesPart] = []
    left, bytes_left = page_size, MAX_TEXT_BYTES
    for place in sorted(runs, reverse=question.descending):
        run = concatenated(runs[place])
        if question.limit_per_series:
            run = head(run, question.limit_per_series - _taken_before(question, run, after))
        for end in ends:
            # Nothing beyond the end of a page that was cut: what it left out comes before that.
            run = _up_to(run, end, descending=question.descending)
        # Each part keeps to the bounds of a page, but not both together. What passes the bytes is the last.
        fitting = min(left, _within_text(run, bytes_left)) if bytes_left > 0 else 0
        if len(run.times_us) > fitting:
            run, is_cut = head(run, fitting), True
        if len(run.times_us):
            left -= len(run.times_us)
            bytes_left -= text_bytes(run)
            parts.append(run)
    # Both parts go on behind `after` and within what is left of the limit: the first reading of either is in the page.
    # Without one, paging would end here, and leave out all that follows.
    assert parts or not is_cut
    return SeriesPage(newer.as_of_us, parts, end_of_page(question, parts, after) if is_cut else None)


def _taken_before(question: SeriesQuestion, part: SeriesPart, after: Position | None) -> int:
    """How many readings of a part's series earlier pages had; known only where there is a limit for each series."""
    if after is None:
        return 0
    goes_on = (question.entities[after.entity], question.attributes[after.attribute]) == (part.entity, part.attribute)
    return after.taken if goes_on else 0


def _within_text(run: SeriesPart, most: int) -> int:
    """How many readings of a series there are up to the text that passes `most` bytes."""
    if run.type is not ValueType.TEXT:
        return len(run.times_us)
    for count, text in enumerate(run.values, 1):
        most -= len(text.encode())
        if most <= 0:
            return count
    return len(run.times_us)


def _up_to(run: SeriesPart, end: SeriesPart, *, descending: bool) -> SeriesPart:
    """What of a series does not come after the last reading of `end`."""
    if run.place == end.place:
        last_us = int(end.times_us[-1])
        kept = run.times_us >= last_us if descending else run.times_us <= last_us
        return head(run, int(kept.sum()))
    follows = run.place < end.place if descending else run.place > end.place
    return head(run, 0) if follows else run
