"""Carrying out a plan: one source after the other, until one proves what was asked.

What a failure means:

 * the source's snapshot does not prove what is needed (Unproven), it is down, busy, or in conflict with replay: the
   next source of the plan is asked, within the same request and the same deadline;
 * the time is over, or the question itself is wrong (an unknown device, …): the request ends.

Questions that belong to another source reach the primary in limited numbers only: a broken replica must cost its own
callers, not those who write.
"""

import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Generic, TypeVar

from router.clock import Instant, PrimaryClock
from router.database import DatabaseSource
from router.fallbacks import Fallbacks
from router.outcome import Attempt, FallbackBusy, NoSource, RangeRetired, Routed
from router.plan import (
    Inquiry,
    Need,
    Plan,
    Policy,
    Shape,
    SourceKind,
    Standing,
    Step,
    Unplannable,
    plan,
)
from router.seam import Newer, read_newer, with_older
from router.tiers import (
    Degradation,
    DegradedReason,
    NotLoaded,
    Proof,
    Question,
    RangeNotHeld,
    Requirement,
    Unproven,
)
from router.warehouse import WarehouseSource
from storage.errors import StorageError, StorageUnavailable, TransactionConflict
from storage.reads.session import ReadSession

log = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")

_ANALYTICAL = frozenset({Shape.SCAN, Shape.AGGREGATE})
_MATERIALIZED = frozenset({SourceKind.ROLLUP, SourceKind.PROJECTION})
_BEHIND_LOG = frozenset({SourceKind.WAREHOUSE, SourceKind.SPLIT})


class Router:
    """Finds a source for each question. Safe to share between tasks."""

    def __init__(
        self,
        primary: DatabaseSource,
        clock: PrimaryClock,
        *,
        replicas: Sequence[DatabaseSource] = (),
        warehouse: WarehouseSource | None = None,
        policy: Policy | None = None,
        fallback_limit: int = 16,
    ) -> None:
        self._databases = {source.name: source for source in (primary, *replicas)}
        self._primary = primary
        self._warehouse = warehouse
        self._clock = clock
        self._policy = policy or Policy()
        self._fallbacks = Fallbacks(fallback_limit)
        self._turns = itertools.count()

    def standings(self) -> list[Standing]:
        """Every source as it is known now."""
        found = [source.standing for source in self._databases.values()]
        # As fresh as the replica that they lie in, at most; their own watermark is seen in the snapshot.
        found += [
            replace(s, kind=SourceKind.ROLLUP, name=f"rollups of {s.name}", host=s.name)
            for s in found
            if s.kind is SourceKind.REPLICA
        ]
        if self._warehouse is not None:
            warehouse = self._warehouse.standing
            found.append(warehouse)
            # No watermark, no seam: a warehouse that was never heard of holds no older part.
            usable = warehouse.available and warehouse.as_of_us is not None
            found.append(Standing(SourceKind.SPLIT, "split", usable, reason=warehouse.reason))
        return found

    def plan(self, question: Question[A], need: Need, arrival: Instant | None) -> Plan | Unplannable:
        """What would be done about a question now."""
        inquiry = Inquiry(
            question.shape, need, arrival, question.start_us, question.end_us, question.able, next(self._turns)
        )
        return plan(inquiry, self.standings(), self._policy)

    async def read(self, tenant: str, question: Question[A], need: Need, timeout_s: float) -> Routed[A]:
        """The answer, from the first source that proves what is needed. The question arrives now.

        Raises:
            NoSource: none of them is fresh enough.
            RangeRetired: none of them holds any of the range.
            FallbackBusy: the question's own source failed, and the primary takes no more of its questions.
            StorageUnavailable: nobody could be reached.
            QueryCanceled: the time is over.
            StorageError: what the question raises about itself.
        """
        planned = self.plan(question, need, self._clock.now())
        if isinstance(planned, Unplannable):
            if self._primary.breaker.is_open:
                raise StorageUnavailable(f"no source answers: {planned.reasons}")
            raise NoSource(planned.reasons)
        routed = await _Execution(self, tenant, question, planned, timeout_s).run()
        log.debug("routed", extra={"source": routed.proof.name, "attempts": len(routed.attempts)})
        return routed

    def database(self, name: str) -> DatabaseSource:
        """The primary or a replica by name."""
        return self._databases[name]

    def databases_for(self, planned: Plan) -> list[DatabaseSource]:
        """Where the newer part of a split is read: good replicas, then the primary."""
        names = [step.name for step in planned.steps if step.kind is SourceKind.REPLICA and not step.stale]
        return [*(self._databases[name] for name in names), self._primary]

    @property
    def warehouse(self) -> WarehouseSource | None:
        """The warehouse, if there is one."""
        return self._warehouse

    @property
    def policy(self) -> Policy:
        """What the planner goes by."""
        return self._policy

    @property
    def fallbacks(self) -> Fallbacks:
        """Questions of other sources on the primary."""
        return self._fallbacks


