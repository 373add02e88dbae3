"""Following the outbox by snapshots, as the relay does (see storage/relay/drain.py), with a cursor of its own.

A page is read in one transaction, and what it makes stale is computed in a later one, which also moves the cursor: it
sees everything that was visible when the page was read. A death in between computes the page again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from storage.database import Connection, Pool
from storage.errors import StorageDefect, StorageError, translated
from storage.relay.cursor import Batch, Cursor, Page, Place, Recovery, after, end_of, open_in, recovery
from storage.relay.drain import NotPrimary, PageLimits
from storage.statements import statements

_RELAY = statements("relay.sql")
_SQL = statements("rollup.sql")

# Cursors of the relay belong to a topic; these to nothing but the database.
_NO_TOPIC = ""


class LeaseLost(StorageError):
    """Another worker has taken over, or the server was replaced: what was computed is rolled back."""

    retriable = True


@dataclass(frozen=True, slots=True)
class Round:
    """A page of each lane."""

    pages: Mapping[int, Page]

    @property
    def batches(self) -> Sequence[Batch]:
        """What was committed, of all lanes."""
        return [batch for page in self.pages.values() for batch in page.batches]

    @property
    def last(self) -> bool:
        """Nothing more was there when it was read."""
        return all(page.last for page in self.pages.values())


async def adopt(pool: Pool, epoch: int) -> None:
    """Make the cursors exist, and refuse earlier holders of the lease.

    Cursors that are made begin at the present. What was committed while there were none is for the back-fills: what
    an earlier worker kept up is filled again.

    Raises:
        LeaseLost: somebody with a newer lease was here.
        StorageError: the database.
    """
    with translated():
        async with pool.connection() as connection, connection.transaction():
            if (await connection.execute(_SQL["add_lanes"])).rowcount:
                await _fill_again(connection)
            done = await connection.execute(_SQL["adopt_lanes"], {"epoch": epoch})
            if not done.rowcount:
                raise LeaseLost("another worker has a newer lease")


async def hold(connection: Connection, epoch: int) -> None:
    """Begin a transaction's work: from here to its end no other worker does anything. Raises LeaseLost."""
    if (await connection.execute(_SQL["hold"], {"epoch": epoch})).rowcount != 1:
        raise LeaseLost("another worker has a newer lease")


async def read(pool: Pool, epoch: int, limits: PageLimits) -> Round | Recovery:
    """The next page of every lane; or what has to be recovered first, because the cursors lost their meaning.

    Raises:
        LeaseLost: somebody has taken over.
        NotPrimary: this is a standby.
        StorageError: the database.
    """
    with translated():
        async with pool.connection() as connection:
            rows = await (await connection.execute(_SQL["look_at_lanes"], {"epoch": epoch})).fetchall()
            if not rows:
                raise LeaseLost("another worker has a newer lease")
            clock, standby, server, timeline, started, next_xid = rows[0][:6]
            if standby:
                raise NotPrimary("the outbox can be read on the primary only, and this is a standby")
            place = Place(server, timeline, started)
            cursors = {row[6]: replace(Cursor(*row[7:]), topic_id=_NO_TOPIC) for row in rows}
            needed = {recovery(cursor, place, next_xid, _NO_TOPIC) for cursor in cursors.values()}
            for worst in (Recovery.RENUMBER, Recovery.REWIND):
                if worst in needed:
                    return worst
            async with connection.transaction():
                await connection.execute(_RELAY["page_mode"])
                await connection.execute(_SQL["plan_pages"])
                row = await (await connection.execute(_SQL["take_snapshot"])).fetchone()
                if row is None:
                    raise StorageDefect("the server gave no snapshot")
                return Round(
                    {
                        lane: await _page(connection, lane, place, cursor, row[0], clock, limits)
                        for lane, cursor in cursors.items()
                    }
                )


async def _page(
    connection: Connection,
    lane: int,
    place: Place,
    cursor: Cursor,
    snapshot: str,
    clock: datetime,
    limits: PageLimits,
) -> Page:
    target, target_at = cursor.target or snapshot, cursor.target_at or clock
    parameters = {
        "lane": lane,
        "target": target,
        "published_open": open_in(cursor.published),
        "published_end": end_of(cursor.published),
        "sent_xid": str(cursor.sent_xid or 0),
        "sent_id": cursor.sent_id or 0,
        "rows": limits.rows,
        "bytes": limits.payload_bytes,
    }
    # Binary: in text form a payload is twice as long.
    rows = connection.cursor(binary=True)
    await rows.execute(_RELAY["read_page"], parameters)
    batches = tuple(
        Batch(xid, number, batch_id.bytes, changes, payload)
        for xid, number, batch_id, changes, payload in await rows.fetchall()
    )
    last = len(batches) < limits.rows and sum(len(b.payload) for b in batches) < limits.payload_bytes
    return Page(place, cursor, target, target_at, batches, last)


async def store(connection: Connection, epoch: int, done: Round) -> None:
    """Move the cursors past a round, in the transaction that computed what it made stale. Raises LeaseLost."""
    parameters: list[dict[str, Any]] = []
    for lane, page in done.pages.items():
        cursor = after(page, _NO_TOPIC)
        parameters.append(
            {
                "lane": lane,
                "epoch": epoch,
                "published": cursor.published,
                "published_through": cursor.published_through,
                "target": cursor.target,
                "target_at": cursor.target_at,
                "sent_xid": None if cursor.sent_xid is None else str(cursor.sent_xid),
                "sent_id": cursor.sent_id,
                "server": page.place.server,
                "timeline": page.place.timeline,
                "started": page.place.started,
            }
        )
    async with connection.cursor() as moved:
        await moved.executemany(_SQL["store_lane"], parameters)
        if moved.rowcount != len(parameters):
            raise LeaseLost("the server was replaced, or another worker has taken over")


async def recover(connection: Connection, epoch: int, needed: Recovery) -> None:
    """Give the cursors a meaning again; see the statements."""
    key = {"epoch": epoch}
    if needed is Recovery.REWIND:
        await connection.execute(_SQL["rewind_lanes"], key)
    else:
        await connection.execute(_SQL["restart_lanes"], key)
        await _fill_again(connection)


async def _fill_again(connection: Connection) -> None:
    await connection.execute(_SQL["restart_rollups"])
    await connection.execute(_SQL["restart_projections"])
