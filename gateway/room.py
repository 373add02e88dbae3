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
        # Entries in all the shares' queues.
        self._waiting = 0
        # Somebody waits for the bound of all. Then nobody overtakes: small messages would otherwise take every piece
        # of room as it comes free, and a large one would wait for ever.
        self._crowded = False

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
        """Take the room if it is there and nobody waits for it who came first."""
        share = self._shares.get(tenant_id)
        if self._crowded or (share is not None and share.waiters) or self.blocked(tenant_id, readings) is not None:
            return False
        self._take(self._shares.setdefault(tenant_id, _Share()), readings)
        return True

    async def enter(self, tenant_id: int, readings: int) -> None:
        """Wait for room and take it. Cancelled, it has taken none."""
        if self.enter_nowait(tenant_id, readings):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._shares.setdefault(tenant_id, _Share()).waiters.append((readings, turn))
        self._waiting += 1
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                # The room was given in the very moment of the cancellation.
                self.leave(tenant_id, readings)
            else:
                # Whoever waited behind this one may fit where it did not.
                self._admit()
                self._forget_if_empty(tenant_id)
            raise

    def leave(self, tenant_id: int, readings: int) -> None:
        """Give room back, and let in who waits for it."""
        self._take(self._shares.setdefault(tenant_id, _Share()), -readings)
        self._admit()
        self._forget_if_empty(tenant_id)

    def _take(self, share: _Share, readings: int) -> None:
        share.used += readings
        self._used += readings

    def _forget_if_empty(self, tenant_id: int) -> None:
        share = self._shares.get(tenant_id)
        if share is not None and not share.used and not share.waiters:
            del self._shares[tenant_id]

    def _admit(self) -> None:
        self._crowded = False
        # The usual case, and it comes once for each message.
        if not self._waiting:
            return
        waiting = deque(tenant for tenant, share in self._shares.items() if share.waiters)
        while waiting:
            tenant = waiting.popleft()
            share = self._shares[tenant]
            # A waiter that was cancelled is here until its task has had its turn, or until now.
            while share.waiters and share.waiters[0][1].done():
                share.waiters.popleft()
                self._waiting -= 1
            if not share.waiters:
                continue
            readings, turn = share.waiters[0]
            bound = self.blocked(tenant, readings)
            if bound is Bound.GATEWAY:
                self._crowded = True
                return
            if bound is Bound.TENANT:
                continue
            share.waiters.popleft()
            self._waiting -= 1
            self._take(share, readings)
            turn.set_result(None)
            # Last in the next round: the tenant that was let in is behind all others.
            self._shares[tenant] = self._shares.pop(tenant)
            waiting.append(tenant)
