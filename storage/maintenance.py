"""Keeping history within its bounds: ranges made ahead, retired behind, and everything that has a term expired.

One run does the work once and can be stopped at any point: what is decided is committed before it is carried out, and
the next run goes on from what it finds in the catalog. Gateways and queries keep working: no lock that stops them is
waited for longer than `lock_timeout_s`, and rows are deleted in bounded pieces without waiting for other writers.

A reading outlives its tenant's retention by at most the length of its range (a day, a month for back-filled history)
and an hour; queries clip by retention, so nobody sees it. The outbox is not touched: a batch may go only when it is
loaded, which this work cannot know.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeAlias

import psycopg
from psycopg import sql

from storage.database import Connection, Role, connection_info
from storage.errors import StorageError, translated
from storage.model import ValueType
from storage.statements import statements

Progress: TypeAlias = Callable[[str], None]

_DAYS_PER_CALL = 31
_BLOCKS_PER_DELETE = 512
_ROWS_PER_DELETE = 5_000

_LOCKED = (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected)


class MaintenanceRunning(StorageError):
    """Another maintenance run is at work in this database."""

    retriable = True


@dataclass(frozen=True, slots=True)
class MaintenanceOptions:
    """What one run aims at. Durations in seconds."""

    # Ranges and outbox partitions exist at least so far ahead of now (the outbox: 7 days at most).
    ahead_s: float = 3 * 86400.0
    # Terms, counted from the last use or, for rejections and requests, from when they were made. A session, a
    # request and a rejection are promised to devices for the same time: keep the three alike.
    session_age_s: float = 30 * 86400.0
    rejection_age_s: float = 30 * 86400.0
    request_age_s: float = 30 * 86400.0
    dictionary_age_s: float = 90 * 86400.0
    # How long a statement may wait for a table lock, and how often it is tried in one run.
    lock_timeout_s: float = 2.0
    attempts: int = 5

    def __post_init__(self) -> None:
        if not 0 < self.ahead_s <= 39 * 86400:
            raise ValueError("partitions are made between 0 and 39 days ahead")


@dataclass(frozen=True, slots=True)
class TableSize:
    """A table with its partitions and indexes; rows are the planner's estimate."""

    table: str
    rows: int
    bytes: int
    partitions: int


@dataclass(frozen=True, slots=True)
class OutboxState:
    """What waits in the outbox. `oldest` is about when its oldest batch was written; None when it is empty."""

    partitions: int
    bytes: int
    oldest: datetime | None


@dataclass(frozen=True, slots=True)
class MaintenanceReport:
    """What one run did and found. A run with `problems` has done everything else."""

    duration_s: float
    ranges_made: int
    outbox_partitions_made: int
    # Suffixes of the ranges that this run retired.
    ranges_retired: tuple[str, ...]
    tables_dropped: int
    # Tables of retired ranges that a lock kept alive; the next run goes on with them.
    tables_delayed: tuple[str, ...]
    # Rows past their term, by table.
    deleted: Mapping[str, int]
    outbox: OutboxState
    tables: tuple[TableSize, ...]
    problems: tuple[str, ...]


