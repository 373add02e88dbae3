"""Computing buckets: minutes from readings, hours from minutes. All of it within a caller's transaction."""

from collections.abc import Iterator, Sequence
from typing import Final, LiteralString

import numpy as np

from storage.aggregate.doubles import is_huge, quotient, squares
from storage.binary import Int4Array, Int8Array, TimestampArray
from storage.database import Connection
from storage.model import ValueType
from storage.rollup.dirty import Keys, hours_of
from storage.statements import statements
from storage.times import DAY_US, moment

_SQL = statements("rollup.sql")

ROLLED_TYPES: Final = (ValueType.DOUBLE, ValueType.BIGINT)
"""The types of which there are rollups."""

_COLUMNS: Final[tuple[LiteralString, ...]] = (
    "readings", "minimum", "maximum", "total", "deviation", "first_ts", "first_value", "last_ts", "last_value",
)  # fmt: skip
_HUGE: Final[LiteralString] = is_huge("h.value")
# A count times a variance rounds to 0 only where the variance is 0.
_AGGREGATES: Final[LiteralString] = f"""count(*) AS readings, min(h.value), max(h.value),
       CASE WHEN count(*) FILTER (WHERE {_HUGE}) > 0 THEN 'NaN' ELSE sum(h.value) FILTER (WHERE NOT {_HUGE}) END,
       CASE WHEN count(*) FILTER (WHERE {_HUGE}) > 0 THEN 'NaN'
            ELSE count(*) * var_pop(h.value::double precision) FILTER (WHERE NOT {_HUGE}) END,
       min(h.ts), (array_agg(h.value ORDER BY h.ts))[1], max(h.ts), (array_agg(h.value ORDER BY h.ts DESC))[1]"""
_MERGED: Final[LiteralString] = f"""sum(h.readings)::bigint AS readings, min(h.minimum), max(h.maximum), sum(h.total),
       sum(h.deviation + {squares("h.readings", "h.mean - h.overall")}),
       min(h.first_ts), (array_agg(h.first_value ORDER BY h.first_ts))[1],
       max(h.last_ts), (array_agg(h.last_value ORDER BY h.last_ts DESC))[1]"""
_MEAN: Final[LiteralString] = quotient("n.total::double precision", "n.readings")

# Buckets of one statement: bounds its time and its arrays.
_PER_STATEMENT: Final = 10_000


async def compute(connection: Connection, tenant_id: int, value_type: ValueType, minutes: Keys, floor_us: int) -> int:
    """Compute minutes again, and the hours they lie in; returns how many minutes.

    Buckets that begin before `floor_us` are passed over: some of their readings are gone.
    """
    minutes = minutes[minutes[:, 2] >= floor_us]
    await _compute(connection, "compute_minutes", tenant_id, value_type, minutes)
    hours = hours_of(minutes) if len(minutes) else minutes
    await _compute(connection, "compute_hours", tenant_id, value_type, hours)
    return len(minutes)


async def ensure(connection: Connection, from_us: int, to_us: int) -> None:
    """Make the months that hold [from_us, to_us)."""
    await connection.execute(_SQL["ensure_rollups"], {"from": moment(from_us), "to": moment(to_us)})


async def fill(
    connection: Connection,
    tenant_id: int,
    value_type: ValueType,
    entities: Sequence[int],
    attributes: Sequence[int],
    window_us: tuple[int, int],
) -> None:
    """Compute every bucket of some devices and attributes in a window of whole hours."""
    parameters = {
        "tenant": tenant_id,
        "entities": Int8Array(entities),
        "attributes": Int4Array(attributes),
        "from": moment(window_us[0]),
        "to": moment(window_us[1]),
    }
    for name in ("clear_minutes", "clear_hours", "fill_minutes", "fill_hours"):
        await connection.execute(_statement(name, value_type), parameters)


async def _compute(connection: Connection, name: str, tenant_id: int, value_type: ValueType, keys: Keys) -> None:
    for part, from_us, to_us in _by_day(keys):
        await ensure(connection, from_us, to_us)
        parameters = {
            "tenant": tenant_id,
            "entities": Int8Array(part[:, 0]),
            "attributes": Int4Array(part[:, 1]),
            "buckets": TimestampArray(part[:, 2]),
            "from": moment(from_us),
            "to": moment(to_us),
        }
        await connection.execute(_statement(name, value_type), parameters)


def _by_day(keys: Keys) -> Iterator[tuple[Keys, int, int]]:
    """Buckets of one day at a time, for a statement that spans years would be planned over all their partitions."""
    days = keys[:, 2] // DAY_US
    for day in np.unique(days).tolist():
        of_day = keys[days == day]
        for at in range(0, len(of_day), _PER_STATEMENT):
            yield of_day[at : at + _PER_STATEMENT], day * DAY_US, (day + 1) * DAY_US


def _overall(window: LiteralString) -> LiteralString:
    """The mean of all the buckets of a window."""
    total: LiteralString = f"(sum(n.total) OVER {window})::double precision"
    return quotient(total, f"sum(n.readings) OVER {window}")


def _statement(name: str, value_type: ValueType) -> LiteralString:
    text = _SQL[name]
    columns: LiteralString = ", ".join(_COLUMNS)
    excluded: LiteralString = ", ".join([f"excluded.{column}" for column in _COLUMNS])
    kind: LiteralString = "double" if value_type is ValueType.DOUBLE else "bigint"
    for field, value in (
        ("{type}", kind),
        ("{columns}", columns),
        ("{excluded}", excluded),
        ("{aggregates}", _AGGREGATES),
        ("{merged}", _MERGED),
        ("{mean}", _MEAN),
        ("{overall}", _overall("w")),
    ):
        text = text.replace(field, value)
    return text
