"""What a warehouse does, whichever it is.

Vocabulary. A reading is *loaded* once the transaction that holds it, together with the offsets it came from, has
committed in the warehouse. A *unit* is what the loader made of one partition's offset range [first, end). The *load
state* says per partition which offset comes next; it lives in the warehouse, changes only together with the data, and
is the one authority on what was loaded: Kafka's committed offsets are a courtesy to lag monitors.

A *halt* is a partition the warehouse refuses to go on with, because records are missing from the log (they were
removed before they were loaded, or the topic was made anew). Only a rebuild ends it. A *generation* is the warehouse's
content since the last rebuild; a unit made in one generation is refused in the next.

What everybody queries are the relations `entity_attributes_double`, `…_bigint`, `…_boolean`, `…_text`, their union
`entity_attributes`, and the names `entities`, `attributes`, `tenants`: the columns of PostgreSQL's tables of those
names, as far as the log carries them, with `ts` as a UTC timestamp without zone. Corrections and deletions are
resolved in them, and a device that was deleted has neither name nor readings there from the record on that says so,
whatever arrives of it later. What is still stored of it, until the records of its readings have come too, is in
`resolved_double`, …, and `gone_entities` has the ids of those devices: both are for the audit. A statement must not use
the tables underneath.

Calls block, may come from several threads, and raise only `StorageError`s; with a retriable one nothing, or
everything, was done, and trying the same again is safe.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

import pyarrow as pa  # type: ignore[import-untyped]

from storage.errors import StorageError
from storage.warehouse.batch import ChangeSet
from storage.warehouse.cancellation import Cancellation


class WarehouseMissing(StorageError):
    """The warehouse was not set up: `atlasco warehouse init` does it."""


class QueryRefused(StorageError):
    """The warehouse rejected a statement: wrong SQL or parameters, or it asked for too much."""


class RebuildRequired(StorageError):
    """Another rebuild took this one's place, or the warehouse is not in the state a step needs."""


@dataclass(frozen=True, slots=True)
class SnapshotFilter:
    """What a rebuild already brought, for telling the changes it holds from those that come after it.

    `snapshot` is PostgreSQL's text of pg_snapshot. A change whose transaction is visible in it is already in the
    warehouse if its timestamp is at or after the tenant's floor (microseconds): the rebuild kept what was older.
    """

    snapshot: str
    floors_us: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class LoadState:
    """Where one partition stands."""

    partition: int
    topic_id: str
    next_offset: int
    generation: int
    # Why the partition cannot go on; empty when it can.
    halted: str = ""
    rebuild: SnapshotFilter | None = None


@dataclass(frozen=True, slots=True)
class LaneWatermark:
    """One lane's promise for one partition; see Watermark in change.proto. Times in microseconds."""

    lane: int
    partition: int
    lanes: int
    partitions: int
    complete_through_us: int
    lease_epoch: int


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that could not be decoded, and what it may touch: None means that nobody knows."""

    partition: int
    offset: int
    reason: str
    affects_readings: bool = True
    tenant_id: int | None = None
    bucket: int | None = None
    min_ts_us: int | None = None
    max_ts_us: int | None = None


@dataclass(frozen=True, slots=True)
class Unit:
    """One partition's offset range [first, end), decoded: what is loaded or refused as a whole."""

    partition: int
    topic_id: str
    generation: int
    first: int
    end: int
    changes: Sequence[ChangeSet] = ()
    watermarks: Sequence[LaneWatermark] = ()
    dead_letters: Sequence[DeadLetter] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one unit.

    `loaded`: its data, batch ids, watermarks and end offset are in the warehouse. Otherwise nothing of it is, because
    the partition stands elsewhere: `state` says where. `duplicates` counts change sets left out because they had been
    loaded before.
    """

    state: LoadState
    loaded: bool
    rows: int = 0
    duplicates: int = 0


@dataclass(frozen=True, slots=True)
class Scope:
    """What a query touches: a tenant and a range of reading time [from_us, to_us); None means all.

    It prunes, it does not filter: the statement itself has to say what it wants.
    """

    tenant_id: int | None = None
    from_us: int | None = None
    to_us: int | None = None


EVERYTHING: Final = Scope()
"""The scope of a query that touches all there is."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """Where the SQL of the adapters differs."""

    # A timestamp, in braces, as microseconds since 1970: a BIGINT.
    microseconds: str
    # Whether there are arg_min(value, row) and arg_max(value, row): the value of the first and of the last row.
    has_arg_min: bool


@dataclass(frozen=True, slots=True)
class Completeness:
    """How far the warehouse has come, as the transaction of a query sees it.

    `as_of_us` is on the primary's clock: every change committed before it is loaded, save for what `incomplete`
    lists; None until every lane and partition has been heard of. `complete_from_us` is the reading time before which
    retention has taken readings away; None: never. `halted` has the reasons of partitions that cannot go on: `as_of`
    then stands still, and what it says stays true.
    """

    as_of_us: int | None
    complete_from_us: int | None = None
    incomplete: tuple[DeadLetter, ...] = ()
    halted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """Rows of a query, and the completeness that holds for exactly these rows."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    completeness: Completeness


@dataclass(frozen=True, slots=True)
class TableSize:
    """One kind of rows, as it is stored: corrections not folded in yet, and repeated names, count too."""

    kind: str
    rows: int
    # Parquet files in use (local); 0 where the warehouse has no files of its own.
    files: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class WarehouseStatus:
    """A look at the whole warehouse."""

    adapter: Literal["local", "redshift"]
    generation: int
    states: tuple[LoadState, ...]
    completeness: Completeness
    sizes: tuple[TableSize, ...]


