"""The databases below the demo: a primary, its logins, and a streaming replica; or a primary of the caller's."""

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from embedded.postgres import EmbeddedPostgres
from embedded.replica import StreamingReplica
from storage.maintenance import MaintenanceOptions, maintain
from storage.migrations import grant_logins, migrate

DATABASE = "atlasco"
QUERY_LOGIN = "demo_query"
ROLLUP_LOGIN = "demo_rollup"
# As in production: what queries on the replica still read is not vacuumed away, and replay does not wait long for them.
_REPLICA_SETTINGS = {"hot_standby_feedback": "on", "max_standby_streaming_delay": "1s"}


@dataclass(frozen=True, slots=True)
class Databases:
    """How to reach them. `dsn` is the owner's; `replica` is None, and `replica_dsn` empty, where there is none."""

    dsn: str
    query_dsn: str
    rollup_dsn: str
    replica: StreamingReplica | None
    replica_dsn: str


def start_databases(resources: ExitStack, data_dir: Path, dsn: str, progress: Callable[[str], None]) -> Databases:
    """Start the databases, with the schema up to date; they stop with `resources`, the replica first.

    `dsn`: an external PostgreSQL instead of embedded ones. It gets no replica, for that needs more than a connection.

    Raises:
        EmbeddedError: the primary or the replica could not be started, or the replica does not follow.
        StorageError: the database refused the schema.
    """
    if dsn:
        _prepare(dsn, progress)
        progress("without a replica: --dsn names a PostgreSQL of your own, so the primary answers dashboards too")
        return Databases(dsn, dsn, dsn, None, "")
    progress("starting PostgreSQL")
    primary = EmbeddedPostgres(data_dir / "postgres", progress=progress)
    resources.callback(primary.stop)
    primary.start()
    primary.ensure_database(DATABASE)
    owner = primary.dsn(DATABASE)
    _prepare(owner, progress)
    for login in (QUERY_LOGIN, ROLLUP_LOGIN):
        primary.ensure_login(login)
    asyncio.run(grant_logins(owner, {"query": [QUERY_LOGIN], "rollup": [ROLLUP_LOGIN]}))
    progress("starting the replica")
    replica = StreamingReplica(primary, data_dir / "replica", settings=_REPLICA_SETTINGS, progress=progress)
    resources.callback(replica.stop)
    replica.start_following()
    return Databases(
        owner,
        primary.dsn(DATABASE, QUERY_LOGIN),
        primary.dsn(DATABASE, ROLLUP_LOGIN),
        replica,
        replica.dsn(DATABASE, QUERY_LOGIN),
    )


def _prepare(dsn: str, progress: Callable[[str], None]) -> None:
    progress("bringing the schema up to date")
    asyncio.run(migrate(dsn, progress=progress))
    asyncio.run(maintain(dsn, MaintenanceOptions()))
