"""Where a lane of the outbox is: pure values and decisions, no I/O.

Snapshots are in PostgreSQL's text form, `xmin:xmax:xip,…`: transactions below xmin are finished, those from xmax on
had not begun, and the ones listed were open.
"""

from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum

NOTHING = "3:3:"
"""The snapshot in which nothing is visible."""


def end_of(snapshot: str) -> str:
    """The first transaction id that had not begun when the snapshot was taken."""
    return snapshot.split(":")[1]


def open_in(snapshot: str) -> list[str]:
    """The transactions that were open when the snapshot was taken."""
    listed = snapshot.split(":")[2]
    return listed.split(",") if listed else []


@dataclass(frozen=True, slots=True)
class Place:
    """What gives a snapshot its meaning: the server's identity, its timeline, and since when it runs.

    The timeline changes when a standby becomes primary and when a backup is restored to a point in time; the identity
    changes when the data was copied into another server.
    """

    server: str
    timeline: str
    started: datetime


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a lane was published; the columns of relay_lanes of the same names."""

    published: str = NOTHING
    published_through: datetime | None = None
    target: str | None = None
    target_at: datetime | None = None
    sent_xid: int | None = None
    sent_id: int | None = None
    server: str | None = None
    timeline: str | None = None
    topic_id: str | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """One row of the outbox."""

    xid: int
    id: int
    # 16 bytes.
    batch_id: bytes
    changes: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Page:
    """Consecutive batches of a lane, and what reading them found out."""

    place: Place
    cursor: Cursor
    # Every batch committed before target_at (the primary's clock) is visible in target.
    target: str
    target_at: datetime
    batches: tuple[Batch, ...]
    # Nothing visible in the target lies behind these batches.
    last: bool

    @property
    def payload_bytes(self) -> int:
        """Size of the payloads."""
        return sum(len(batch.payload) for batch in self.batches)


def after(page: Page, topic_id: str) -> Cursor:
    """The cursor once every record of the page is in the topic."""
    cursor = Cursor(
        published=page.cursor.published,
        published_through=page.cursor.published_through,
        server=page.place.server,
        timeline=page.place.timeline,
        topic_id=topic_id,
    )
    if page.last:
        return replace(cursor, published=page.target, published_through=page.target_at)
    sent = page.batches[-1]
    return replace(cursor, target=page.target, target_at=page.target_at, sent_xid=sent.xid, sent_id=sent.id)


class Recovery(Enum):
    """What has to happen before a lane may be read on."""

    NONE = "none"
    REWIND = "rewind"
    """Publish again whatever the outbox still holds."""
    RENUMBER = "renumber"
    """As REWIND, and first give the batches transaction ids of this server."""


def recovery(cursor: Cursor, place: Place, next_xid: int, topic_id: str) -> Recovery:
    """Whether the cursor still means what it meant when it was stored.

    1. Another server, or transaction ids behind the cursor's: the rows were copied here, their ids belong to another
       sequence. Left alone, old rows would count as not yet begun and new ones as long published: RENUMBER.
    2. Another topic (re-created, or another cluster): what was published is gone, so all that is not loaded yet, and
       therefore still in the outbox, goes out again: REWIND.
    3. Another timeline: a failover or a restore to a point in time. The cursor is ordinary data of the same database
       and so comes back together with the outbox it describes; publishing again is caution that costs little.
    """
    if cursor.server is None:
        return Recovery.NONE
    furthest = max(int(end_of(cursor.published)), int(end_of(cursor.target or NOTHING)))
    if cursor.server != place.server or furthest > max(next_xid, int(end_of(NOTHING))):
        return Recovery.RENUMBER
    if cursor.topic_id != topic_id or cursor.timeline != place.timeline:
        return Recovery.REWIND
    return Recovery.NONE
