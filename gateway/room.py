"""Room for waiting readings: bounded for each tenant and in total, and shared fairly."""

import asyncio
from collections import deque
from dataclasses import dataclass, field
from enum import Enum


class Bound(Enum):
    """Which bound keeps a message waiting."""

    TENANT = "TENANT_QUEUE"
    GATEWAY = "GATEWAY_QUEUE"


@dataclass(slots=True)
class _Share:
    used: int = 0
    waiters: deque[tuple[int, asyncio.Future[None]]] = field(default_factory=deque)


class Room:
    """Counts readings that were received and are not yet committed.

    Backpressure has one name here: `enter` does not return until there is room, and whoever waits in it reads nothing
    more from its stream. A message larger than a bound enters when nothing else is there, or it would wait for ever.
    Tenants take turns, so that one tenant's crowd of streams does not keep another's out.
    """

    def __init__(self, *, per_tenant: int, total: int) -> None:
        self.per_tenant = per_tenant
        self.total = total
        self._used = 0
        self._shares: dict[int, _Share] = {}

    @property
    def used(self) -> int:
        """Readings inside."""
        return self._used

    def blocked(self, tenant_id: int, readings: int) -> Bound | None:
        """The bound that a message of so many readings would exceed now; None when it may enter."""
        share = self._shares.get(tenant_id)
        if share is not None and share.used and share.used + readings > self.per_tenant:
            return Bound.TENANT
        if self._used and self._used + readings > self.total:
            return Bound.GATEWAY
        return None

    def enter_nowait(self, tenant_id: int, readings: int) -> bool:
        """Take the room if it is there and nobody of the tenant waits for it."""
        share = self._shares.setdefault(tenant_id, _Share())
        if share.waiters or self.blocked(tenant_id, readings) is not None:
            return False
        share.used += readings
        self._used += readings
        return True

    async def enter(self, tenant_id: int, readings: int) -> None:
        """Wait for room and take it. Cancelled, it has taken none."""
        if self.enter_nowait(tenant_id, readings):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiters = self._shares[tenant_id].waiters
        waiters.append((readings, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                # The room was given in the very moment of the cancellation.
                self.leave(tenant_id, readings)
            else:
                waiters.remove((readings, turn))
            raise

    def leave(self, tenant_id: int, readings: int) -> None:
        """Give room back, and let in who waits for it."""
        share = self._shares[tenant_id]
        share.used -= readings
        self._used -= readings
        self._admit()
        if not share.used and not share.waiters:
            self._shares.pop(tenant_id, None)

    def _admit(self) -> None:
        waiting = deque(tenant for tenant, share in self._shares.items() if share.waiters)
        while waiting:
            tenant = waiting.popleft()
            share = self._shares[tenant]
            readings, turn = share.waiters[0]
            bound = self.blocked(tenant, readings)
            if bound is Bound.GATEWAY:
                return
            if bound is Bound.TENANT:
                continue
            share.waiters.popleft()
            if turn.cancelled():
                waiting.append(tenant)
                continue
            share.used += readings
            self._used += readings
            turn.set_result(None)
            # Last in the next round: the tenant that was let in is behind all others.
            self._shares[tenant] = self._shares.pop(tenant)
            if share.waiters:
                waiting.append(tenant)
