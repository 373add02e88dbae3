"""A PostgreSQL primary on one machine, from a wheel: no installation, no root needed, none kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import psycopg
from psycopg import sql

from embedded.binaries import run_tool
from embedded.cluster import SUPERUSER, PostgresCluster
from embedded.postgres_settings import DEFAULTS
from embedded.privileges import Account
from embedded.processes import Progress, silent


class EmbeddedPostgres(PostgresCluster):
    """PostgreSQL 18 in a data directory of the caller's choice, on 127.0.0.1.

        with EmbeddedPostgres(Path("data/postgres")) as postgres:
            psycopg.connect(postgres.dsn())

    `settings` are server settings (values as in postgresql.conf) over `DEFAULTS`. `port`: a fixed TCP
    port; by default a free one is chosen once and kept over restarts. `start_timeout_s` is in seconds
    and includes crash recovery. Every connection needs the password (scram-sha-256): other users of the
    machine can reach the loopback port too. Text is UTF-8 and sorts by code point, whatever the
    machine's locale.

    The life of the server (`start`, `stop`, `kill`, `restart`, `configure`, attaching and taking over)
    is described at `PostgresCluster`.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        settings: Mapping[str, str] = MappingProxyType({}),
        port: int | None = None,
        start_timeout_s: float = 120,
        progress: Progress = silent,
    ) -> None:
        super().__init__(
            data_dir,
            settings={**DEFAULTS, **settings},
            port=port,
            start_timeout_s=start_timeout_s,
            progress=progress,
        )

    @property
    def settings(self) -> Mapping[str, str]:
        """The settings in force, `DEFAULTS` included, without addresses and port."""
        return dict(self._settings)

    def ensure_database(self, name: str) -> None:
        """Create a database unless it exists. The server must run."""
        with psycopg.connect(self.dsn(), autocommit=True) as connection:
            found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone()
            if found is None:
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))

    def ensure_login(self, role: str) -> None:
        """Let a role (created if missing) log in with the password that `dsn(user=role)` carries."""
        with psycopg.connect(self.dsn(), autocommit=True) as connection:
            found = connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [role]).fetchone()
            verb = sql.SQL("CREATE" if found is None else "ALTER")
            connection.execute(
                sql.SQL("{} ROLE {} LOGIN PASSWORD {}").format(verb, sql.Identifier(role), self.password)
            )

    def _create(self, empty: Path, account: Account | None) -> None:
        self._progress("creating a PostgreSQL cluster (a few seconds, once)")
        run_tool(
            "initdb",
            [
                f"--pgdata={empty}",
                f"--username={SUPERUSER}",
                f"--pwfile={self._data_dir / 'password'}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                # An index sorted by one machine's locale would be corrupt on the next machine.
                "--locale=C",
                "--locale-provider=builtin",
                "--builtin-locale=C.UTF-8",
            ],
            account=account,
            log_file=self.log_file,
        )
