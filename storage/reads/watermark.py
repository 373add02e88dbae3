"""Up to when rollups and projections are complete, and for which answers that is enough."""

from dataclasses import dataclass
from typing import Final

from storage.reads.session import ReadSession
from storage.statements import statements
from storage.times import SECOND_US

# Far more than lies between two heartbeats, as long as there are any.
_BEATS_APART_US: Final = SECOND_US


@dataclass(frozen=True, slots=True)
class Watermark:
    """How far rollups and projections are, from the snapshot of the data."""

    # They hold everything committed before, on the primary's clock.
    as_of_us: int
    # The snapshot is a replica's.
    on_replica: bool

    def proves(self, needed_as_of_us: int, snapshot_as_of_us: int) -> bool:
        """Whether they are fresh enough, given the snapshot's own time.

        A watermark later than that was written before the primary's clock was set back, or by a primary whose clock was
        ahead of this one's: what is committed before it need not be in them. On a replica the snapshot's time is the
        last heartbeat's, and a round that committed between two of them is not from the future.
        """
        latest_us = snapshot_as_of_us + (_BEATS_APART_US if self.on_replica else 0)
        return needed_as_of_us <= self.as_of_us <= latest_us


async def materialization_watermark(session: ReadSession) -> Watermark | None:
    """Up to when rollups and projections are complete in this snapshot; None: that is not known."""
    row = await (await session.run_text(statements("search.sql")["materialization_watermark"])).fetchone()
    return None if row is None or row[0] is None else Watermark(*row)
