"""What the tests of this directory share."""

import time
from collections.abc import Callable
from typing import Any

import psycopg

from embedded.cluster import PostgresCluster


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)


def sql(server: PostgresCluster, query: str, **dsn: Any) -> list[tuple[Any, ...]]:
    with psycopg.connect(server.dsn(**dsn), autocommit=True) as connection:
        cursor = connection.execute(query)
        return cursor.fetchall() if cursor.description else []
