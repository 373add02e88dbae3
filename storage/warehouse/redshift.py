"""The Redshift warehouse: files staged in S3, loaded by COPY, corrections resolved by views.

A load, step by step:

1. Encode the units' rows as Parquet, upload them, upload one manifest per table.
2. In one transaction: LOCK the load lock, before anything that would take the snapshot; read the load state; drop
   units whose partition stands elsewhere; COPY the identities of the change records into a temporary table and look
   which were loaded before. If units or records have to be left out, roll back and go to 1 without them.
3. Still in it: COPY the readings straight into their tables (what they hold is known to be new, so staging them would
   only write everything twice), merge devices that are gone and names by anti-join, then identities, watermarks, dead
   letters, offsets.
4. Commit. If the connection is lost here nobody knows how it went: the load state is read again, and says.
"""

import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, TypeAlias

import pyarrow as pa  # type: ignore[import-untyped]
from redshift_connector.cursor import Cursor

from storage.errors import StorageError
from storage.model import ValueType
from storage.warehouse import redshift_upkeep
from storage.warehouse.batch import BatchKey, ChangeSet
from storage.warehouse.cancellation import Cancellation
from storage.warehouse.catalog import touches
from storage.warehouse.columns import SCHEMAS, UNIQUE_KEYS
from storage.warehouse.port import (
    EVERYTHING,
    Answer,
    Completeness,
    DeadLetter,
    Dialect,
    LaneWatermark,
    LoadState,
    Outcome,
    QueryRefused,
    Rebuild,
    Scope,
    SnapshotFilter,
    TableSize,
    Unit,
    Upkeep,
    WarehouseStatus,
)
from storage.warehouse.redshift_rebuild import RedshiftRebuild
from storage.warehouse.redshift_session import RedshiftLogin, RedshiftSessions
from storage.warehouse.redshift_state import (
    SQL,
    completeness,
    execute,
    lanes_loaded,
    merge_unique,
    put_dead_letters,
    put_watermarks,
    read_states,
    rows,
)
from storage.warehouse.staging import StagedFile, Staging, encoded, manifest_of
from storage.warehouse.steps import AtStep, no_step
from storage.warehouse.tables import distinct, file_name, tables_of

VALUE_SQL: Mapping[ValueType, str] = {
    ValueType.DOUBLE: "DOUBLE PRECISION",
    ValueType.BIGINT: "BIGINT",
    ValueType.BOOLEAN: "BOOLEAN",
    ValueType.TEXT: "VARCHAR(65535)",
}

_ATTEMPTS = 5
_BATCHES = pa.schema(
    [
        pa.field("batch_id", pa.string()),
        pa.field("tenant_id", pa.int32()),
        pa.field("bucket", pa.int32()),
        pa.field("deletes", pa.bool_()),
        pa.field("part", pa.int32()),
        pa.field("loaded_us", pa.int64()),
    ]
)

Manifests: TypeAlias = Mapping[str, str]
"""The manifest's address by table kind."""