class _Execution(Generic[A]):
    """One plan under way."""

    def __init__(self, router: Router, tenant: str, question: Question[A], planned: Plan, timeout_s: float) -> None:
        self._router = router
        self._tenant = tenant
        self._question = question
        self._plan = planned
        self._need = planned.inquiry.need
        self._ends = monotonic() + timeout_s
        self._attempts: list[Attempt] = []
        self._failures: list[tuple[Step, StorageError]] = []

    async def run(self) -> Routed[A]:
        """See `Router.read`."""
        steps = list(self._plan.steps)
        for place, step in enumerate(steps):
            # A database that has retired the beginning of the range is passed over while another source may hold it.
            whole = any(later.kind in _BEHIND_LOG for later in steps[place + 1 :])
            found = await self._try(step, whole_range=whole and not step.stale)
            if found is not None:
                return found
        for step, error in list(self._failures):
            # What was only incomplete at the beginning is better than nothing, and so is what is only too old.
            if isinstance(error, RangeNotHeld) and not self._is_retired(error):
                found = await self._try(step)
            elif (
                # Rollups are not used where they are not fresh enough, whatever the caller takes.
                step.kind is not SourceKind.ROLLUP
                and isinstance(error, Unproven)
                and self._need.allow_degraded
                and not step.stale
            ):
                found = await self._try(replace(step, stale=True))
            else:
                continue
            if found is not None:
                return found
        raise self._failure()

    async def _try(self, step: Step, *, whole_range: bool = False) -> Routed[A] | None:
        """The answer of one source; None when another one has to be asked."""
        began = monotonic()
        needed = None if step.kind is SourceKind.PRIMARY else self._plan.inquiry.needed_as_of_us
        requirement = Requirement(
            self._need,
            needed,
            stale=step.stale,
            whole_range=whole_range,
            materialized_as_of_us=self._materialized_as_of_us(),
        )
        try:
            answer, proof, attempts = await self._ask(step, requirement)
        except (Unproven, StorageUnavailable, TransactionConflict, FallbackBusy) as error:
            self._failures.append((step, error))
            self._attempts.append(self._attempt(step.kind, step.name, began, error=error))
            return None
        self._attempts += attempts
        return Routed(answer, self._marked(proof), self._plan, self._attempts)

    async def _ask(self, step: Step, requirement: Requirement) -> tuple[A, Proof, list[Attempt]]:
        question, began = self._question, monotonic()
        match step.kind:
            case SourceKind.SPLIT:
                return await self._split(requirement)
            case SourceKind.WAREHOUSE:
                answer, proof = await self._from_warehouse(requirement)
            case SourceKind.ROLLUP:
                asked = replace(requirement, materialized_only=True)
                database = self._router.database(step.host)
                answer, proof = await database.answer(self._tenant, question, asked, self._left_s())
            case _:
                database = self._router.database(step.name)
                with self._router.fallbacks.admitted() if step.fallback else nullcontext():
                    answer, proof = await database.answer(self._tenant, question, requirement, self._left_s())
        return answer, proof, [self._attempt(proof.kind, proof.name, began, as_of_us=proof.as_of_us)]

    async def _from_warehouse(self, requirement: Requirement) -> tuple[A, Proof]:
        warehouse, question = self._router.warehouse, self._question
        assert warehouse is not None
        if not question.asks_database_first:
            try:
                return await warehouse.answer(self._tenant, question, requirement, self._left_s())
            except NotLoaded:
                # A database knows whether it exists; if it does, the warehouse has no readings of it yet.
                pass

        async def look_up(database: DatabaseSource, asked: Requirement) -> tuple[Question[A], int, list[Degradation]]:
            async def resolve(session: ReadSession) -> tuple[Question[A], int, list[Degradation]]:
                degraded = database.prove_freshness(session.snapshot, asked)
                return await question.resolved(session), session.snapshot.as_of_us, degraded

            with self._admitted(database):
                return await database.within(self._tenant, resolve, self._left_s())

        (resolved, as_of_us, degraded), _ = await self._from_some_database(requirement, look_up)
        answer, proof = await warehouse.answer(self._tenant, resolved, requirement, self._left_s())
        as_of_us = min(as_of_us, proof.as_of_us)
        return answer, replace(proof, as_of_us=as_of_us, degraded=(*degraded, *proof.degraded))

    async def _split(self, requirement: Requirement) -> tuple[A, Proof, list[Attempt]]:
        warehouse, question = self._router.warehouse, self._question
        assert warehouse is not None

        async def read(database: DatabaseSource, asked: Requirement) -> Newer[A]:
            ask = partial(read_newer, database, self._tenant, question, asked, self._left_s())
            if not self._is_taken_over(database):
                return await ask(partial(self._admitted, database))
            # Wherever the seam is, and before it waits for a connection.
            with self._router.fallbacks.admitted():
                return await ask(lambda _: nullcontext())

        began = monotonic()
        newer, database = await self._from_some_database(replace(requirement, whole_range=False), read)
        of_newer = self._attempt(database.kind, database.name, began, as_of_us=newer.proof.as_of_us)
        attempts = [replace(of_newer, start_us=newer.cut_us)]
        began = monotonic()
        answer, proof = await with_older(warehouse, self._tenant, question, newer, self._left_s())
        if newer.older is not None:
            of_older = self._attempt(SourceKind.WAREHOUSE, warehouse.name, began, as_of_us=proof.as_of_us)
            attempts.append(replace(of_older, end_us=newer.cut_us))
        return answer, proof, attempts

    async def _from_some_database(
        self, requirement: Requirement, work: Callable[[DatabaseSource, Requirement], Awaitable[B]]
    ) -> tuple[B, DatabaseSource]:
        """What `work` makes of the first database that is up and fresh enough: good replicas, then the primary."""
        databases = self._router.databases_for(self._plan)
        for database in databases:
            is_primary = database.kind is SourceKind.PRIMARY
            asked = replace(requirement, as_of_us=None if is_primary else requirement.as_of_us)
            began = monotonic()
            try:
                return await work(database, asked), database
            except (Unproven, StorageUnavailable, TransactionConflict) as error:
                if database is databases[-1]:
                    raise
                self._attempts.append(self._attempt(database.kind, database.name, began, error=error))
        raise AssertionError("the primary is always among the databases")

    def _admitted(self, database: DatabaseSource, newer_from_us: int | None = None) -> AbstractContextManager[None]:
        """For the work of `_is_taken_over`: as one of the fallbacks, if it is one."""
        if self._is_taken_over(database, newer_from_us):
            return self._router.fallbacks.admitted()
        return nullcontext()

    def _is_taken_over(self, database: DatabaseSource, newer_from_us: int | None = None) -> bool:
        """Whether what `database` does for a question of the warehouse is another source's, that fell to the primary.

        Where there are replicas, all of it is theirs. Where there are none, the primary looks up names and reads the
        last hours of a split; all of the range, or days of it, are what a loader that stands still has left to it.
        """
        if database.kind is not SourceKind.PRIMARY or self._need.max_staleness_us == 0:
            return False
        if any(verdict.standing.kind is SourceKind.REPLICA for verdict in self._plan.verdicts):
            return True
        if newer_from_us is None:
            return False
        start_us, end_us = self._question.start_us or 0, self._question.end_us or 0
        return newer_from_us <= start_us or end_us - newer_from_us > self._router.policy.long_range_us

    def _marked(self, proof: Proof) -> Proof:
        """The proof, marked where a database answered in place of the warehouse."""
        is_analytical = (
            self._question.shape in _ANALYTICAL and self._need.max_staleness_us >= self._router.policy.analytical_us
        )
        if not is_analytical or proof.kind in _BEHIND_LOG | _MATERIALIZED:
            return proof
        failed = next((str(e) for s, e in self._failures if s.kind in _BEHIND_LOG), "")
        passed = next((v.reason for v in self._plan.verdicts if v.standing.kind is SourceKind.WAREHOUSE), "")
        why = failed or passed or "none is configured"
        mark = Degradation(DegradedReason.NO_WAREHOUSE, f"the {proof.name} answered in place of the warehouse: {why}")
        return replace(proof, degraded=(*proof.degraded, mark))

    def _materialized_as_of_us(self) -> int | None:
        # Watermarks of materializations say nothing about single transactions.
        return None if self._need.token is not None else self._plan.inquiry.needed_as_of_us

    def _is_retired(self, error: RangeNotHeld) -> bool:
        end_us = self._question.end_us
        return end_us is not None and end_us <= error.complete_from_us

    def _failure(self) -> StorageError:
        """What to tell the caller when every source has failed."""
        errors = [error for _, error in self._failures]
        for kind in (FallbackBusy, StorageUnavailable, TransactionConflict):
            for error in errors:
                if isinstance(error, kind):
                    return error
        retired = [error.complete_from_us for error in errors if isinstance(error, RangeNotHeld)]
        lacking = {step.name for step, error in self._failures if isinstance(error, RangeNotHeld)}
        able = [v.standing for v in self._plan.verdicts if v.standing.kind in self._question.able]
        may_hold = [s for s in able if s.kind is SourceKind.WAREHOUSE and s.name not in lacking]
        if retired and not may_hold:
            return RangeRetired(min(retired))
        if retired and not may_hold[0].available:
            return StorageUnavailable(f"the warehouse may hold the range and does not answer: {may_hold[0].reason}")
        # Of what keeps the range, if anything does, nothing was fresh enough.
        reasons = {v.standing.name: v.reason for v in self._plan.verdicts}
        return NoSource(reasons | {step.name: str(error) for step, error in self._failures})

    def _left_s(self) -> float:
        return max(0.001, self._ends - monotonic())

    def _attempt(
        self,
        kind: SourceKind,
        name: str,
        began: float,
        *,
        as_of_us: int | None = None,
        error: StorageError | None = None,
    ) -> Attempt:
        took_us = int((monotonic() - began) * 1e6)
        failure, cause = ("", None) if error is None else (str(error), type(error))
        return Attempt(kind, name, self._question.start_us, self._question.end_us, as_of_us, failure, took_us, cause)
