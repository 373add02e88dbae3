"""Redshift for a process that only reads it: no bucket, no identity in AWS, and a login without the right to write."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from storage.errors import StorageDefect, StorageError, StorageUnavailable
from storage.warehouse.cancellation import Cancellation
from storage.warehouse.port import EVERYTHING, Answer, Completeness, Scope
from storage.warehouse.redshift import RedshiftWarehouse
from storage.warehouse.redshift_session import RedshiftLogin
from storage.warehouse.staging import StagedFile, Staging

_READS_ONLY = "this process only reads the warehouse: it has no staging bucket"


class NoStaging(Staging):
    """In place of the bucket."""

    def __init__(self) -> None:
        """Nothing is asked of AWS: not even a region has to be known."""

    def put(self, name: str, content: bytes) -> StagedFile:
        """Nothing is staged.

        Raises:
            StorageDefect: always.
        """
        raise StorageDefect(_READS_ONLY)

    def collect(self) -> int:
        """Nothing is tidied.

        Raises:
            StorageDefect: always.
        """
        raise StorageDefect(_READS_ONLY)


class RedshiftReader(RedshiftWarehouse):
    """See `port.Warehouse`; what writes fails for want of a bucket or of rights.

    `measured_s`: how long the completeness of everything is told again without asking. It serves to plan; what an
    answer claims is read in the answer's own transaction. Every gateway asks every second, each time a transaction of
    five statements, and one that never stops asking never lets a serverless warehouse sleep.
    """

    def __init__(
        self, login: RedshiftLogin, *, measured_s: float = 0.0, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(login, NoStaging())
        self._measured_s = measured_s
        self._monotonic = monotonic
        self._measured: tuple[float, Completeness] | None = None

    def completeness(self, scope: Scope = EVERYTHING) -> Completeness:
        """See `port.Warehouse`. Missing rights count as a warehouse that is away: between the loader's first start and
        the operator's GRANT they are missing, and a gateway has devices to serve meanwhile."""
        known = self._measured
        if scope == EVERYTHING and known is not None and self._monotonic() - known[0] < self._measured_s:
            return known[1]
        asked = self._monotonic()
        try:
            found = super().completeness(scope)
        except StorageDefect as error:
            raise StorageUnavailable(f"the warehouse cannot be read: {error}") from error
        if scope == EVERYTHING:
            self._measured = (asked, found)
        return found

    def query(
        self,
        statement: str,
        parameters: Sequence[Any] = (),
        *,
        scope: Scope = EVERYTHING,
        max_rows: int | None = None,
        cancellation: Cancellation | None = None,
    ) -> Answer:
        """See `port.Warehouse`."""
        try:
            return super().query(statement, parameters, scope=scope, max_rows=max_rows, cancellation=cancellation)
        except StorageError:
            # What was measured before must not pass for a sign that it is well.
            self._measured = None
            raise