async def maintain(
    dsn: str,
    options: MaintenanceOptions | None = None,
    *,
    progress: Progress = lambda _: None,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> MaintenanceReport:
    """Do the work once, as the owner of the schema, on a connection of its own. `pause` waits between attempts.

    Raises:
        MaintenanceRunning: another run is at work.
        StorageError: the database cannot be reached, or refuses; what was done so far stays done.
    """
    with translated():
        async with await psycopg.AsyncConnection.connect(
            # Never prepared: the statements are few, and DETACH … CONCURRENTLY cannot be.
            connection_info(dsn, Role.MAINTAIN),
            autocommit=True,
            prepare_threshold=None,
        ) as connection:
            return await _Run(connection, options or MaintenanceOptions(), progress, pause).run()


class _Run:
    """One run. Every method may be interrupted after any statement."""

    def __init__(
        self,
        connection: Connection,
        options: MaintenanceOptions,
        progress: Progress,
        pause: Callable[[float], Awaitable[None]],
    ) -> None:
        self._connection = connection
        self._options = options
        self._progress = progress
        self._pause = pause
        self._sql = statements("maintenance.sql")
        self._problems: list[str] = []
        self._deleted: dict[str, int] = {}

    async def run(self) -> MaintenanceReport:
        started = time.monotonic()
        if not (await self._rows("be_the_only_one"))[0][0]:
            raise MaintenanceRunning("another maintenance run is at work in this database")
        await self._connection.execute(
            "SELECT set_config('lock_timeout', %s, false)", [str(max(1, round(self._options.lock_timeout_s * 1000)))]
        )
        # What writers need first: a run that is cut short has then done the urgent part.
        outbox_made = await self._prepare_outbox()
        ranges_made = await self._prepare_history()
        retired = await self._retire()
        dropped, delayed = await self._drop_retired()
        await self._clip_history()
        await self._clip_latest()
        await self._expire()
        return MaintenanceReport(
            duration_s=time.monotonic() - started,
            ranges_made=ranges_made,
            outbox_partitions_made=outbox_made,
            ranges_retired=retired,
            tables_dropped=dropped,
            tables_delayed=delayed,
            deleted=dict(self._deleted),
            outbox=await self._outbox(),
            tables=tuple(TableSize(*row) for row in await self._rows("table_sizes")),
            problems=tuple(self._problems),
        )

    # -- ahead

    async def _prepare_outbox(self) -> int:
        made = 0
        now = (await self._scalar("SELECT now()")).replace(minute=0, second=0, microsecond=0)
        end = now + timedelta(seconds=min(self._options.ahead_s, 7 * 86400))
        # Day by day: a transaction holds a lock on every table it made.
        while now < end:
            now = min(now + timedelta(days=1), end)
            made += await self._make("the outbox", "ensure_outbox", [now + timedelta(hours=1)])
        return made

    async def _prepare_history(self) -> int:
        made = 0
        for slot, tenant, first, end in await self._rows(
            "slots_to_prepare", [timedelta(seconds=self._options.ahead_s)]
        ):
            at = first
            while at < end:
                until = min(at + timedelta(days=_DAYS_PER_CALL), end)
                made += await self._make(f"customer partition {slot}", "ensure_history", [tenant, at, until])
                at = until
        if made:
            self._progress(f"made {made} ranges of history")
        return made

    async def _make(self, what: str, statement: str, parameters: Sequence[object]) -> int:
        for attempt in range(self._options.attempts):
            try:
                return int((await self._rows(statement, parameters))[0][0])
            except _LOCKED:
                await self._pause(0.1 * 2**attempt)
            except psycopg.errors.ProgramLimitExceeded as error:
                # One customer's bound; the others' ranges are made all the same.
                self._problems.append(f"{what}: {error.diag.message_primary}")
                return 0
        self._problems.append(f"{what}: no partitions made, a lock was not had in {self._options.attempts} attempts")
        return 0

    # -- behind

    async def _retire(self) -> tuple[str, ...]:
        # Marked in a statement of its own: from its commit on nothing makes the range again, and its tenants' readings
        # count as kept from its end on only.
        try:
            return tuple(str(row[0]) for row in await self._rows("retire_ranges"))
        except _LOCKED:
            self._problems.append(
                "ranges not retired: the settings of a tenant are being changed; the next run tries again"
            )
            return ()

    async def _drop_retired(self) -> tuple[int, tuple[str, ...]]:
        dropped = 0
        delayed: list[str] = []
        for leaf, _, _ in await self._rows("leaves_of_retired_ranges", [None, None]):
            if await self._drop(leaf):
                dropped += 1
            else:
                delayed.append(leaf)
                self._progress(f"{leaf} is in use: the next run drops it")
        if dropped:
            self._progress(f"dropped {dropped} tables of retired ranges")
        return dropped, tuple(delayed)

    async def _drop(self, leaf: str) -> bool:
        """Detach and drop one table, from whatever state it is in. False: locks, or its parent, did not allow it."""
        for attempt in range(self._options.attempts):
            # Looked at again each time: a DETACH that times out half-way leaves the table pending.
            rows = await self._rows("leaves_of_retired_ranges", [leaf, leaf])
            if not rows:
                return True
            _, parent, pending = rows[0]
            try:
                if parent is not None:
                    await self._execute("finish_detach" if pending else "detach", parent=parent, leaf=leaf)
                await self._execute("drop_leaf", leaf=leaf)
            except _LOCKED:
                await self._pause(0.1 * 2**attempt)
            except psycopg.errors.ObjectNotInPrerequisiteState:
                # Another table of this parent is pending and was delayed: a parent has one at a time.
                return False
            else:
                return True
        return False

    async def _clip_history(self) -> None:
        for suffix, ts_to, tenants in await self._rows("ranges_past_a_retention"):
            for value_type in ValueType:
                leaf = f"entity_attributes_{value_type}_{suffix}"
                present = (await self._execute("tenants_in_leaf", [tenants], table=leaf))[0][0]
                if present and (past := await self._give_up(ts_to, present)):
                    await self._sweep("delete_tenants_from_leaf", leaf, "entity_attributes", tenants=past)

    async def _give_up(self, ts_to: datetime, tenants: Sequence[int]) -> list[int]:
        """Note that readings before a time are going; of which tenants they may."""
        try:
            rows = await self._execute("give_up_range", {"to": ts_to, "tenants": tenants})
        except _LOCKED:
            self._problems.append(
                "rows not deleted: the settings of a tenant are being changed; the next run tries again"
            )
            return []
        return [row[0] for row in rows]

    async def _clip_latest(self) -> None:
        for (leaf,) in await self._rows("leaves_of_latest_values"):
            await self._sweep("delete_latest_past_retention", leaf, "latest_values")

    async def _sweep(self, statement: str, table: str, counted_as: str, **parameters: object) -> None:
        """Run a delete over a table's pages, a bounded number at a time."""
        blocks = (await self._rows("blocks", [table]))[0][0]
        for first in range(0, blocks, _BLOCKS_PER_DELETE):
            bounds = {"from": f"({first},0)", "to": f"({first + _BLOCKS_PER_DELETE},0)"}
            self._count(counted_as, await self._delete(statement, {**bounds, **parameters}, table=table))

    async def _expire(self) -> None:
        options = self._options
        for table, age_s in (
            ("device_sessions", options.session_age_s),
            ("stream_rejections", options.rejection_age_s),
            ("write_requests", options.request_age_s),
            ("dictionaries", options.dictionary_age_s),
        ):
            while count := await self._delete(f"expire_{table}", [timedelta(seconds=age_s), _ROWS_PER_DELETE]):
                self._count(table, count)
                if count < _ROWS_PER_DELETE:
                    break

    def _count(self, table: str, rows: int) -> None:
        if rows:
            self._deleted[table] = self._deleted.get(table, 0) + rows
            self._progress(f"{table}: {self._deleted[table]:,} rows past their term deleted")

    # -- what there is

    async def _outbox(self) -> OutboxState:
        partitions = await self._rows("outbox_partitions")
        oldest = None
        for name, heap_bytes, _ in partitions:
            if heap_bytes:
                try:
                    found = await self._execute("oldest_batch", table=name)
                except psycopg.errors.UndefinedTable:
                    continue  # retired between the two looks
                if found:
                    oldest = found[0][0]
                    break
        return OutboxState(len(partitions), sum(row[2] for row in partitions), oldest)

    # -- statements

    async def _rows(self, statement: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        return await (await self._connection.execute(self._sql[statement], parameters)).fetchall()

    async def _scalar(self, query: str) -> Any:
        row = await (await self._connection.execute(query)).fetchone()
        return None if row is None else row[0]

    async def _execute(
        self, statement: str, parameters: Sequence[object] | Mapping[str, object] | None = None, **tables: str
    ) -> list[tuple[Any, ...]]:
        cursor = await self._connection.execute(self._compose(statement, tables), parameters)
        return await cursor.fetchall() if cursor.description else []

    async def _delete(self, statement: str, parameters: Sequence[object] | Mapping[str, object], **tables: str) -> int:
        try:
            return (await self._connection.execute(self._compose(statement, tables), parameters)).rowcount
        except _LOCKED:
            self._problems.append(f"{statement}: a table lock was not had; the next run goes on")
            return 0

    def _compose(self, statement: str, tables: Mapping[str, str]) -> sql.Composed:
        names = {key: sql.Identifier(name) for key, name in tables.items()}
        return sql.SQL(self._sql[statement]).format(**names)
