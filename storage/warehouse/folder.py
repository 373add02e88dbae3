"""The directory of a local warehouse: writing files that survive a power cut, finding and deleting those nobody needs.

<directory>/<kind>/<name>.parquet    data; which of them count, the catalog says
<directory>/tmp/                     DuckDB's, for what does not fit in memory
"""

import os
import secrets
import time
from collections.abc import Collection
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]

from storage.errors import StorageUnavailable
from storage.warehouse.catalog import NewFile
from storage.warehouse.columns import SCHEMAS
from storage.warehouse.tables import FileStatistics, statistics, write_parquet

_UNFINISHED = ".unfinished"


class WarehouseFolder:
    """Parquet files below one directory. Not thread-bound: it keeps no state."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()

    def make(self) -> None:
        """Make the directories.

        Raises:
            StorageUnavailable: the file system refuses.
        """
        try:
            for name in (*SCHEMAS, "tmp"):
                (self.root / name).mkdir(mode=0o750, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageUnavailable(f"the warehouse's directory cannot be made: {error}") from error

    def path(self, kind: str, name: str) -> str:
        """Where a file of a kind goes, below the directory."""
        return f"{kind}/{name}.parquet"

    def absolute(self, path: str) -> str:
        """A catalogued path as the operating system knows it."""
        return str(self.root / path)

    def write(self, kind: str, name: str, table: pa.Table) -> NewFile:
        """Write rows, at least one, as a file that is whole or not there, and is on disk when this returns.

        Raises:
            StorageUnavailable: the disk is full, or the file system refuses otherwise.
        """
        path = self.path(kind, name)
        unfinished = self.temporary(kind, name)
        try:
            with unfinished.open("wb") as sink:
                write_parquet(table, sink)
                self._flush(sink.fileno())
            return self._finish(kind, path, unfinished, statistics(table))
        except OSError as error:
            raise StorageUnavailable(f"{path} cannot be written: {error}") from error

    def adopt(self, kind: str, name: str, unfinished: Path, found: FileStatistics) -> NewFile:
        """Take over a file that DuckDB wrote under a name from `temporary`.

        Raises:
            StorageUnavailable: the file system refuses.
        """
        try:
            with unfinished.open("rb+") as written:
                self._flush(written.fileno())
            return self._finish(kind, self.path(kind, name), unfinished, found)
        except OSError as error:
            raise StorageUnavailable(f"{name} cannot be written: {error}") from error

    def temporary(self, kind: str, name: str) -> Path:
        """A path for `adopt`, different at each call: two loaders may write the same file at once.

        Raises:
            StorageUnavailable: the file system refuses.
        """
        try:
            # A warehouse that an older program made has no directory for a kind that was added since.
            (self.root / kind).mkdir(mode=0o750, exist_ok=True)
        except OSError as error:
            raise StorageUnavailable(f"{name} cannot be written: {error}") from error
        return self.root / kind / f"{name}.parquet.{secrets.token_hex(6)}{_UNFINISHED}"

    def delete(self, paths: Collection[str]) -> int:
        """Delete files; those already gone do not count."""
        deleted = 0
        for path in paths:
            try:
                (self.root / path).unlink()
                deleted += 1
            except FileNotFoundError:
                continue
            except OSError as error:
                raise StorageUnavailable(f"{path} cannot be deleted: {error}") from error
        return deleted

    def orphans(self, catalogued: Collection[str], grace_s: float) -> list[str]:
        """Files that no catalog entry names and nobody touched for `grace_s` seconds: a crash left them.

        The age is what protects a file that a load has written and is about to catalogue.
        """
        known = set(catalogued)
        horizon = time.time() - grace_s
        found = []
        for kind in SCHEMAS:
            for file in (self.root / kind).glob("*"):
                path = f"{kind}/{file.name}"
                try:
                    if path not in known and file.stat().st_mtime < horizon:
                        found.append(path)
                except FileNotFoundError:
                    continue
        return found

    def _finish(self, kind: str, path: str, unfinished: Path, found: FileStatistics) -> NewFile:
        size = unfinished.stat().st_size
        unfinished.replace(self.root / path)
        # The catalog will say that the file is there: so must the directory, after a power cut.
        directory = os.open(self.root / kind, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        return NewFile(kind, path, size, found)

    @staticmethod
    def _flush(descriptor: int) -> None:
        os.fsync(descriptor)
