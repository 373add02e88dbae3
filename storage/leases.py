"""Leases in PostgreSQL: pieces of work of which each is done by one process at a time, shared evenly.

A scope has numbered items (for the relay: lanes). Processes that want a share join as members; each keeps renewing
its membership and the items it holds. Who dies is gone when its leases expire, on the database's clock, and the
others take over.

A lease alone does not keep two processes from believing that they hold an item: one may stall past its expiry and
wake up. So every lease carries an epoch that grows with each change of hands, and whatever the work writes must be
refused by the place it is written to when a newer epoch was there before.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from uuid import UUID, uuid4

from storage.database import Pool
from storage.errors import translated
from storage.statements import statements

log = logging.getLogger(__name__)

_SQL = statements("relay.sql")


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to work on an item, for a while. `epoch` is the fencing token."""

    item: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Standing:
    """What a renewal brought: the leases held, and which of them to give up so that others get their share."""

    held: Mapping[int, Lease]
    surplus: tuple[int, ...] = ()
    members: int = 0


def share(member: UUID, members: Sequence[UUID], items: int) -> int:
    """How many of `items` a member may hold: an equal part; what does not divide goes to the smallest ids.

    The shares of all members add up to `items`, so each member can act on its own. 0 for one not among them.
    """
    ordered = sorted(members)
    if member not in ordered:
        return 0
    each, rest = divmod(items, len(ordered))
    return each + (1 if ordered.index(member) < rest else 0)


@dataclass(slots=True)
class Leases:
    """One process's membership in a scope. Not for several tasks at once.

    `ttl_s`: seconds after its last renewal at which a lease expires; renew at a third of that. `clock` is monotonic.
    """

    pool: Pool
    scope: str
    items: int
    ttl_s: float
    label: str
    clock: Callable[[], float] = time.monotonic
    member: UUID = field(default_factory=uuid4)
    _held: dict[int, Lease] = field(default_factory=dict)
    _valid_until: float = float("-inf")

    def holds(self, lease: Lease) -> bool:
        """Whether the lease is certainly still ours, by the local clock counted from before the last renewal began.

        True now says nothing about a moment later: writes are fenced by the epoch, this only ends work early.
        """
        return self._held.get(lease.item) == lease and self.clock() < self._valid_until

    async def open(self) -> None:
        """Make the scope's items exist.

        Raises:
            StorageError: the database.
        """
        with translated():
            async with self.pool.connection() as connection:
                items = list(range(self.items))
                await connection.execute(_SQL["add_lease_items"], {"scope": self.scope, "items": items})

    async def renew(self) -> Standing:
        """Renew membership and leases, and take free items up to the fair share.

        Raises:
            StorageError: the database; what was held stays held until it expires.
        """
        began = self.clock()
        parameters = {"scope": self.scope, "member": self.member, "ttl": timedelta(seconds=self.ttl_s)}
        with translated():
            async with self.pool.connection() as connection, connection.transaction():
                await connection.execute(_SQL["join_leases"], {**parameters, "label": self.label})
                await connection.execute(_SQL["forget_members"], parameters)
                renewed = await (await connection.execute(_SQL["renew_leases"], parameters)).fetchall()
                found = await (await connection.execute(_SQL["live_members"], parameters)).fetchall()
                members = [row[0] for row in found]
                fair = share(self.member, members, self.items)
                if len(renewed) < fair:
                    wanted = {**parameters, "wanted": fair - len(renewed)}
                    renewed += await (await connection.execute(_SQL["claim_leases"], wanted)).fetchall()
        held = {item: Lease(item, epoch) for item, epoch in renewed}
        for item in held.keys() - self._held.keys():
            log.info("lease taken", extra={"scope": self.scope, "item": item, "epoch": held[item].epoch})
        for item in self._held.keys() - held.keys():
            log.warning("lease lost", extra={"scope": self.scope, "item": item})
        self._held = held
        self._valid_until = began + self.ttl_s
        return Standing(dict(held), tuple(sorted(held)[fair:]), len(members))

    async def release(self, items: Sequence[int]) -> None:
        """Give items up for others to take at once. The work on them must have ended.

        Raises:
            StorageError: the database; the leases then expire by themselves.
        """
        for item in items:
            self._held.pop(item, None)
        parameters = {"scope": self.scope, "member": self.member, "items": list(items)}
        with translated():
            async with self.pool.connection() as connection:
                await connection.execute(_SQL["release_leases"], parameters)

    async def leave(self) -> None:
        """Release everything and stop being a member.

        Raises:
            StorageError: the database; membership and leases then expire by themselves.
        """
        await self.release(range(self.items))
        with translated():
            async with self.pool.connection() as connection:
                await connection.execute(_SQL["leave_leases"], {"scope": self.scope, "member": self.member})