@dataclass(frozen=True, slots=True)
class Upkeep:
    """What a round of maintenance did."""

    files_merged: int = 0
    files_written: int = 0
    corrections_folded: int = 0
    rows_expired: int = 0
    files_deleted: int = 0


@dataclass(frozen=True, slots=True)
class RebuildResult:
    """What a rebuild ends with: the position in the log, and what its content stands for.

    `offsets` maps each partition to the log's end, read before the snapshot. `complete_through_us` is the primary's
    clock, read before the snapshot too, `snapshot_through_us` its clock after the snapshot. `floors_us` has each tenant
    that exists, with the reading time from which the new content replaces the old.
    """

    topic_id: str
    offsets: Mapping[int, int]
    lanes: int
    complete_through_us: int
    snapshot_through_us: int
    snapshot: str
    floors_us: Mapping[int, int] = field(default_factory=dict)


class Rebuild(Protocol):
    """A rebuild under way: new content is added aside, and `finish` puts it in the old one's place."""

    @property
    def generation(self) -> int:
        """The generation that the warehouse has after `finish`."""
        ...

    def add(self, kind: str, rows: pa.Table) -> None:
        """Put rows of a kind aside. Not visible to anybody, and lost with the process, until `finish`."""
        ...

    def finish(self, result: RebuildResult) -> None:
        """Replace, in one transaction: what lies at or after each tenant's floor, everything of tenants without a
        floor, all names, the load state, watermarks, dead letters (the new content holds what they held), halts. The
        devices that are gone are added to those known before, save those that the new content names.

        Raises:
            RebuildRequired: another rebuild began meanwhile.
        """
        ...


class Warehouse(Protocol):
    """Analytical storage that is loaded from the log of changes of one topic.

    It does not promise freshness (`completeness` measures it), nor that a load is quick: a load may take minutes,
    during which queries see the state before. It does not promise that two statements see the same state; one `query`
    does, together with its completeness.
    """

    def init(self) -> None:
        """Make what is missing, change nothing that is there."""
        ...

    def close(self) -> None:
        """Give up connections. Calls after it raise StorageUnavailable."""
        ...

    def states(self) -> dict[int, LoadState]:
        """The load state by partition. A partition never loaded has none.

        Raises:
            WarehouseMissing: not set up.
        """
        ...

    def open_partitions(self, topic_id: str, first_offsets: Mapping[int, int]) -> dict[int, LoadState]:
        """Begin partitions that have no state at these offsets; return the state of all. One that has a state keeps
        it: of two loaders that meet a partition first, one decides."""
        ...

    def halt(self, partition: int, generation: int, reason: str) -> None:
        """Record that a partition cannot go on. Without effect in another generation than the one given."""
        ...

    def load(self, units: Sequence[Unit]) -> list[Outcome]:
        """Load units of different partitions in one transaction; the outcomes are in their order.

        Returning promises that what is `loaded` is durable and visible to every query that begins afterwards. It does
        not promise that this call did it: of two loaders one loads, the other is told the state. Change sets loaded
        before, whatever their offset, are left out.
        """
        ...

    def lanes_loaded(self) -> dict[int, int]:
        """Per lane the primary's time, microseconds, through which every partition is loaded; lanes not heard of in
        every partition are missing."""
        ...

    def dead_letters(self) -> list[DeadLetter]:
        """The dead letters not redriven yet, by partition and offset."""
        ...

    def redrive(self, letter: DeadLetter, change: ChangeSet | None) -> bool:
        """Load what a dead letter turned out to hold (None: no reading) and strike it off; False: it was already."""
        ...

    def completeness(self, scope: Scope = ...) -> Completeness:
        """How far the warehouse has come now, as far as it concerns `scope`."""
        ...

    def query(
        self,
        statement: str,
        parameters: Sequence[Any] = (),
        *,
        scope: Scope = ...,
        max_rows: int | None = None,
        cancellation: Cancellation | None = None,
    ) -> Answer:
        """Run one SELECT, in SQL that PostgreSQL, DuckDB and Redshift share, with `%s` for parameters (`%%` for a
        percent sign), and read completeness in the same transaction.

        Raises:
            QueryRefused: the statement is wrong, or has more than `max_rows` rows.
            QueryCanceled: `cancellation` asked for its end; the statement has ended in the warehouse too.
        """
        ...

    @property
    def dialect(self) -> Dialect:
        """What statements have to say in this adapter's own words."""
        ...

    def status(self) -> WarehouseStatus:
        """A look at the whole warehouse; reads sizes, so not for every second."""
        ...

    def compact(self) -> Upkeep:
        """Merge small files, fold corrections in, remove the names of deleted devices from what is stored, forget batch
        ids too old to come again, and delete what nobody reads any more: files replaced, or left by a crash, longer ago
        than the grace period. Loads and queries go on meanwhile. One compaction runs at a time; a second one returns at
        once, having done nothing."""
        ...

    def expire(self, before_us: int, tenant_id: int | None = None) -> Upkeep:
        """Remove readings older than `before_us` (of one tenant, or of all) and say so in `complete_from`."""
        ...

    def begin_rebuild(self) -> Rebuild:
        """Begin a new generation: every partition is halted until the rebuild finishes. Queries go on, on the old
        content."""
        ...
