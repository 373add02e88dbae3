"""What of a batch is written, and in which order. Pure: decisions on arrays, no I/O."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.model import (
    BatchMessage,
    Bools,
    Changes,
    Columns,
    Int32s,
    Outcome,
    Reason,
    RejectedReading,
    ValueType,
)

# Above every entity id; makes one sort key of bucket and entity.
_ENTITY_BITS = 53


@dataclass(frozen=True, slots=True)
class Arranged:
    """Readings ready to be written: sorted by (tenant, bucket, entity, attribute, time), one per key."""

    readings: dict[ValueType, Columns]
    # (position of the message, rejection): readings that a later one of the same message overrode.
    superseded: list[tuple[int, RejectedReading]]


def judge(messages: Sequence[BatchMessage], standing: Mapping[int, int]) -> list[Outcome]:
    """What becomes of each message, given where each device's stream stands.

    `standing` maps the entity id of every stream that is still the newest to its committed sequence before this
    batch. Messages without an epoch belong to unary writes, which have no stream to be outdated.
    """
    newest: dict[int, int] = {}
    for message in messages:
        if message.epoch is not None:
            newest[message.entity_id] = max(newest.get(message.entity_id, 0), message.epoch)
    outcomes = []
    for message in messages:
        if message.epoch is None:
            outcomes.append(Outcome.COMMITTED)
        elif message.entity_id not in standing or message.epoch != newest[message.entity_id]:
            outcomes.append(Outcome.STALE)
        elif message.sequence <= standing[message.entity_id]:
            outcomes.append(Outcome.REPEATED)
        else:
            outcomes.append(Outcome.COMMITTED)
    return outcomes


def arrange(readings: Mapping[ValueType, Columns], outcomes: Sequence[Outcome], *, buckets: int) -> Arranged:
    """Drop the readings of messages that are not written, sort the rest, keep the last value of each key.

    Sorted rows prevent deadlocks between lanes and gateways, and cost less WAL. Two values of one key must not reach
    one statement: PostgreSQL refuses to update a row twice (SQLSTATE 21000).
    """
    live = np.array([outcome is Outcome.COMMITTED for outcome in outcomes], bool)
    arranged: dict[ValueType, Columns] = {}
    superseded: list[tuple[int, RejectedReading]] = []
    # Always in one order of types, as well: batches come with theirs in any order.
    for value_type in ValueType:
        part = readings.get(value_type)
        if part is None:
            continue
        columns = part if live.all() else part.take(live[part.source])
        if not len(columns):
            continue
        columns = columns.take(_order(columns, buckets))
        again = _same_key_as_next(columns)
        if again.any():
            superseded += _overridden(columns, again)
            columns = columns.take(~again)
        arranged[value_type] = columns
    return Arranged(arranged, superseded)


def _order(columns: Columns, buckets: int) -> NDArray[np.intp]:
    place = ((columns.entity % buckets) << _ENTITY_BITS) | columns.entity
    keys: tuple[NDArray[Any], ...] = (columns.time_us, columns.attribute, place)
    if (columns.tenant != columns.tenant[0]).any():
        keys = (*keys, columns.tenant)
    # lexsort is stable: equal keys stay in order of arrival, so the last of them is the newest.
    return np.lexsort(keys)


def _same_key_as_next(columns: Columns) -> Bools:
    same = np.zeros(len(columns), bool)
    same[:-1] = (
        (columns.time_us[1:] == columns.time_us[:-1])
        & (columns.attribute[1:] == columns.attribute[:-1])
        & (columns.entity[1:] == columns.entity[:-1])
        & (columns.tenant[1:] == columns.tenant[:-1])
    )
    return same


def _overridden(columns: Columns, again: Bools) -> list[tuple[int, RejectedReading]]:
    """Rejections for readings whose own message says another value last, for the same key.

    Across messages the later one is an ordinary correction and nothing is said.
    """
    found = []
    same_message = again.copy()
    same_message[:-1] &= columns.source[1:] == columns.source[:-1]
    # Where each message's last word on a key stands.
    lasts = np.flatnonzero(~same_message)
    positions = np.flatnonzero(same_message)
    for position, last in zip(positions.tolist(), lasts[np.searchsorted(lasts, positions)].tolist(), strict=True):
        if differ(columns.value[position], columns.value[last]):
            text = f"reading {columns.index[last]} has the same attribute and timestamp and another value"
            rejection = RejectedReading(int(columns.index[position]), Reason.SUPERSEDED_IN_MESSAGE, text)
            found.append((int(columns.source[position]), rejection))
    return found


def differ(one: Any, other: Any) -> bool:
    """Whether two values differ as PostgreSQL sees it: NaN equals NaN."""
    return bool(one != other and not (one != one and other != other))  # noqa: PLR0124 - only NaN is not itself


def latest_candidates(columns: Columns) -> Columns:
    """Of arranged readings, the newest of each (tenant, entity, attribute) that may become a latest value."""
    if columns.historical.any():
        columns = columns.take(~columns.historical)
    if not len(columns):
        return columns
    return columns.take(_last_of_series(columns))


def latest_contenders(columns: Columns, changed: NDArray[np.intp], revision: Int32s) -> Columns:
    """`latest_candidates`, together with a merge's corrections of readings that are no candidates; in order.

    Such a correction does not move a latest value, but must reach the one that holds the very reading.
    """
    corrected = changed[revision > 0]
    corrected = corrected[columns.historical[corrected]]
    if not len(corrected):
        return latest_candidates(columns)
    positions = np.flatnonzero(~columns.historical)
    contends = np.zeros(len(columns), bool)
    contends[positions[_last_of_series(columns.take(positions))]] = True
    contends[corrected] = True
    return columns.take(contends)


def _last_of_series(columns: Columns) -> Bools:
    last = np.ones(len(columns), bool)
    last[:-1] = (
        (columns.attribute[1:] != columns.attribute[:-1])
        | (columns.entity[1:] != columns.entity[:-1])
        | (columns.tenant[1:] != columns.tenant[:-1])
    )
    return last


def all_new(columns: Columns) -> Changes:
    """The changes of a COPY that went through: every reading, each a first value."""
    return Changes(
        tenant=columns.tenant,
        entity=columns.entity,
        attribute=columns.attribute,
        time_us=columns.time_us,
        value=columns.value,
        revision=np.zeros(len(columns), np.int32),
    )


def changed_only(columns: Columns, changed: NDArray[np.intp], revision: Int32s) -> Changes:
    """The changes of a merge: the readings at the positions `changed`, with the revisions they took."""
    part = all_new(columns).take(changed)
    return Changes(part.tenant, part.entity, part.attribute, part.time_us, part.value, revision)
