"""Which id a tenant's name stands for."""

from time import monotonic
from typing import Final

from storage.database import Pool
from storage.errors import translated
from storage.statements import statements

NO_TENANT: Final = -1
"""The id of a tenant that does not exist: reads find nothing under it and need no case of their own."""

_LIFETIME_S = 60.0
_MOST_NAMES = 10_000


class TenantDirectory:
    """Finds tenants by name on `pool`, whose role must see the registry (ingest does, query does not).

    A tenant that is found is remembered for a minute, so that one that was deleted and made anew is found again. One
    that is not found is not remembered: it may register with its first write at any moment, and a caller whose write
    was acked must see it.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._known: dict[str, tuple[int, float]] = {}

    async def find(self, name: str, wait_s: float) -> int:
        """The tenant's id, NO_TENANT when it never wrote; waits `wait_s` seconds for a connection.

        Raises:
            StorageError: the database could not be asked.
        """
        known = self._known.get(name)
        if known is not None and known[1] > monotonic():
            return known[0]
        with translated():
            async with self._pool.connection(timeout=wait_s) as connection:
                cursor = await connection.execute(statements("reads.sql")["find_tenant"], {"name": name})
                row = await cursor.fetchone()
        if row is None:
            return NO_TENANT
        if len(self._known) >= _MOST_NAMES:
            self._known.clear()
        self._known[name] = (int(row[0]), monotonic() + _LIFETIME_S)
        return int(row[0])
