"""Limits on the queries that run at once, in all and per tenant, so that no tenant can take every connection; and on
the exports that a tenant has open. An export counts as a query only while it reads a page.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from gateway.status import Reason, Refusal

# In seconds: long enough for some running queries to end, too short for a person to notice.
RETRY_AFTER_S = 0.1
# Exports take longer.
EXPORT_RETRY_AFTER_S = 1.0


class QueryAdmission:
    """Counts running queries; those beyond a limit are refused at once, with a delay after which to retry.

    Queueing them would only hide the overload: they would wait for a connection until their deadlines, and fail then.
    Only an answer that is half sent waits for its turn.
    """

    def __init__(self, limit: int, tenant_limit: int) -> None:
        if not 1 <= tenant_limit <= limit:
            raise ValueError(f"a tenant's limit must be 1 to {limit}, not {tenant_limit}")
        self._limit = limit
        self._tenant_limit = tenant_limit
        self._running = 0
        self._by_tenant: Counter[str] = Counter()
        # Callers that wait for a place, in order of arrival: the future that tells them, and their tenant.
        self._waiting: dict[asyncio.Future[None], str] = {}

    @property
    def running(self) -> int:
        """Queries running now."""
        return self._running

    @contextmanager
    def admitted(self, tenant: str) -> Iterator[None]:
        """Run the block as one of the tenant's queries.

        Raises:
            Refusal: QUERY_CONCURRENCY, with metadata "limit" and a delay.
        """
        refusal = self._refusal(tenant)
        if refusal is not None:
            raise refusal
        self._enter(tenant)
        try:
            yield
        finally:
            self._leave(tenant)

    @asynccontextmanager
    async def admitted_in_turn(self, tenant: str, patience_s: float) -> AsyncIterator[None]:
        """As `admitted`, but waits for a place: for the next page of an answer that a refusal would abort half sent.

        Raises:
            Refusal: QUERY_CONCURRENCY, when no place became free within `patience_s` seconds.
        """
        refusal = self._refusal(tenant)
        if refusal is None:
            self._enter(tenant)
        elif not await self._turn(tenant, patience_s):
            raise refusal
        try:
            yield
        finally:
            self._leave(tenant)

    async def _turn(self, tenant: str, patience_s: float) -> bool:
        """Wait for a place; false: none became free in time."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[turn] = tenant
        try:
            async with asyncio.timeout(patience_s):
                await turn
        except TimeoutError:
            # Unless it was cancelled, the place was given at the same moment, and is the caller's.
            return not turn.cancelled()
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                # The place was given at the same moment, and nobody else would give it back.
                self._leave(tenant)
            raise
        finally:
            self._waiting.pop(turn, None)
        return True

    def _refusal(self, tenant: str) -> Refusal | None:
        for running, limit, whose in (
            (self._running, self._limit, ""),
            (self._by_tenant[tenant], self._tenant_limit, " of this tenant"),
        ):
            if running >= limit:
                return Refusal(
                    Reason.QUERY_CONCURRENCY,
                    f"{limit} queries{whose} run already, the most there may be",
                    metadata={"limit": str(limit)},
                    retry_after_s=RETRY_AFTER_S,
                )
        return None

    def _enter(self, tenant: str) -> None:
        self._running += 1
        self._by_tenant[tenant] += 1

    def _leave(self, tenant: str) -> None:
        self._running -= 1
        _take_one(self._by_tenant, tenant)
        for turn, waiting in list(self._waiting.items()):
            if not turn.done() and self._refusal(waiting) is None:
                # Taken here for the waiting task: a query that arrives before that task runs must not get the place.
                self._enter(waiting)
                turn.set_result(None)


class ExportAdmission:
    """Counts the open exports of each tenant, and those that ended without having been read.

    An export that its client does not read leaves a message in the transport, which cannot be taken back. Once it has
    ended it no longer counts as open, or one forgetful client would shut out the others of its tenant for good; at most
    as many unread exports as open ones are allowed.
    """

    def __init__(self, tenant_limit: int) -> None:
        self._limit = tenant_limit
        self._open: Counter[str] = Counter()
        self._unread: Counter[str] = Counter()

    @property
    def open(self) -> int:
        """Exports open now; safe to read from any thread."""
        return sum(list(self._open.values()))

    @contextmanager
    def admitted(self, tenant: str) -> Iterator["OpenExport"]:
        """Run the block as one of the tenant's exports.

        Raises:
            Refusal: EXPORT_CONCURRENCY, with metadata "limit" and a delay.
        """
        for exports, state in ((self._open, "are open"), (self._unread, "ended and were left unread")):
            if exports[tenant] >= self._limit:
                raise Refusal(
                    Reason.EXPORT_CONCURRENCY,
                    f"{self._limit} exports of this tenant {state} already, the most there may be; read or cancel them",
                    metadata={"limit": str(self._limit)},
                    retry_after_s=EXPORT_RETRY_AFTER_S,
                )
        export = OpenExport(tenant, self._open, self._unread)
        try:
            yield export
        finally:
            export.close()


class OpenExport:
    """One export, as it is counted."""

    def __init__(self, tenant: str, open_: Counter[str], unread: Counter[str]) -> None:
        self._tenant = tenant
        self._unread = unread
        self._counted = open_
        self._counted[tenant] += 1

    def abandon(self) -> None:
        """It has ended, and its client has not read what was sent: count it as unread until `close`."""
        self.close()
        self._counted = self._unread
        self._counted[self._tenant] += 1

    def close(self) -> None:
        """Stop counting it: nothing of it is left in memory."""
        _take_one(self._counted, self._tenant)


def _take_one(counts: Counter[str], tenant: str) -> None:
    counts[tenant] -= 1
    if not counts[tenant]:
        # Tenants come and go; the table must not keep them all.
        del counts[tenant]
