"""What the tests of this directory share."""

from typing import Any

import psycopg

from embedded.cluster import PostgresCluster


def sql(server: PostgresCluster, query: str, **dsn: Any) -> list[tuple[Any, ...]]:
    with psycopg.connect(server.dsn(**dsn), autocommit=True) as connection:
        cursor = connection.execute(query)
        return cursor.fetchall() if cursor.description else []
