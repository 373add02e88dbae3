"""The warehouse as a source: its calls block, so they run in threads of their own, and only so many."""

import asyncio
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

from router.breaker import Breaker
from router.database import range_cut
from router.plan import SourceKind, Standing
from router.tiers import Degradation, DegradedReason, NotLoaded, Proof, Question, Requirement, Unproven
from runtime.tasks import retrieve
from storage.errors import QueryCanceled, StorageBusy, StorageError, StorageUnavailable
from storage.reads.warehouse import UnknownToWarehouse
from storage.warehouse.cancellation import Cancellation
from storage.warehouse.port import Completeness, QueryRefused, Warehouse, WarehouseMissing
from storage.warehouse.reader import WarehouseReader

log = logging.getLogger(__name__)

A = TypeVar("A")

# How long a measurement may take, in seconds; a warehouse that wakes up takes several.
_PATIENCE_S: Final = 10.0


class WarehouseSource:
    """A warehouse. `concurrency` questions run at once, twice as many may wait; `answer` is described at `Source`.

    A question that ran out of time, or whose caller is gone, is cancelled in the warehouse without waiting for that to
    happen. It keeps its place until it has ended, so that abandoned questions cannot pile up.
    """

    kind = SourceKind.WAREHOUSE
    name = "warehouse"

    def __init__(self, warehouse: Warehouse, *, concurrency: int = 2, breaker: Breaker | None = None) -> None:
        self._warehouse = warehouse
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="warehouse")
        self._most = 3 * concurrency
        self._running = 0
        self.breaker = breaker or Breaker()
        self._known: Completeness | None = None
        self._measuring: asyncio.Future[Completeness] | None = None

    @property
    def standing(self) -> Standing:
        """See `Source`."""
        known = self._known
        as_of_us = None if known is None else known.as_of_us
        if self.breaker.is_open:
            return Standing(self.kind, self.name, False, as_of_us, None, self.breaker.problem)
        if known is None:
            reason = self.breaker.problem or "it was not measured yet"
        elif known.halted:
            reason = f"it stands still: {known.halted[0]}"
        elif as_of_us is None:
            reason = "not every lane has reached it yet"
        else:
            reason = "the oldest watermark loaded of any lane and partition"
        return Standing(self.kind, self.name, True, as_of_us, None, reason)

    def close(self) -> None:
        """Wait for the questions that still run, and end the threads."""
        self._threads.shutdown()

    async def measure(self) -> None:
        """Measure how much of the data the warehouse has; failures are reported to the breaker, not raised."""
        if self._measuring is None or self._measuring.done():
            loop = asyncio.get_running_loop()
            self._measuring = loop.run_in_executor(None, self._warehouse.completeness)
            self._measuring.add_done_callback(retrieve)
        try:
            # A measurement that hangs goes on and is waited for again the next time: no second one runs beside it.
            async with asyncio.timeout(_PATIENCE_S):
                self._known = await asyncio.shield(self._measuring)
        except TimeoutError:
            self.breaker.failed(f"no answer within {_PATIENCE_S:.0f} s", probe=True)
        except WarehouseMissing as error:
            # It may be set up later, and is found then: no failure, so the breaker stays closed.
            self._known = None
            self.breaker.problem = str(error)
        except StorageError as error:
            # Missing privileges as well.
            self.breaker.failed(str(error), probe=True)
        except Exception as error:
            # Whatever is wrong with the warehouse, or with our reading of it, must not stop the gateway.
            log.exception("the warehouse could not be measured")
            self.breaker.failed(f"{type(error).__name__}: {error}", probe=True)
        else:
            self.breaker.answered(probe=True)

    async def answer(
        self, tenant: str, question: Question[A], requirement: Requirement, timeout_s: float
    ) -> tuple[A, Proof]:
        """See `Source`."""
        answer, completeness = await self.ask(tenant, question, timeout_s)
        return answer, self.prove(completeness, requirement, question)

    async def ask(self, tenant: str, question: Question[A], timeout_s: float) -> tuple[A, Completeness]:
        """The warehouse's answer with its completeness, not yet checked against any requirement.

        Raises:
            NotLoaded: the warehouse does not know a device or an attribute of the question.
            StorageError: as `Source.answer`.
        """
        if self._running >= self._most:
            raise StorageBusy(f"{self._running} questions run in the warehouse or wait for it")
        self._running += 1
        cancellation = Cancellation()
        thread = self._threads.submit(question.from_warehouse, WarehouseReader(self._warehouse, cancellation), tenant)
        loop = asyncio.get_running_loop()
        thread.add_done_callback(lambda _: loop.call_soon_threadsafe(self._ended))
        work = asyncio.wrap_future(thread)
        work.add_done_callback(retrieve)
        try:
            async with asyncio.timeout(timeout_s):
                answer, completeness = await asyncio.shield(work)
        except TimeoutError as error:
            self._abandon(thread, cancellation)
            raise QueryCanceled(f"the warehouse took longer than the {timeout_s:.3f} s it had") from error
        except asyncio.CancelledError:
            self._abandon(thread, cancellation)
            raise
        except UnknownToWarehouse as error:
            raise NotLoaded(str(error)) from error
        except QueryCanceled as error:
            # The warehouse ended it for limits of its own: nobody here cancelled it.
            raise StorageBusy(f"the warehouse ended the question: {error}") from error
        except QueryRefused as error:
            # The statement is ours and valid, so something it reads is damaged; another source may have it whole.
            log.error("the warehouse refused a statement", extra={"problem": str(error)})
            raise StorageUnavailable(str(error)) from error
        except StorageBusy:
            # Too many questions, or too large a one, is no failure for the breaker: measurements find failures.
            raise
        except StorageUnavailable as error:
            self.breaker.failed(str(error))
            raise
        self.breaker.answered()
        return answer, completeness

    def prove(self, completeness: Completeness, requirement: Requirement, question: Question[A]) -> Proof:
        """What a completeness proves.

        Raises:
            Unproven: it does not meet the requirement.
            RangeNotHeld: nothing of the range is kept any more.
        """
        as_of_us, needed = completeness.as_of_us, requirement.as_of_us
        if as_of_us is None:
            raise Unproven("not every lane has reached the warehouse yet")
        degraded = []
        if needed is None or as_of_us < needed:
            behind = "" if needed is None else f" by {(needed - as_of_us) / 1e6:.3f} s"
            text = f"the warehouse is older than asked{behind}"
            if not requirement.stale:
                raise Unproven(text, as_of_us)
            degraded.append(Degradation(DegradedReason.STALE, text))
        degraded += gaps(completeness)
        cut = range_cut(question, completeness.complete_from_us)
        if cut is not None:
            degraded.append(cut)
        return Proof(self.kind, self.name, as_of_us, completeness.complete_from_us, tuple(degraded))

    def _abandon(self, thread: "Future[tuple[A, Completeness]]", cancellation: Cancellation) -> None:
        """End a question that nobody waits for any more; if it has no thread yet, it never begins. Returns at once."""
        if not thread.cancel():
            # In a thread, because it blocks until the statement has ended; whether that worked makes no difference.
            asyncio.get_running_loop().run_in_executor(None, cancellation.cancel)

    def _ended(self) -> None:
        self._running -= 1


def gaps(completeness: Completeness) -> list[Degradation]:
    """The degradation that records of the log wait to be decoded; empty: none do."""
    if not completeness.incomplete:
        return []
    first = completeness.incomplete[0]
    text = f"{len(completeness.incomplete)} records wait to be decoded, the first at {first.partition}/{first.offset}"
    return [Degradation(DegradedReason.INCOMPLETE, text)]
