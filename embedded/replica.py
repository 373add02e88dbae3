"""A hot standby that streams from an `EmbeddedPostgres`, with the means to make it lag on purpose."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.rows import TupleRow

from embedded.binaries import run_tool
from embedded.cluster import SUPERUSER, PostgresCluster
from embedded.errors import DataDirUnusable, PostgresStartFailed, ReplicaLagging
from embedded.ports import LOOPBACK
from embedded.postgres import EmbeddedPostgres
from embedded.privileges import Account, give
from embedded.processes import Progress, silent

_POLL_S = 0.01


class StreamingReplica(PostgresCluster):
    """A read-only copy of `primary`, made by pg_basebackup at the first `start` and kept by streaming.

    The primary must run at the first start; later the replica starts and serves without it, and connects
    again by itself, also when the primary has moved to another port before this `start`. Roles and
    passwords are the primary's, so `dsn` takes the same users. A replication slot on the primary keeps
    what a stopped replica still needs, up to `max_slot_wal_keep_size` (2 GB by default); a replica that
    missed more has to be made again: `drop`, then `start`, or `start_following`, which sees to it.
    `settings` go over the primary's.

    Returning from `start` promises a consistent server that answers reads, not one that has caught up:
    see `wait_caught_up`. Everything else is described at `PostgresCluster`.
    """

    def __init__(
        self,
        primary: EmbeddedPostgres,
        data_dir: Path,
        *,
        settings: Mapping[str, str] = MappingProxyType({}),
        port: int | None = None,
        start_timeout_s: float = 120,
        progress: Progress = silent,
    ) -> None:
        super().__init__(data_dir, settings=settings, port=port, start_timeout_s=start_timeout_s, progress=progress)
        self._primary = primary
        self._slot = "replica_" + hashlib.sha256(str(self.data_dir).encode()).hexdigest()[:16]

    @property
    def primary(self) -> EmbeddedPostgres:
        """The server this one copies."""
        return self._primary

    def start_following(self, timeout_s: float = 60) -> None:
        """As `start`, but return only when everything committed before this call can be read here.

        A copy that cannot follow is made again, once, and `progress` is told why: it missed more than its
        slot kept, it is a copy of another primary, or it does not start. The primary must run; `timeout_s`
        is in seconds, for catching up. Errors: those of `start`, and ReplicaLagging when a new copy does
        not catch up either.
        """
        problem = self._obstacle()
        if not problem:
            is_new = not self._pgdata.exists()
            try:
                self._start_and_catch_up(timeout_s)
            except (PostgresStartFailed, DataDirUnusable, ReplicaLagging, psycopg.OperationalError) as error:
                if is_new:
                    raise
                # The first line says what; the others quote the log of a copy that goes.
                problem = str(error).partition("\n")[0]
            else:
                return
        self._progress(f"the replica cannot follow any more and is made again: {problem}")
        self.drop()
        self._start_and_catch_up(timeout_s)

    def pause_replay(self, timeout_s: float = 10) -> None:
        """Stop applying changes; they are still received. Reads keep seeing the state of this moment.

        Returns when replay has really stopped. Errors: ReplicaLagging when it has not within `timeout_s`
        seconds, as happens while a delayed commit is being waited for; the request stays in force.
        """
        with psycopg.connect(self.dsn(), autocommit=True) as connection:
            connection.execute("SELECT pg_wal_replay_pause()")
            self._wait_for(connection, "SELECT pg_get_wal_replay_pause_state() = 'paused'", timeout_s, "pausing replay")

    def resume_replay(self) -> None:
        """Apply changes again; see `wait_caught_up` for when they are all there."""
        with psycopg.connect(self.dsn(), autocommit=True) as connection:
            connection.execute("SELECT pg_wal_replay_resume()")

    def set_apply_delay(self, delay_ms: int) -> None:
        """Apply each commit `delay_ms` milliseconds after it was made on the primary; 0: at once.

        Lasts as long as this object. Returns when the server has taken the setting.
        """
        self.configure(recovery_min_apply_delay=f"{delay_ms}ms")
        with psycopg.connect(self.dsn(), autocommit=True) as connection:
            # `setting` is in the parameter's own unit, milliseconds.
            taken = f"SELECT setting = '{delay_ms:d}' FROM pg_settings WHERE name = 'recovery_min_apply_delay'"
            self._wait_for(connection, taken, 10, "taking the new delay")

    def wait_caught_up(self, timeout_s: float = 10) -> None:
        """Wait until everything committed on the primary before this call can be read here.

        Errors: ReplicaLagging after `timeout_s` seconds.
        """
        with psycopg.connect(self._primary.dsn(), autocommit=True) as connection:
            # A flushed record of our own. The primary's current position would not do: commits made with
            # synchronous_commit off are behind it unflushed, and one that falls into a page header is
            # never reached by replay until somebody else writes.
            row = connection.execute("SELECT pg_logical_emit_message(false, 'replica', '', flush => true)").fetchone()
        target = row[0] if row else "0/0"
        with psycopg.connect(self.dsn(), autocommit=True) as connection:
            reached = f"SELECT pg_last_wal_replay_lsn() >= '{target}'::pg_lsn"
            self._wait_for(connection, reached, timeout_s, f"replaying up to {target}")

    def drop(self) -> None:
        """Stop the replica, delete its data and, if the primary runs, its slot there.

        Errors: DataDirInUse when another process owns it.
        """
        if not self._lock.acquire():
            self._require_owner()
        self._halt("immediate")
        if self._pgdata.exists():
            shutil.rmtree(self._pgdata)
        # With it goes the password: the next copy has its primary's, which may be a new one.
        (self._data_dir / "password").unlink(missing_ok=True)
        self._password = None
        if self._primary.is_running:
            self._drop_slot()
        self.stop()

    def _create(self, empty: Path, account: Account | None) -> None:
        self._progress("copying the primary to make a replica")
        self._drop_slot()  # of a former replica here, whose data is gone
        run_tool(
            "pg_basebackup",
            [
                f"--pgdata={empty}",
                f"--dbname=host={LOOPBACK} port={self._primary.port} user={SUPERUSER}",
                "--wal-method=stream",
                "--checkpoint=fast",
                "--create-slot",
                f"--slot={self._slot}",
                "--no-password",
            ],
            account=account,
            log_file=self.log_file,
            # Not on the command line, where every user of the machine can read it.
            environment={"PGPASSWORD": self._primary.password},
        )
        # What pg_basebackup's --write-recovery-conf does, save for the connection: that is among the
        # settings written at each start, because the primary's port can change.
        signal_file = empty / "standby.signal"
        signal_file.touch()
        give(signal_file, account)

    def _initial_password(self) -> str:
        return self._primary.password

    def _all_settings(self) -> dict[str, str]:
        upstream = make_conninfo(
            "",
            host=LOOPBACK,
            port=self._primary.port,
            user=SUPERUSER,
            password=self._primary.password,
            application_name=self._slot,
        )
        return {
            # The primary's first: hot standby needs max_connections and its like at least as high.
            **self._primary.settings,
            **self._settings,
            "primary_conninfo": upstream,
            "primary_slot_name": self._slot,
        }

    def _obstacle(self) -> str:
        """Why the copy that is there cannot follow the primary, as far as can be told beforehand; empty: it may."""
        if not self._pgdata.exists():
            return ""
        if not (self._pgdata / "PG_VERSION").exists():
            return f"{self._pgdata} is not whole"
        with psycopg.connect(self._primary.dsn(), autocommit=True) as connection:
            slot = connection.execute(
                "SELECT wal_status FROM pg_replication_slots WHERE slot_name = %s", [self._slot]
            ).fetchone()
        if slot is None:
            return "the primary keeps nothing for it"
        return "it missed more than the primary keeps" if slot[0] == "lost" else ""

    def _start_and_catch_up(self, timeout_s: float) -> None:
        self.start()
        with psycopg.connect(self._primary.dsn(), autocommit=True) as connection:
            # Positions alone prove nothing: a copy of another primary may be ahead of this one.
            connected = (
                "SELECT EXISTS (SELECT FROM pg_stat_replication "
                f"WHERE application_name = '{self._slot}' AND state = 'streaming')"
            )
            self._wait_for(connection, connected, timeout_s, "connecting to its primary")
        self.wait_caught_up(timeout_s)

    def _drop_slot(self) -> None:
        with psycopg.connect(self._primary.dsn(), autocommit=True) as connection:
            # The sender of a replica that has just been stopped may not have noticed yet.
            connection.execute(
                "SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots "
                "WHERE slot_name = %s AND active",
                [self._slot],
            )
            connection.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s",
                [self._slot],
            )

    def _wait_for(self, connection: psycopg.Connection[TupleRow], question: str, timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            row = connection.execute(question.encode()).fetchone()
            if row is not None and row[0]:
                return
            if time.monotonic() > deadline:
                raise ReplicaLagging(f"the replica is still {what} after {timeout_s:.1f} s")
            time.sleep(_POLL_S)
