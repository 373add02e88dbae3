"""What waits to be loaded: one buffer per partition, and when a load is due. Pure: no clock, no I/O."""

from dataclasses import dataclass, field, replace

from storage.loader.decode import DecodedChanges, DecodedWatermark, Undecodable
from storage.loader.snapshot import visible
from storage.warehouse.batch import ChangeSet
from storage.warehouse.port import DeadLetter, LaneWatermark, LoadState, SnapshotFilter, Unit

_BYTES_PER_CHANGE = 40
_BYTES_PER_RECORD = 2000


@dataclass(slots=True)
class PartitionBuffer:
    """One partition's records from the load state's offset on, in order. `since` is when the oldest came."""

    state: LoadState
    end: int
    changes: list[ChangeSet] = field(default_factory=list)
    watermarks: dict[int, LaneWatermark] = field(default_factory=dict)
    dead_letters: list[DeadLetter] = field(default_factory=list)
    log_bytes: int = 0
    memory_bytes: int = 0
    since: float | None = None

    @classmethod
    def at(cls, state: LoadState) -> "PartitionBuffer":
        """An empty buffer where the warehouse stands."""
        return cls(state, state.next_offset)

    def expects(self, offset: int) -> bool:
        """Whether a record is new here; after a change of assignment some come twice."""
        return offset >= self.end

    def add_changes(self, offset: int, size: int, now: float, decoded: DecodedChanges) -> None:
        """Take a change record of `size` bytes."""
        changes = after_rebuild(decoded, self.state.rebuild)
        self.changes.append(changes)
        self._grew(offset, size, now, changes.rows)

    def add_watermark(self, offset: int, size: int, now: float, mark: DecodedWatermark) -> None:
        """Take a watermark; of several of a lane, those of the newest lease count, and the latest time."""
        known = self.watermarks.get(mark.lane)
        if mark.partition == self.state.partition and (known is None or mark.lease_epoch >= known.lease_epoch):
            through = max(mark.complete_through_us, known.complete_through_us if known else 0)
            self.watermarks[mark.lane] = LaneWatermark(
                mark.lane, mark.partition, mark.lanes, mark.partitions, through, mark.lease_epoch
            )
        self._grew(offset, size, now, 0)

    def add_dead_letter(self, offset: int, size: int, now: float, why: Undecodable) -> None:
        """Take note of a record that cannot be read."""
        self.dead_letters.append(
            DeadLetter(
                self.state.partition,
                offset,
                why.reason[:500],
                why.affects_readings,
                why.tenant_id,
                why.bucket,
                why.min_ts_us,
            )
        )
        self._grew(offset, size, now, 0)

    def pass_over(self, offset: int, size: int, now: float) -> None:
        """Go past a record of which nothing has to be loaded."""
        self._grew(offset, size, now, 0)

    def take(self) -> Unit | None:
        """Everything that waits, as a unit, and begin the next one after it; None when nothing does."""
        if self.since is None:
            return None
        state = self.state
        unit = Unit(
            partition=state.partition,
            topic_id=state.topic_id,
            generation=state.generation,
            first=state.next_offset,
            end=self.end,
            changes=tuple(self.changes),
            watermarks=tuple(self.watermarks.values()),
            dead_letters=tuple(self.dead_letters),
        )
        self.state = LoadState(state.partition, state.topic_id, self.end, state.generation, state.halted, state.rebuild)
        self.changes, self.watermarks, self.dead_letters = [], {}, []
        self.log_bytes = self.memory_bytes = 0
        self.since = None
        return unit

    def _grew(self, offset: int, size: int, now: float, rows: int) -> None:
        self.end = offset + 1
        self.log_bytes += size
        self.memory_bytes += size + rows * _BYTES_PER_CHANGE + _BYTES_PER_RECORD
        if self.since is None:
            self.since = now


def after_rebuild(decoded: DecodedChanges, rebuild: SnapshotFilter | None) -> ChangeSet:
    """What of a change record the last rebuild did not bring: changes of transactions after its snapshot, and what is
    older than the tenant's floor.

    Names of before the snapshot stay out: the rebuild brought all that there were, and one that it did not bring is of
    a device deleted since. The change set stays, if empty, for its identity has to be remembered.

    Raises:
        Undecodable: the record does not name its transaction, and a rebuild makes that matter.
    """
    changes = decoded.changes
    if rebuild is None:
        return changes
    if decoded.xid is None:
        raise Undecodable("no xid header", tenant_id=changes.tenant_id, bucket=changes.bucket)
    if not visible(decoded.xid, rebuild.snapshot):
        return changes
    floor = rebuild.floors_us.get(changes.tenant_id)
    kept = {}
    if floor is not None:
        for value_type, part in changes.columns.items():
            older = part.ts_us < floor
            if older.any():
                kept[value_type] = part.take(older)
    return replace(changes, columns=kept, entities={}, attributes={})


def due(buffers: "list[PartitionBuffer]", now: float, *, age_s: float, size_bytes: int) -> bool:
    """Whether it is time to load: enough waits, or something has waited long enough."""
    waiting = [buffer for buffer in buffers if buffer.since is not None]
    return bool(waiting) and (
        sum(buffer.log_bytes for buffer in waiting) >= size_bytes
        or now - min(buffer.since for buffer in waiting if buffer.since is not None) >= age_s
    )
