"""Reading the outbox by snapshots.

A sequence cannot be the cursor: a smaller number can commit later. "Below the oldest open transaction" cannot either:
one transaction that stays open would stall everything behind it. So the cursor is a snapshot. Published is what was
visible in it; new is what is visible in a later one, the target, and was not in it. A transaction that stays open is
in neither, holds nobody up, and shows in the first target after its commit.

The target is fixed until everything visible in it was sent: page by page, each in a short transaction, in the order
(xid, id). That bounds the memory for any backlog and leaves vacuum alone. A page reads with a newer snapshot than the
target, and that changes nothing: what is visible in the target stays visible, and the rows are tested against the
target.

Why the clock read before the target was taken is an exact watermark: let T be that reading and C a batch. If C became
visible before T, then it did so before the target was taken, so it is visible in the target and gets published with
it. If C is not visible in the target, it becomes visible after the target was taken, so after T. Hence "everything
committed before T is published" holds when the target is done, whatever is still open. The clock must be read in a
statement before the transaction of the page begins: in REPEATABLE READ the first statement takes the snapshot, and a
clock read in that same statement would be later than the snapshot.

Only the primary is read: a standby's snapshot counts transactions that are open on the primary as visible.
"""

from dataclasses import dataclass
from typing import Any

from storage.database import Pool
from storage.errors import StorageDefect, StorageUnavailable, translated
from storage.relay.cursor import Batch, Cursor, Page, Place, Recovery, end_of, open_in, recovery
from storage.statements import statements

_SQL = statements("relay.sql")


class NotPrimary(StorageUnavailable):
    """This is a standby: the outbox is read on the primary only. After a failover the next connection may find it."""


class LaneLost(Exception):
    """The lane's cursor was taken over under a newer lease, or is on another server than it was read from."""


@dataclass(frozen=True, slots=True)
class PageLimits:
    """How much one page may hold: outbox rows, and bytes of payload (one row always fits)."""

    rows: int = 500
    payload_bytes: int = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class LaneDrain:
    """The outbox rows of one lane, under one lease."""

    pool: Pool
    lane: int
    epoch: int
    limits: PageLimits

    async def adopt(self) -> None:
        """Make the lane's cursor refuse earlier holders.

        Raises:
            LaneLost: somebody with a newer lease was here.
            StorageError: the database.
        """
        with translated():
            async with self.pool.connection() as connection:
                done = await connection.execute(_SQL["adopt_lane"], {"lane": self.lane, "epoch": self.epoch})
        if done.rowcount != 1:
            raise LaneLost(f"lane {self.lane} has a newer lease than {self.epoch}")

    async def read(self, topic_id: str) -> Page | Recovery:
        """The next page for the topic with this id, or what was done instead because the cursor had lost its meaning.

        The cursor is read along with the page, never remembered: after a failover a remembered one may be ahead of
        the database.

        Raises:
            LaneLost: somebody has taken over.
            NotPrimary: this is a standby.
            StorageError: the database.
        """
        key = {"lane": self.lane, "epoch": self.epoch}
        with translated():
            async with self.pool.connection() as connection:
                found = await (await connection.execute(_SQL["look_at_lane"], key)).fetchone()
                if found is None:
                    raise LaneLost(f"lane {self.lane} has a newer lease than {self.epoch}")
                clock, standby, server, timeline, started, next_xid, *columns = found
                if standby:
                    raise NotPrimary("the outbox can be read on the primary only, and this is a standby")
                place = Place(server, timeline, started)
                cursor = Cursor(*columns)
                needed = recovery(cursor, place, next_xid, topic_id)
                if needed is not Recovery.NONE:
                    await self._recover(connection, needed, place, topic_id)
                    return needed
                async with connection.transaction():
                    await connection.execute(_SQL["page_mode"])
                    snapshot = await (await connection.execute(_SQL["take_snapshot"])).fetchone()
                    if snapshot is None:
                        raise StorageDefect("the server gave no snapshot")
                    target, target_at = cursor.target or snapshot[0], cursor.target_at or clock
                    parameters = {
                        "lane": self.lane,
                        "target": target,
                        "published_open": open_in(cursor.published),
                        "published_end": end_of(cursor.published),
                        "sent_xid": str(cursor.sent_xid or 0),
                        "sent_id": cursor.sent_id or 0,
                        "rows": self.limits.rows,
                        "bytes": self.limits.payload_bytes,
                    }
                    # Binary: in text form a payload is twice as long.
                    rows = connection.cursor(binary=True)
                    await rows.execute(_SQL["read_page"], parameters)
                    batches = tuple(
                        Batch(xid, number, batch_id.bytes, changes, payload)
                        for xid, number, batch_id, changes, payload in await rows.fetchall()
                    )
        # A page ends early by its rows or by its bytes; if by neither, there was no more.
        payload_bytes = sum(len(batch.payload) for batch in batches)
        last = len(batches) < self.limits.rows and payload_bytes < self.limits.payload_bytes
        return Page(place, cursor, target, target_at, batches, last)

    async def store(self, cursor: Cursor, place: Place) -> None:
        """Move the cursor: what lies before it is never read again (save for a recovery).

        Raises:
            LaneLost: somebody has taken over, or this is not the server that the page was read from.
            StorageError: the database; the cursor may have been stored or not.
        """
        parameters: dict[str, Any] = {
            "lane": self.lane,
            "epoch": self.epoch,
            "published": cursor.published,
            "published_through": cursor.published_through,
            "target": cursor.target,
            "target_at": cursor.target_at,
            "sent_xid": None if cursor.sent_xid is None else str(cursor.sent_xid),
            "sent_id": cursor.sent_id,
            "server": place.server,
            "timeline": place.timeline,
            "started": place.started,
            "topic_id": cursor.topic_id,
        }
        with translated():
            async with self.pool.connection() as connection:
                done = await connection.execute(_SQL["store_cursor"], parameters)
        if done.rowcount != 1:
            raise LaneLost(f"lane {self.lane} was taken over, or its server was replaced")

    async def _recover(self, connection: Any, needed: Recovery, place: Place, topic_id: str) -> None:
        renumbered = needed is Recovery.RENUMBER
        parameters = {
            "lane": self.lane,
            "epoch": self.epoch,
            "server": place.server,
            "timeline": place.timeline,
            "topic_id": topic_id,
            "renumbered": renumbered,
        }
        async with connection.transaction():
            done = await connection.execute(_SQL["rewind_lane"], parameters)
            if done.rowcount != 1:
                raise LaneLost(f"lane {self.lane} has a newer lease than {self.epoch}")
            if renumbered:
                await connection.execute(_SQL["renumber_lane"], parameters)
