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

from dataclasses import dataclass
from typing import Generic, TypeVar

from router.database import DatabaseSource, range_cut
from router.plan import SourceKind
from router.tiers import Proof, Question, Requirement, Unproven
from router.warehouse import WarehouseSource, gaps
from storage.read_session import ReadSession

A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class _Newer(Generic[A]):
    """The newer part, where it begins, and the question for the older one."""

    proof: Proof
    cut_us: int
    answer: A | None
    older: Question[A] | None


async def read_split(
    database: DatabaseSource,
    warehouse: WarehouseSource,
    tenant: str,
    question: Question[A],
    requirement: Requirement,
    timeouts: tuple[float, float],
) -> tuple[A, Proof, int]:
    """The answer of both, its proof, and where the range was cut. `timeouts`: seconds for database and warehouse.

    Raises:
        Unproven: the database's snapshot does not meet the requirement, or the warehouse cannot tell how far it is.
        StorageError: as `Source.answer`.
    """
    start_us, end_us = question.start_us, question.end_us
    if start_us is None or end_us is None:
        raise Unproven("a question without a range cannot be split")

    async def newer(session: ReadSession) -> _Newer[A]:
        row = await (await session.run("seam")).fetchone()
        seam_us = end_us if row is None else min(int(row[0]), end_us)
        cut_us = max(start_us, question.seam(seam_us))
        if cut_us <= start_us:
            proof = database.prove(session.snapshot, requirement, question)
            return _Newer(proof, start_us, await question.from_database(session, None), None)
        known = await question.resolved(session)
        if cut_us >= end_us:
            # All of it is loaded: nothing is left of the range, and that is complete whatever the database keeps.
            proof = database.prove(session.snapshot, requirement, question.part(end_us, end_us))
            return _Newer(proof, end_us, None, known)
        part = question.part(cut_us, end_us)
        proof = database.prove(session.snapshot, requirement, part)
        return _Newer(proof, cut_us, await part.from_database(session, None), known.part(start_us, cut_us))

    new = await database.within(tenant, newer, timeouts[0])
    if new.older is None:
        assert new.answer is not None
        return new.answer, new.proof, start_us
    answer, completeness = await warehouse.ask(tenant, new.older, timeouts[1])
    if completeness.as_of_us is None:
        raise Unproven("not every lane has reached the warehouse yet")
    cut = range_cut(new.older, completeness.complete_from_us)
    degraded = [*new.proof.degraded, *gaps(completeness), *([cut] if cut is not None else [])]
    complete_from_us = completeness.complete_from_us
    if new.proof.complete_from_us is not None and new.cut_us < new.proof.complete_from_us and new.answer is not None:
        # The database has retired the beginning of its part too.
        complete_from_us = new.proof.complete_from_us
    proof = Proof(SourceKind.SPLIT, "split", new.proof.as_of_us, complete_from_us, tuple(degraded))
    whole = answer if new.answer is None else question.join(answer, new.answer, new.cut_us)
    return whole, proof, new.cut_us
