"""Which files a compaction rewrites: a pure decision."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from storage.times import DAY_US
from storage.warehouse.catalog import CataloguedFile


@dataclass(frozen=True, slots=True)
class Bin:
    """Files of one kind that become one."""

    kind: str
    files: tuple[CataloguedFile, ...]


def plan_merges(
    files: Sequence[CataloguedFile], *, target_bytes: int, must: Collection[int] = (), least: int = 4
) -> list[Bin]:
    """Bins of files to rewrite.

    A file is small below half the target. Small files of a kind are packed up to the target, those of one day of
    reading time together, so that a query of a day opens few. A bin of fewer than `least` files is not worth it,
    unless it holds a file of `must` (ids: files that corrections change); a large one of those makes a bin alone.
    """
    groups: defaultdict[tuple[str, int], list[CataloguedFile]] = defaultdict(list)
    bins = []
    for file in files:
        if file.bytes * 2 < target_bytes:
            groups[file.kind, (file.min_ts_us or 0) // DAY_US].append(file)
        elif file.file_id in must:
            bins.append(Bin(file.kind, (file,)))
    for (kind, _), group in sorted(groups.items()):
        taken: list[CataloguedFile] = []
        size = 0
        for file in sorted(group, key=lambda f: (f.min_ts_us or 0, f.file_id)):
            if taken and size + file.bytes > target_bytes:
                bins.append(Bin(kind, tuple(taken)))
                taken, size = [], 0
            taken.append(file)
            size += file.bytes
        bins.append(Bin(kind, tuple(taken)))
    return [b for b in bins if len(b.files) >= least or any(f.file_id in must for f in b.files)]
