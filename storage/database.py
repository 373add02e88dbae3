"""Connections: a pool per role, with the settings every connection of ours needs."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg_pool import AsyncConnectionPool

Connection: TypeAlias = psycopg.AsyncConnection[tuple[Any, ...]]
Pool: TypeAlias = AsyncConnectionPool[Connection]


class Role(StrEnum):
    """What a connection is for; becomes part of `application_name`."""

    INGEST = "ingest"
    QUERY = "query"
    MAINTAIN = "maintain"


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """How a pool is made. Times in seconds."""

    dsn: str
    role: Role
    # Shown in the pool's metrics and thread names.
    name: str = ""
    min_size: int = 1
    max_size: int = 4
    # How long a caller waits for a free connection.
    timeout_s: float = 30.0
    # 0: no limit.
    statement_timeout_s: float = 0.0


def connection_info(dsn: str, role: Role, *, statement_timeout_s: float = 0.0) -> str:
    """A connection string with our settings added to a caller's `dsn`.

    Raises:
        psycopg.ProgrammingError: the dsn is not a connection string or URI.
    """
    options = ["-c timezone=UTC", f"-c statement_timeout={int(statement_timeout_s * 1000)}"]
    if role is Role.QUERY:
        # The views of tenant_data have the names of the tables and show one tenant: a statement that forgets its
        # tenant condition then finds nothing instead of everything.
        options.append("-c search_path=tenant_data,public")
    if role is Role.INGEST:
        # An idle open transaction holds back vacuum and the completeness watermark of everything after it.
        options.append("-c idle_in_transaction_session_timeout=60000")
    given = psycopg.conninfo.conninfo_to_dict(dsn).get("options")
    return make_conninfo(
        dsn,
        application_name=f"atlasco-{role}",
        options=" ".join(filter(None, [str(given) if given else "", *options])),
        # A peer that vanished without a word must not hold a connection for the kernel's two hours.
        keepalives_idle=30,
        keepalives_interval=10,
        keepalives_count=3,
        connect_timeout=10,
    )


def make_pool(settings: PoolSettings) -> Pool:
    """A pool, not yet open: `await pool.open()` opens it, and the event loop must run by then."""
    return AsyncConnectionPool(
        connection_info(settings.dsn, settings.role, statement_timeout_s=settings.statement_timeout_s),
        min_size=settings.min_size,
        max_size=settings.max_size,
        timeout=settings.timeout_s,
        name=f"atlasco-{settings.name or settings.role}",
        open=False,
        # Statements are few and repeat for ever: prepare at once.
        kwargs={"prepare_threshold": 0},
        check=AsyncConnectionPool.check_connection if settings.role is Role.QUERY else None,
    )
