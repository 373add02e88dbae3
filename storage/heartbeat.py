"""The heartbeat: a row on the primary that is written all the time, so that a replica's snapshot tells its age.

Why a row: a replica's own idea of its lag (`pg_last_xact_replay_timestamp`, `replay_lag`) stands still when nobody
writes, and a log position read beside a query can be ahead of the query's snapshot. A row in the snapshot of the data
cannot: commits become visible on a replica in the order in which the primary wrote them.

Every gateway beats, and each beat is skipped when another gateway's is young enough. There is no leader whose death
would have to be noticed first.
"""

from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from storage.database import Connection
from storage.errors import StorageDefect, translated
from storage.reads.wire import MicrosLoader
from storage.statements import statements

_SQL = statements("heartbeat.sql")


@dataclass(frozen=True, slots=True)
class Beat:
    """What a beat brought. `clock_us`: the primary's clock, read between the request and the answer."""

    clock_us: int
    database_id: UUID


async def beat(connection: Connection, interval_s: float) -> Beat:
    """Beat on the primary, unless somebody did within `interval_s` seconds.

    Raises:
        StorageError: the database.
    """
    with translated():
        cursor = connection.cursor(binary=True)
        cursor.adapters.register_loader("timestamptz", MicrosLoader)
        await cursor.execute(_SQL["beat"], {"interval": timedelta(seconds=interval_s)})
        row = await cursor.fetchone()
    if row is None:
        raise StorageDefect("the heartbeat's row is missing")
    return Beat(*row)


async def last_beat(connection: Connection, database_id: UUID) -> int | None:
    """The youngest beat that a replica of that database can show, in microseconds; None when it is not one.

    Raises:
        StorageError: the database.
    """
    with translated():
        cursor = connection.cursor(binary=True)
        cursor.adapters.register_loader("timestamptz", MicrosLoader)
        await cursor.execute(_SQL["last_beat"], {"database": database_id})
        row = await cursor.fetchone()
    return None if row is None else row[0]
