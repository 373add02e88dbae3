"""The primary and its replicas as sources."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar
from uuid import UUID

from router.breaker import Breaker
from router.clock import PrimaryClock
from router.plan import SourceKind, Standing
from router.tiers import (
    Degradation,
    DegradedReason,
    Proof,
    Question,
    RangeNotHeld,
    Requirement,
    TokenUnknown,
    Unproven,
)
from runtime.tasks import carried_out, retrieve
from storage.database import Pool
from storage.errors import StorageBusy, StorageUnavailable
from storage.reads.session import NotACopy, ReadSession, Snapshot, read_session
from storage.reads.tenants import TenantDirectory

A = TypeVar("A")

# A transaction has to begin within this part of the time that a question has, or this many seconds: a server that
# hangs must leave time to ask another one.
_BEGIN_SHARE = 0.3
_LONGEST_BEGIN_S = 1.0


class DatabaseSource:
    """A PostgreSQL server: the primary, or, with `kind` REPLICA, a streaming copy of it.

    A replica proves its freshness by the heartbeat in the snapshot of the data, and nothing else; `saw` takes what
    probes find between questions. `answer` is described at `Source`.
    """

    def __init__(
        self,
        pool: Pool,
        tenants: TenantDirectory,
        clock: PrimaryClock,
        *,
        kind: SourceKind = SourceKind.PRIMARY,
        name: str = "primary",
        breaker: Breaker | None = None,
    ) -> None:
        self._pool = pool
        self._tenants = tenants
        self._clock = clock
        self.kind = kind
        self.name = name
        self.breaker = breaker or Breaker()
        # Which database a replica must be a copy of; learnt from the primary.
        self.database_id: UUID | None = None
        self._as_of_us: int | None = None
        self._measured_us: int | None = None
        # Questions that did not begin in time and are being cancelled; nobody waits for them.
        self._abandoned: set[asyncio.Task[object]] = set()

    @property
    def standing(self) -> Standing:
        """See `Source`."""
        if self.kind is SourceKind.PRIMARY:
            now = self._clock.now()
            as_of_us = None if now is None else now.earliest_us
            reason = "the source itself: a read is complete up to its own beginning"
            return self._standing(as_of_us, as_of_us, reason)
        return self._standing(self._as_of_us, self._measured_us, "the heartbeat in its last snapshot")

    def _standing(self, as_of_us: int | None, measured_us: int | None, reason: str) -> Standing:
        if self.breaker.is_open:
            return Standing(self.kind, self.name, False, as_of_us, measured_us, self.breaker.problem)
        if as_of_us is None:
            reason = self.breaker.problem or "it was not measured yet"
        return Standing(self.kind, self.name, True, as_of_us, measured_us, reason)

    def saw(self, as_of_us: int) -> None:
        """Take note of a heartbeat that a snapshot of this replica held just now."""
        now = self._clock.now()
        if now is not None:
            # Snapshots may be told in another order than they were taken in; but one of the future, from before the
            # primary's clock was set back, is not the newer one.
            newest = max(as_of_us, self._as_of_us or 0)
            self._as_of_us = newest if newest <= now.latest_us else as_of_us
            self._measured_us = now.latest_us

    async def close(self) -> None:
        """Wait for what was abandoned."""
        if self._abandoned:
            await asyncio.wait(self._abandoned)

    async def answer(
        self, tenant: str, question: Question[A], requirement: Requirement, timeout_s: float
    ) -> tuple[A, Proof]:
        """See `Source`."""

        async def answered(session: ReadSession) -> tuple[A, Proof]:
            proof = self.prove(session.snapshot, requirement, question)
            ask = question.from_materialization if requirement.materialized_only else question.from_database
            answer = await ask(session, requirement.materialized_as_of_us)
            return answer, question.proven(answer, proof)

        return await self.within(tenant, answered, timeout_s)

    async def within(self, tenant: str, ask: Callable[[ReadSession], Awaitable[A]], timeout_s: float) -> A:
        """What `ask` makes of a session that has begun; see `Source.answer` for errors and cancellation."""
        try:
            if self.kind is SourceKind.PRIMARY:
                # Nobody else could be asked instead: it has all the time there is to begin.
                async with self._session(tenant, timeout_s) as session:
                    answer = await ask(session)
            else:
                answer = await self._begun_soon(tenant, ask, timeout_s)
        except StorageBusy:
            # Too many questions, or a server that hangs: which of them, the probes find out.
            raise
        except StorageUnavailable as error:
            self.breaker.failed(str(error))
            raise
        self.breaker.answered()
        return answer

    async def _begun_soon(self, tenant: str, ask: Callable[[ReadSession], Awaitable[A]], timeout_s: float) -> A:
        begun = asyncio.Event()

        async def work() -> A:
            async with self._session(tenant, timeout_s) as session:
                begun.set()
                return await ask(session)

        task = asyncio.create_task(work(), name=f"{self.name} query")
        task.add_done_callback(retrieve)
        waiting = asyncio.create_task(begun.wait())
        begin_s = min(_LONGEST_BEGIN_S, timeout_s * _BEGIN_SHARE)
        try:
            await asyncio.wait({task, waiting}, timeout=begin_s, return_when=asyncio.FIRST_COMPLETED)
            if begun.is_set() or task.done():
                return await task
            # A server that hangs also hangs when it is asked to cancel: whoever asked must not wait for that.
            task.cancel()
            self._abandoned.add(task)
            task.add_done_callback(self._abandoned.discard)
            raise StorageBusy(f"{self.name} did not begin a transaction within {begin_s:.3f} s")
        except asyncio.CancelledError:
            # Ends the statement in the database before the caller goes on; see read_session.
            task.cancel()
            await carried_out(asyncio.wait({task}))
            raise
        finally:
            waiting.cancel()

    def prove(self, snapshot: Snapshot, requirement: Requirement, question: Question[A]) -> Proof:
        """The proof that a snapshot gives for a question.

        Raises:
            Unproven: it does not meet the requirement.
            RangeNotHeld: none of the range is kept any more, or not all of it where that is required.
            TokenUnknown: no snapshot ever will.
        """
        degraded = self.prove_freshness(snapshot, requirement)
        cut = range_cut(question, snapshot.complete_from_us, whole=requirement.whole_range)
        if cut is not None:
            degraded.append(cut)
        return Proof(self.kind, self.name, snapshot.as_of_us, snapshot.complete_from_us, tuple(degraded))

    def prove_freshness(self, snapshot: Snapshot, requirement: Requirement) -> list[Degradation]:
        """In which ways a snapshot is worse than asked; ways that the caller does not take raise as in `prove`."""
        degraded = []
        if self.kind is SourceKind.REPLICA:
            self.saw(snapshot.as_of_us)
            now = self._clock.now()
            if now is not None and snapshot.as_of_us > now.latest_us:
                # Written before the primary's clock was set back, or by a primary whose clock was ahead of this one's.
                raise Unproven(
                    f"{self.name}'s heartbeat is later than the primary's clock, so it proves nothing",
                    snapshot.as_of_us,
                )
            needed = requirement.as_of_us
            if needed is None or snapshot.as_of_us < needed:
                behind = "" if needed is None else f" by {(needed - snapshot.as_of_us) / 1000:.1f} ms"
                text = f"{self.name}'s snapshot is older than asked{behind}"
                if not requirement.stale:
                    raise Unproven(text, snapshot.as_of_us)
                degraded.append(Degradation(DegradedReason.STALE, text))
        token = requirement.need.token
        if token is not None:
            if self.kind is SourceKind.PRIMARY and token >= snapshot.xmax:
                raise TokenUnknown("the read token's write is not in this database")
            # An acked transaction has ended, so the primary shows it. A replica that has heard of no older open one
            # shows it too; one that has may not have come so far.
            if self.kind is SourceKind.REPLICA and token >= snapshot.xmin:
                text = f"{self.name}'s snapshot does not prove that it holds the read token's write"
                if not requirement.stale:
                    raise Unproven(text, snapshot.as_of_us)
                degraded.append(Degradation(DegradedReason.READ_TOKEN_UNPROVEN, text))
        return degraded

    @asynccontextmanager
    async def _session(self, tenant: str, timeout_s: float) -> AsyncIterator[ReadSession]:
        copy_of = None
        if self.kind is SourceKind.REPLICA:
            if self.database_id is None:
                raise NotACopy("which database the replica must be a copy of is not known yet")
            copy_of = self.database_id
        async with read_session(self._pool, self._tenants, tenant, timeout_s, copy_of=copy_of) as session:
            yield session


def range_cut(question: Question[A], complete_from_us: int | None, *, whole: bool = False) -> Degradation | None:
    """That a question's range begins before what is kept; None when it does not.

    Raises:
        RangeNotHeld: it ends before that too; with `whole`, it begins before.
    """
    start_us, end_us = question.start_us, question.end_us
    if start_us is None or end_us is None or complete_from_us is None or start_us >= min(complete_from_us, end_us):
        return None
    seconds = (min(complete_from_us, end_us) - start_us) / 1e6
    text = f"the first {seconds:.0f} s of the range are no longer kept"
    if whole or end_us <= complete_from_us:
        raise RangeNotHeld(text, complete_from_us)
    return Degradation(DegradedReason.RANGE_CUT, text)
