"""One answer of two sources: the older part of a range from the warehouse, the newer from a database.

Where to cut. The seam is in reading time, completeness in commit time, and a reading can be written long after the
time it is of: "everything before yesterday is loaded" says nothing about a correction of last month that was made a
minute ago. So the seam lies at or below the oldest reading of any batch that is not known to be loaded. Below it the
warehouse has everything that the database's snapshot shows, and the whole is complete up to that snapshot.

The order matters:

 1. In the database's snapshot: read the seam, then the newer part.
 2. Afterwards: read the older part from the warehouse. It holds at least what was known to be loaded in 1.

The other way round a batch could be loaded between the two, raise the seam, and be in neither part.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

from router.database import DatabaseSource, range_cut
from router.plan import SourceKind
from router.tiers import Proof, Question, Requirement, Unproven
from router.warehouse import WarehouseSource, gaps
from storage.reads.session import ReadSession

A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class Newer(Generic[A]):
    """The newer part, where it begins, and the question for the older one; None: nothing is left of the range."""

    proof: Proof
    cut_us: int
    answer: A | None
    older: Question[A] | None


async def read_newer(
    database: DatabaseSource,
    tenant: str,
    question: Question[A],
    requirement: Requirement,
    timeout_s: float,
    admit: Callable[[int], AbstractContextManager[None]],
) -> Newer[A]:
    """The newer part of the range, from `database`, which decides where to cut.

    `admit`: what to enter while the newer part is read, given where that begins; it may refuse by raising.

    Raises:
        Unproven: the database's snapshot does not meet the requirement, or the question cannot be split.
        StorageError: as `Source.answer`.
    """
    start_us, end_us = question.start_us, question.end_us
    if start_us is None or end_us is None:
        raise Unproven("a question without a range cannot be split")

    async def newer(session: ReadSession) -> Newer[A]:
        row = await (await session.run("seam")).fetchone()
        seam_us = end_us if row is None else min(int(row[0]), end_us)
        cut_us = max(start_us, question.seam(seam_us))
        if cut_us <= start_us:
            proof = database.prove(session.snapshot, requirement, question)
            with admit(start_us):
                return Newer(proof, start_us, await question.from_database(session, None), None)
        # In this snapshot: a device that it does not have any more is in neither part.
        known = await question.resolved(session)
        if cut_us >= end_us:
            # All of it is loaded: nothing is left for the database, and that is complete whatever it still keeps.
            proof = database.prove(session.snapshot, requirement, question.part(end_us, end_us))
            return Newer(proof, end_us, None, known)
        part = question.part(cut_us, end_us)
        proof = database.prove(session.snapshot, requirement, part)
        with admit(cut_us):
            return Newer(proof, cut_us, await part.from_database(session, None), known.part(start_us, cut_us))

    return await database.within(tenant, newer, timeout_s)


async def with_older(
    warehouse: WarehouseSource, tenant: str, question: Question[A], newer: Newer[A], timeout_s: float
) -> tuple[A, Proof]:
    """The whole answer, and its proof.

    Raises:
        Unproven: the warehouse cannot tell how far it is.
        StorageError: as `Source.answer`.
    """
    if newer.older is None:
        assert newer.answer is not None
        return newer.answer, newer.proof
    answer, completeness = await warehouse.ask(tenant, newer.older, timeout_s)
    if completeness.as_of_us is None:
        raise Unproven("not every lane has reached the warehouse yet")
    cut = range_cut(newer.older, completeness.complete_from_us)
    degraded = [*newer.proof.degraded, *gaps(completeness), *([cut] if cut is not None else [])]
    complete_from_us, kept_from_us = completeness.complete_from_us, newer.proof.complete_from_us
    if kept_from_us is not None and newer.cut_us < kept_from_us and newer.answer is not None:
        # The database has retired the beginning of its part too.
        complete_from_us = kept_from_us
    proof = Proof(SourceKind.SPLIT, "split", newer.proof.as_of_us, complete_from_us, tuple(degraded))
    return answer if newer.answer is None else question.join(answer, newer.answer, newer.cut_us), proof
