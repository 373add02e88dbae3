"""Telling PostgreSQL what is loaded, so that the outbox can let go of it."""

from collections.abc import Mapping
from typing import Protocol

import psycopg

from storage.database import Role, connection_info
from storage.errors import translated
from storage.warehouse.statements import statements

_SQL = statements("rebuild.sql")


class LoadedLanes(Protocol):
    """Where the progress of each lane is reported."""

    def report(self, lanes_us: Mapping[int, int]) -> int:
        """Record per lane the primary's time (microseconds) through which everything is loaded. Never goes back.

        Returns what the primary's clock says now.
        """
        ...


class PostgresLoadedLanes:
    """The table `loaded_lanes` of the operational database.

    Written after the warehouse's commit, never before: the outbox is what a load could be repeated from.
    """

    def __init__(self, dsn: str) -> None:
        self._info = connection_info(dsn, Role.MAINTAIN, statement_timeout_s=10.0)

    def report(self, lanes_us: Mapping[int, int]) -> int:
        """See LoadedLanes.

        Raises:
            StorageError: the database cannot be reached; the next report catches up.
        """
        rows = [{"lane": lane, "through_us": through} for lane, through in sorted(lanes_us.items())]
        with translated(), psycopg.connect(self._info) as connection, connection.cursor() as cursor:
            if rows:
                cursor.executemany(_SQL["report_loaded_lane"], rows)
            now = cursor.execute(_SQL["clock"]).fetchone()
        assert now is not None
        return int(now[0])
