"""The statements of queries, and nothing else: what the same PostgreSQL takes for them over one psycopg connection.

The gateway's own read functions run once for each question, and what they execute is written down, parameters and all.
Then it is executed again by a loop that does nothing but psycopg's input and output, in transactions of the same kind,
every statement prepared.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Self, TypeAlias

import psycopg
from psycopg import AsyncCursor, IsolationLevel
from psycopg_pool import AsyncConnectionPool

from bench.stack import QUERY_LOGIN, Stack
from bench.workload import TENANT
from storage.database import Role, connection_info
from storage.reads.session import ReadSession, read_session
from storage.reads.tenants import TenantDirectory

Ask: TypeAlias = Callable[[ReadSession], Awaitable[Any]]
Statements: TypeAlias = list[tuple[Any, Any]]
_PATIENCE_S = 60.0


class BareSql:
    """Recordings of questions, and a connection that they are played on."""

    def __init__(self, stack: Stack, database: str) -> None:
        self._info = connection_info(stack.dsn(database, QUERY_LOGIN), Role.QUERY)

    def __enter__(self) -> Self:
        self._connection = psycopg.connect(self._info, prepare_threshold=0)
        self._connection.isolation_level = IsolationLevel.REPEATABLE_READ
        self._connection.read_only = True
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def record(self, questions: Sequence[Ask]) -> list[Statements]:
        """What each question executes."""
        return asyncio.run(self._record(questions))

    def play(self, recordings: Sequence[Statements]) -> list[float]:
        """How long each recording takes, from its transaction's beginning to its end, in milliseconds."""
        times = []
        for statements in recordings:
            started = time.perf_counter()
            for statement, parameters in statements:
                self._connection.cursor(binary=True).execute(statement, parameters).fetchall()
            self._connection.commit()
            times.append((time.perf_counter() - started) * 1000)
        return times

    async def _record(self, questions: Sequence[Ask]) -> list[Statements]:
        written: Statements = []

        class Recorder(AsyncCursor[tuple[Any, ...]]):
            async def execute(self, query: Any, params: Any = None, **options: Any) -> Self:
                # The pool's look whether a connection still works is an empty one.
                if query:
                    written.append((query, params))
                return await super().execute(query, params, **options)

        pool: AsyncConnectionPool[Any] = AsyncConnectionPool(
            self._info, min_size=1, max_size=1, open=False, kwargs={"prepare_threshold": 0, "cursor_factory": Recorder}
        )
        await pool.open()
        tenants = TenantDirectory()
        found = []
        try:
            for question in (questions[0], *questions):
                written.clear()
                async with read_session(pool, tenants, TENANT, _PATIENCE_S) as session:
                    await question(session)
                found.append(list(written))
        finally:
            await pool.close()
        # The first one looked up the tenant's id, which is known from then on.
        return found[1:]
