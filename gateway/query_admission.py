"""How many queries run at once: in all, and of one tenant, so that none can take every connection."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from gateway.status import Reason, Refusal, query_concurrency

# Long enough for the queries that are under way to end, short enough not to be noticed by a person.
RETRY_AFTER_S = 0.1


class QueryAdmission:
    """Counts running queries; one too many is refused at once, with a delay after which to retry.

    A longer queue instead of a refusal would only hide the overload: queries would wait for a connection until their
    deadlines, and then fail after they cost all the same.
    """

    def __init__(self, limit: int, tenant_limit: int) -> None:
        if not 1 <= tenant_limit <= limit:
            raise ValueError(f"a tenant's limit must be 1 to {limit}, not {tenant_limit}")
        self._limit = limit
        self._tenant_limit = tenant_limit
        self._running = 0
        self._by_tenant: Counter[str] = Counter()

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
        if self._running >= self._limit:
            raise query_concurrency(self._limit, RETRY_AFTER_S)
        if self._by_tenant[tenant] >= self._tenant_limit:
            raise Refusal(
                Reason.QUERY_CONCURRENCY,
                f"{self._tenant_limit} queries of this tenant run already, the most there may be",
                metadata={"limit": str(self._tenant_limit)},
                retry_after_s=RETRY_AFTER_S,
            )
        self._running += 1
        self._by_tenant[tenant] += 1
        try:
            yield
        finally:
            self._running -= 1
            self._by_tenant[tenant] -= 1
            if not self._by_tenant[tenant]:
                # Tenants come and go; the table must not keep them all.
                del self._by_tenant[tenant]
