"""The load state, watermarks, dead letters and names in Redshift, within the caller's transaction."""

from collections.abc import Callable, Sequence
from typing import Any

from redshift_connector.cursor import Cursor

from storage.warehouse.columns import GONE
from storage.warehouse.port import (
    Completeness,
    DeadLetter,
    LaneWatermark,
    LoadState,
    Scope,
    SnapshotFilter,
    WarehouseMissing,
)
from storage.warehouse.statements import statements

SQL = statements("redshift.sql")

REBUILDING = "a rebuild is under way or was not finished"


def execute(cursor: Cursor, statement: str, parameters: Sequence[Any] = ()) -> None:
    """Run a statement. Without parameters the text goes as it is, percent signs included."""
    if parameters:
        cursor.execute(statement, list(parameters))
    else:
        cursor.execute(statement)


def rows(cursor: Cursor, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    """All rows of a statement."""
    execute(cursor, statement, parameters)
    return [tuple(row) for row in cursor.fetchall()]


def read_states(cursor: Cursor) -> tuple[dict[int, LoadState], dict[int, int]]:
    """The load state by partition, floors left out, and per partition the time its rebuild's snapshot matters up to.

    Raises:
        WarehouseMissing: there is no generation.
    """
    found = rows(cursor, SQL["generation"])
    if not found:
        raise WarehouseMissing("the warehouse was not set up: run `atlasco warehouse init`")
    generation, rebuilding = found[0]
    states, through = {}, {}
    for partition, topic_id, offset, halted, snapshot, through_us in rows(cursor, SQL["states"]):
        why = halted if rebuilding is None else REBUILDING
        rebuild = SnapshotFilter(snapshot, {}) if snapshot else None
        states[partition] = LoadState(partition, topic_id, offset, generation, why, rebuild)
        if snapshot:
            through[partition] = through_us
    return states, through


def newer(known: LaneWatermark | None, mark: LaneWatermark) -> LaneWatermark | None:
    """What to store instead of a known watermark: time never goes back, and a smaller epoch is ignored (None)."""
    if known is None:
        return mark
    if mark.lease_epoch < known.lease_epoch:
        return None
    through = max(mark.complete_through_us, known.complete_through_us)
    return LaneWatermark(mark.lane, mark.partition, mark.lanes, mark.partitions, through, mark.lease_epoch)


def put_watermarks(cursor: Cursor, marks: Sequence[LaneWatermark], snapshot_through_us: dict[int, int]) -> None:
    """Store watermarks; a rebuild's snapshot is forgotten where all lanes have passed it. Under the load lock, so that
    read and write are one."""
    if not marks:
        return
    stored = {(m.lane, m.partition): m for m in (LaneWatermark(*row) for row in rows(cursor, SQL["watermarks"]))}
    for mark in marks:
        better = newer(stored.get((mark.lane, mark.partition)), mark)
        if better is not None:
            stored[mark.lane, mark.partition] = better
            execute(cursor, SQL["remove_watermark"], [mark.lane, mark.partition])
            execute(
                cursor,
                SQL["add_watermark"],
                [
                    better.lane,
                    better.partition,
                    better.lanes,
                    better.partitions,
                    better.complete_through_us,
                    better.lease_epoch,
                ],
            )
    for partition in {mark.partition for mark in marks} & snapshot_through_us.keys():
        here = [mark for mark in stored.values() if mark.partition == partition]
        passed = [mark for mark in here if mark.complete_through_us > snapshot_through_us[partition]]
        if len(passed) >= max(mark.lanes for mark in here):
            execute(cursor, SQL["forget_snapshot"], [partition])


def put_dead_letters(cursor: Cursor, topic_id: str, letters: Sequence[DeadLetter]) -> None:
    """Record what could not be decoded."""
    for letter in letters:
        execute(
            cursor,
            SQL["add_dead_letter"],
            [
                topic_id,
                letter.partition,
                letter.offset,
                letter.reason,
                letter.affects_readings,
                letter.tenant_id,
                letter.bucket,
                letter.min_ts_us,
                letter.max_ts_us,
            ],
        )


def merge_unique(cursor: Cursor, kind: str, manifest: str, copy: Callable[[Cursor, str, str], None]) -> None:
    """Add staged rows of a kind of UNIQUE_KEYS, save those that are there; `copy` fills a table from a manifest. The
    names of devices that are gone go, and do not come. Under the load lock, as anti-joins have no constraint to fall
    back on."""
    execute(cursor, SQL[f"stage_{kind}"])
    copy(cursor, f"staged_{kind}", manifest)
    execute(cursor, SQL[f"merge_{kind}"])
    execute(cursor, SQL["drop_staged"].format(kind=kind))
    if kind == GONE:
        execute(cursor, SQL["remove_gone"])


def as_of(marks: Sequence[LaneWatermark]) -> int | None:
    """The least of all watermarks, if there is one of every lane in every partition."""
    if not marks:
        return None
    wanted = max(mark.lanes for mark in marks) * max(mark.partitions for mark in marks)
    return min(mark.complete_through_us for mark in marks) if len(marks) >= wanted else None


def lanes_loaded(marks: Sequence[LaneWatermark]) -> dict[int, int]:
    """Per lane the time through which every partition is loaded."""
    found = {}
    for lane in {mark.lane for mark in marks}:
        here = [mark for mark in marks if mark.lane == lane]
        if len(here) >= max(mark.partitions for mark in here):
            found[lane] = min(mark.complete_through_us for mark in here)
    return found


def complete_from(cursor: Cursor, scope: Scope) -> int | None:
    """Where retention has cut within a scope."""
    cuts = [
        from_us
        for tenant_id, from_us in rows(cursor, SQL["complete_from"])
        if scope.tenant_id is None or tenant_id in (0, scope.tenant_id)
    ]
    return max(cuts, default=None)


def put_complete_from(cursor: Cursor, tenant_id: int, from_us: int) -> None:
    """Record that a tenant's readings (0: everybody's) begin here; it never goes back."""
    known = dict(rows(cursor, SQL["complete_from"])).get(tenant_id)
    if known is None or known < from_us:
        execute(cursor, SQL["remove_complete_from"], [tenant_id])
        execute(cursor, SQL["add_complete_from"], [tenant_id, from_us])


def completeness(cursor: Cursor, scope: Scope, touches: Callable[[DeadLetter, Scope], bool]) -> Completeness:
    """How far the warehouse has come, in the transaction's snapshot."""
    marks = [LaneWatermark(*row) for row in rows(cursor, SQL["watermarks"])]
    letters = [DeadLetter(*row) for row in rows(cursor, SQL["dead_letters"])]
    halted = sorted({row[3] for row in rows(cursor, SQL["states"]) if row[3]})
    return Completeness(
        as_of(marks),
        complete_from(cursor, scope),
        tuple(letter for letter in letters if touches(letter, scope)),
        tuple(halted),
    )
