"""A rebuild of a Redshift warehouse: files aside in the bucket, then one transaction that deletes and copies."""

from collections.abc import Callable

import pyarrow as pa  # type: ignore[import-untyped]
from redshift_connector.cursor import Cursor

from storage.model import ValueType
from storage.times import naive
from storage.warehouse.columns import GONE, NAME_KEYS, base_kind, delta_kind
from storage.warehouse.local_rebuild import rebuilt_watermarks
from storage.warehouse.port import RebuildRequired, RebuildResult
from storage.warehouse.redshift_session import RedshiftSessions
from storage.warehouse.redshift_state import SQL, execute, merge_unique, put_complete_from, rows
from storage.warehouse.staging import StagedFile, Staging, encoded, manifest_of


class RedshiftRebuild:
    """See `port.Rebuild`. Its staged files must be younger than the staging's grace period when it finishes."""

    def __init__(
        self,
        sessions: RedshiftSessions,
        staging: Staging,
        copy: Callable[[Cursor, str, str], None],
        generation: int,
    ) -> None:
        self._sessions = sessions
        self._staging = staging
        self._copy = copy
        self._generation = generation
        self._files: dict[str, list[StagedFile]] = {}

    @property
    def generation(self) -> int:
        """See `port.Rebuild`."""
        return self._generation

    def add(self, kind: str, rows: pa.Table) -> None:
        """See `port.Rebuild`."""
        if rows.num_rows:
            files = self._files.setdefault(kind, [])
            files.append(
                self._staging.put(f"rebuild-g{self._generation}/{kind}/{len(files):06d}.parquet", encoded(rows))
            )

    def finish(self, result: RebuildResult) -> None:
        """See `port.Rebuild`."""
        manifests = {
            kind: self._staging.put(f"rebuild-g{self._generation}/{kind}.manifest", manifest_of(files)).url
            for kind, files in self._files.items()
        }
        with self._sessions.transaction() as cursor:
            execute(cursor, SQL["lock"])
            if rows(cursor, SQL["generation"])[0][1] != self._generation:
                raise RebuildRequired("another rebuild began meanwhile")
            had_content = bool(rows(cursor, SQL["states"]))
            self._replace(cursor, result)
            for kind, manifest in manifests.items():
                if kind == GONE:
                    merge_unique(cursor, kind, manifest, self._copy)
                else:
                    self._copy(cursor, f"atlasco.{kind}", manifest)
            execute(cursor, SQL["not_gone"])
            for name in ("reset_states", "reset_floors", "remove_watermarks", "remove_dead_letters"):
                execute(cursor, SQL[name])
            for partition, offset in sorted(result.offsets.items()):
                state = [partition, result.topic_id, offset, result.snapshot, result.snapshot_through_us]
                execute(cursor, SQL["add_state"], state)
            for mark in rebuilt_watermarks(result):
                row = [
                    mark.lane,
                    mark.partition,
                    mark.lanes,
                    mark.partitions,
                    mark.complete_through_us,
                    mark.lease_epoch,
                ]
                execute(cursor, SQL["add_watermark"], row)
            for tenant_id, floor in result.floors_us.items():
                execute(cursor, SQL["add_floor"], [tenant_id, floor])
                if not had_content:
                    put_complete_from(cursor, tenant_id, floor)
            execute(cursor, SQL["set_generation"], [self._generation, None])

    @staticmethod
    def _replace(cursor: Cursor, result: RebuildResult) -> None:
        """Delete what the new content replaces."""
        execute(cursor, SQL["floor_times"])
        for tenant_id, floor in result.floors_us.items():
            execute(cursor, SQL["add_floor_time"], [tenant_id, naive(floor)])
        for value_type in ValueType:
            for kind in (base_kind(value_type), delta_kind(value_type)):
                execute(cursor, SQL["replace_from_floor"].format(kind=kind))
                execute(cursor, SQL["replace_tenants_gone"].format(kind=kind))
        execute(cursor, SQL["drop_floor_times"])
        for kind in NAME_KEYS:
            execute(cursor, SQL["reset_names"].format(kind=kind))