class RedshiftWarehouse:
    """See `port.Warehouse`. `copy_role`: the IAM role COPY uses, an ARN or "default". `at`: called at each step."""

    def __init__(
        self,
        login: RedshiftLogin,
        staging: Staging,
        *,
        copy_role: str = "default",
        batch_memory_s: float = 14 * 86400.0,
        at: AtStep = no_step,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._sessions = RedshiftSessions(login)
        self._staging = staging
        self._role = "default" if copy_role == "default" else _literal(copy_role)
        self._batch_memory_s = batch_memory_s
        self._at = at
        self._clock = clock

    def init(self) -> None:
        """See `port.Warehouse`."""
        single = (
            "schema lock generation load_state rebuild_floors batches watermarks dead_letters complete_from "
            "gone_entities entities attributes tenants"
        )
        with self._sessions.transaction() as cursor:
            for name in single.split():
                execute(cursor, SQL[f"create_{name}"])
            for value_type in ValueType:
                for name in ("base", "delta", "resolved", "readings"):
                    execute(cursor, SQL[f"create_{name}"].format(type=value_type, sql=VALUE_SQL[value_type]))
            execute(cursor, SQL["create_entity_attributes"])
            execute(cursor, SQL["lock"])
            execute(cursor, SQL["first_generation"])

    def close(self) -> None:
        """See `port.Warehouse`."""
        self._sessions.close()

    def states(self) -> dict[int, LoadState]:
        """See `port.Warehouse`."""
        with self._sessions.transaction() as cursor:
            states, _ = read_states(cursor)
            floors = dict(rows(cursor, SQL["rebuild_floors"]))
            return {
                p: LoadState(
                    s.partition,
                    s.topic_id,
                    s.next_offset,
                    s.generation,
                    s.halted,
                    SnapshotFilter(s.rebuild.snapshot, floors) if s.rebuild else None,
                )
                for p, s in states.items()
            }

    def open_partitions(self, topic_id: str, first_offsets: Mapping[int, int]) -> dict[int, LoadState]:
        """See `port.Warehouse`."""
        with self._sessions.transaction() as cursor:
            execute(cursor, SQL["lock"])
            known, _ = read_states(cursor)
            for partition, offset in sorted(first_offsets.items()):
                if partition not in known:
                    execute(cursor, SQL["add_state"], [partition, topic_id, offset, None, None])
        return self.states()

    def halt(self, partition: int, generation: int, reason: str) -> None:
        """See `port.Warehouse`."""
        with self._sessions.transaction() as cursor:
            execute(cursor, SQL["lock"])
            states, _ = read_states(cursor)
            if partition in states and states[partition].generation == generation:
                execute(cursor, SQL["halt"], [reason[:1000], partition])

    def load(self, units: Sequence[Unit]) -> list[Outcome]:
        """See `port.Warehouse`."""
        if not units:
            return []
        self._at("decoded")
        known: set[BatchKey] = set()
        left = list(units)
        outcomes: dict[int, Outcome] = {}
        doubt = False
        for attempt in range(_ATTEMPTS):
            if not left:
                break
            manifests = self._stage(left, known)
            try:
                refused, found = self._commit(left, manifests, known, outcomes)
            except StorageError as error:
                if not error.retriable or attempt == _ATTEMPTS - 1:
                    raise
                # 1023, or the connection is gone, perhaps after the commit: the state will say.
                doubt = True
                continue
            for unit, state in refused:
                done = doubt and (state.topic_id, state.next_offset, state.generation) == (
                    unit.topic_id,
                    unit.end,
                    unit.generation,
                )
                outcomes[unit.partition] = Outcome(state, loaded=done, rows=_row_count(unit, known) if done else 0)
            left = [unit for unit in left if unit.partition not in outcomes]
            known |= found
        self._at("committed")
        return [outcomes[unit.partition] for unit in units]

    def _stage(self, units: Sequence[Unit], known: Collection[BatchKey]) -> Manifests:
        """Upload the units' files and manifests; nothing refers to them before a COPY does."""
        contents: dict[str, list[tuple[str, bytes]]] = {}
        names = [file_name(unit, known) for unit in units]
        for unit, name in zip(units, names, strict=True):
            for kind, table in tables_of(distinct(unit.changes, known)).items():
                contents.setdefault(kind, []).append((f"{kind}/{name}.parquet", encoded(table)))
        identities = self._identities(units, known)
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:32]
        if identities.num_rows:
            contents["batches"] = [(f"batches/{digest}.parquet", encoded(identities))]
        self._at("parquet-written")
        staged: dict[str, list[StagedFile]] = {
            kind: [self._staging.put(name, content) for name, content in files] for kind, files in contents.items()
        }
        self._at("staged")
        manifests = {
            kind: self._staging.put(f"manifests/{digest}-{kind}.manifest", manifest_of(files)).url
            for kind, files in staged.items()
        }
        self._at("manifest-written")
        return manifests

    def _identities(self, units: Sequence[Unit], known: Collection[BatchKey]) -> pa.Table:
        keys = sorted({change.key for unit in units for change in distinct(unit.changes, known)})
        now = int(self._clock() * 1_000_000)
        columns: list[list[Any]] = [
            [key.batch_id.hex() for key in keys],
            [key.tenant_id for key in keys],
            [key.bucket for key in keys],
            [key.deletes for key in keys],
            [key.part for key in keys],
            [now] * len(keys),
        ]
        return pa.Table.from_arrays(
            [pa.array(c, f.type) for c, f in zip(columns, _BATCHES, strict=True)], _BATCHES.names
        )

    def _commit(
        self, units: Sequence[Unit], manifests: Manifests, known: Collection[BatchKey], outcomes: dict[int, Outcome]
    ) -> tuple[list[tuple[Unit, LoadState]], set[BatchKey]]:
        """Load all the units, into `outcomes`; or none, and return those refused or the records loaded before."""
        with self._sessions.transaction() as cursor:
            execute(cursor, SQL["lock"])
            states, through = read_states(cursor)
            refused: list[tuple[Unit, LoadState]] = []
            for unit in units:
                state = states.get(unit.partition) or LoadState(unit.partition, "", 0, 0, "not opened")
                if state.halted or (state.topic_id, state.next_offset, state.generation) != (
                    unit.topic_id,
                    unit.first,
                    unit.generation,
                ):
                    refused.append((unit, state))
            if refused:
                return refused, set()
            if "batches" in manifests:
                execute(cursor, SQL["stage_batches"])
                self._copy(cursor, "staged_batches", manifests["batches"])
                found = {BatchKey(bytes.fromhex(i), *rest) for i, *rest in rows(cursor, SQL["known_batches"])}
                if found:
                    execute(cursor, SQL["drop_staged_batches"])
                    return refused, found
                execute(cursor, SQL["add_batches"])
                execute(cursor, SQL["drop_staged_batches"])
            self._copy_rows(cursor, manifests)
            put_watermarks(cursor, [mark for unit in units for mark in unit.watermarks], through)
            made = {}
            for unit in units:
                put_dead_letters(cursor, unit.topic_id, unit.dead_letters)
                execute(cursor, SQL["advance"], [unit.end, unit.partition])
                after = LoadState(unit.partition, unit.topic_id, unit.end, unit.generation)
                loaded = distinct(unit.changes, known)
                made[unit.partition] = Outcome(
                    after, True, sum(change.rows for change in loaded), len(unit.changes) - len(loaded)
                )
            self._at("copied")
        outcomes.update(made)
        return refused, set()

    def _copy_rows(self, cursor: Cursor, manifests: Manifests) -> None:
        for kind in SCHEMAS:
            if kind not in manifests:
                continue
            if kind in UNIQUE_KEYS:
                merge_unique(cursor, kind, manifests[kind], self._copy)
            else:
                self._copy(cursor, f"atlasco.{kind}", manifests[kind])

    def _copy(self, cursor: Cursor, table: str, manifest: str) -> None:
        execute(cursor, SQL["copy"].format(table=table, manifest=manifest.replace("'", "''"), role=self._role))

    def lanes_loaded(self) -> dict[int, int]:
        """See `port.Warehouse`."""
        with self._sessions.transaction() as cursor:
            return lanes_loaded([LaneWatermark(*row) for row in rows(cursor, SQL["watermarks"])])

    def dead_letters(self) -> list[DeadLetter]:
        """See `port.Warehouse`."""
        with self._sessions.transaction() as cursor:
            return [DeadLetter(*row) for row in rows(cursor, SQL["dead_letters"])]

    def redrive(self, letter: DeadLetter, change: ChangeSet | None) -> bool:
        """See `port.Warehouse`."""
        changes = () if change is None else (change,)
        unit = Unit(letter.partition, "redriven", 0, letter.offset, letter.offset, changes)
        manifests = self._stage([unit], ())
        position = [letter.partition, letter.offset]
        with self._sessions.transaction() as cursor:
            execute(cursor, SQL["lock"])
            if not rows(cursor, SQL["find_dead_letter"], position)[0][0]:
                return False
            if "batches" in manifests:
                execute(cursor, SQL["stage_batches"])
                self._copy(cursor, "staged_batches", manifests["batches"])
                if not rows(cursor, SQL["known_batches"]):
                    execute(cursor, SQL["add_batches"])
                    self._copy_rows(cursor, manifests)
                execute(cursor, SQL["drop_staged_batches"])
            execute(cursor, SQL["remove_dead_letter"], position)
        return True

    def completeness(self, scope: Scope = EVERYTHING) -> Completeness:
        """See `port.Warehouse`."""
        with self._sessions.transaction(quick=True) as cursor:
            return completeness(cursor, scope, touches)

    def query(
        self,
        statement: str,
        parameters: Sequence[Any] = (),
        *,
        scope: Scope = EVERYTHING,
        max_rows: int | None = None,
        cancellation: Cancellation | None = None,
    ) -> Answer:
        """See `port.Warehouse`."""
        # Tells a missing warehouse from a wrong statement; the completeness that counts is of the query's own snapshot.
        with self._sessions.transaction(quick=True) as cursor:
            completeness(cursor, scope, touches)
        with (
            self._sessions.transaction(query=True) as cursor,
            nullcontext() if cancellation is None else cancellation.stoppable(self._sessions.stopper(cursor)),
        ):
            state = completeness(cursor, scope, touches)
            try:
                cursor.execute(_for_driver(statement), list(parameters))
            except ValueError as error:
                raise QueryRefused(str(error)) from error
            columns = tuple(_text(column[0]) for column in cursor.description or ())
            found = cursor.fetchall() if max_rows is None else cursor.fetchmany(max_rows + 1)
        if max_rows is not None and len(found) > max_rows:
            raise QueryRefused(f"more than {max_rows} rows")
        return Answer(columns, [tuple(row) for row in found], state)

    @property
    def dialect(self) -> Dialect:
        """See `port.Warehouse`."""
        since = "TIMESTAMP '1970-01-01 00:00:00'"
        return Dialect(microseconds=f"datediff(microsecond, {since}, {{}})", has_arg_min=False)

    def status(self) -> WarehouseStatus:
        """See `port.Warehouse`."""
        states = tuple(self.states().values())
        adapter: Literal["redshift"] = "redshift"
        with self._sessions.transaction() as cursor:
            generation = rows(cursor, SQL["generation"])[0][0]
            sizes = tuple(TableSize(kind, rows(cursor, SQL["size"].format(kind=kind))[0][0]) for kind in SCHEMAS)
            return WarehouseStatus(adapter, generation, states, completeness(cursor, EVERYTHING, touches), sizes)

    def compact(self) -> Upkeep:
        """See `port.Warehouse`."""
        before_us = int((self._clock() - self._batch_memory_s) * 1_000_000)
        return redshift_upkeep.compact(self._sessions, self._staging, before_us)

    def expire(self, before_us: int, tenant_id: int | None = None) -> Upkeep:
        """See `port.Warehouse`."""
        return redshift_upkeep.expire(self._sessions, before_us, tenant_id)

    def begin_rebuild(self) -> Rebuild:
        """See `port.Warehouse`."""
        with self._sessions.transaction() as cursor:
            execute(cursor, SQL["lock"])
            ((number, rebuilding),) = rows(cursor, SQL["generation"])
            new = max(number, rebuilding or 0) + 1
            execute(cursor, SQL["set_generation"], [number, new])
        return RedshiftRebuild(self._sessions, self._staging, self._copy, new)


def _row_count(unit: Unit, known: Collection[BatchKey]) -> int:
    return sum(change.rows for change in distinct(unit.changes, known))


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _for_driver(statement: str) -> str:
    """The driver reads `%%` as `%` outside of quoted texts only, and leaves a single one inside alone."""
    parts = statement.split("'")
    return "'".join(part.replace("%%", "%") if i % 2 else part for i, part in enumerate(parts))
