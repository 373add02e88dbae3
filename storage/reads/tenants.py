"""Which id a tenant's name stands for."""

from collections.abc import Callable
from time import monotonic
from typing import Final

NO_TENANT: Final = -1
"""The id of a tenant that does not exist: reads find nothing under it and need no case of their own."""

_LIFETIME_S = 60.0
_MOST_NAMES = 10_000


class TenantDirectory:
    """Remembers which tenant has which id; reads of every source share one.

    A tenant that is found is remembered for a minute, so that one that was deleted and made anew is found again. One
    that is not found is not remembered, and is looked up in the snapshot of the data: it may register with its first
    write at any moment, and an answer must not claim to be complete up to a time at which the tenant was there.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._known: dict[str, tuple[int, float]] = {}

    def known(self, name: str) -> int | None:
        """The tenant's id; None when it has to be looked up."""
        known = self._known.get(name)
        return known[0] if known is not None and known[1] > self._clock() else None

    def remember(self, name: str, tenant_id: int) -> None:
        """Take note of an id that was just looked up."""
        if len(self._known) >= _MOST_NAMES:
            self._known.clear()
        self._known[name] = (tenant_id, self._clock() + _LIFETIME_S)
