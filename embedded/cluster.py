"""The life of one PostgreSQL server: create, start, take over, stop, kill.

Layout of a data directory:

    owner.lock     who may start and stop the server (see `ownership`)
    password       of the superuser and of every role made by `ensure_login`
    port           kept over restarts, so that clients find the server again
    postgres.log   everything initdb and the server say
    run/           unix socket, unless the path is too long for one
    pgdata/        the cluster itself
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from psycopg.conninfo import make_conninfo

from embedded import processes
from embedded.binaries import MAJOR, bin_dir, clean_environment, command_as, prepare_for
from embedded.errors import DataDirInUse, DataDirUnusable, PostgresStartFailed, StopFailed
from embedded.ownership import OwnerLock, write_atomically
from embedded.ports import LOOPBACK, free_port, is_free
from embedded.postgres_settings import check_names, render
from embedded.privileges import Account, account_for, give, open_path
from embedded.processes import Progress

SUPERUSER = "postgres"

StopMode = Literal["smart", "fast", "immediate"]

_SIGNALS: dict[StopMode, signal.Signals] = {
    "smart": signal.SIGTERM,  # waits for clients to leave
    "fast": signal.SIGINT,  # disconnects clients, writes a checkpoint
    "immediate": signal.SIGQUIT,  # as if the machine failed: recovery at the next start
}
_PROGRAM = "postgres"
_POLL_S = 0.02
_LOG_LIMIT_BYTES = 20_000_000
_SOCKET_PATH_LIMIT = 103  # the shortest sun_path among the systems we run on, without its NUL
_CONF = "embedded.conf"


class PostgresCluster:
    """A PostgreSQL server in a data directory; `EmbeddedPostgres` and `StreamingReplica` say what kind.

    Not thread-safe. Returning from `start` promises a server that accepts connections, nothing about
    what is in it.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        settings: Mapping[str, str],
        port: int | None,
        start_timeout_s: float,
        progress: Progress,
    ) -> None:
        check_names(settings)
        # Resolved: processes are recognised by their working directory, which the kernel resolves.
        self._data_dir = data_dir.expanduser().resolve()
        self._pgdata = self._data_dir / "pgdata"
        self._settings = dict(settings)
        self._wanted_port = port
        self._port: int | None = None
        self._password: str | None = None
        self._start_timeout_s = start_timeout_s
        self._progress = progress
        self._lock = OwnerLock(self._data_dir / "owner.lock")
        self._account: Account | None = None
        self._process: subprocess.Popen[bytes] | None = None

    # -- what it is

    @property
    def data_dir(self) -> Path:
        """The directory given at construction, resolved."""
        return self._data_dir

    @property
    def log_file(self) -> Path:
        """Where the server writes; rotated once (`.1`) when a start finds it over 20 MB."""
        return self._data_dir / "postgres.log"

    @property
    def is_owner(self) -> bool:
        """Whether this object started or took over the server, and so stops it."""
        return self._lock.held

    @property
    def pid(self) -> int | None:
        """The postmaster's process id; None when no server runs in the data directory."""
        status = self._status()
        return status[0] if status else None

    @property
    def is_running(self) -> bool:
        """Whether a server runs in the data directory, whoever started it, ready or not."""
        return self.pid is not None

    @property
    def port(self) -> int:
        """The TCP port on 127.0.0.1. Known after the first `start` ever, and kept."""
        port = self._port or self._recorded_port()
        if port is None:
            raise RuntimeError("the port is known after start()")
        return port

    @property
    def password(self) -> str:
        """The superuser's password. Known after the first `start` ever, and kept."""
        if self._password is None:
            try:
                self._password = (self._data_dir / "password").read_text()
            except FileNotFoundError as error:
                raise RuntimeError("the password is known after start()") from error
        return self._password

    @property
    def socket_dir(self) -> Path | None:
        """Directory of the unix socket; None when the data directory's path is too long for one."""
        run = self._data_dir / "run"
        return run if len(str(run / ".s.PGSQL.65535").encode()) <= _SOCKET_PATH_LIMIT else None

    def dsn(self, dbname: str = "postgres", user: str = SUPERUSER, **parameters: str | int) -> str:
        """Return a libpq connection string (key=value form), password included: do not log it.

        `user` must be the superuser or a role given to `EmbeddedPostgres.ensure_login`. Further libpq
        parameters (`application_name`, `options`, `connect_timeout` in seconds …) are added as given.
        """
        return make_conninfo(
            "",
            host=LOOPBACK,
            port=self.port,
            dbname=dbname,
            user=user,
            password=self.password,
            **parameters,
        )

    # -- what it does

    def start(self) -> None:
        """Make the server run and accept connections; create the cluster first if there is none.

        1. Another living process owns the directory: attach to its server once that is ready. `stop`
           then leaves it running, and `settings` are the owner's.
        2. A server runs but its owner is dead (kill -9): take it over; it is restarted only when the
           settings or the port differ.
        3. Otherwise clear what a crash left behind (orphaned backends, stale postmaster.pid) and start.

        The server outlives this process if that is killed. Recovery after a crash is part of the start
        and counts against `start_timeout_s`.

        Errors: PostgresStartFailed with the log's last lines; DataDirInUse when attaching and the owner's
        server does not become ready or has another port than asked for; DataDirUnusable; BinariesMissing.
        """
        try:
            self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            owned = self._lock.acquire()
        except OSError as error:
            raise DataDirUnusable(f"cannot use the data directory {self._data_dir}: {error}") from error
        if not owned and self._attach():
            return
        try:
            self._start_as_owner()
        except BaseException:
            if self._process is not None:  # interrupted: nobody would know that it is there to be stopped
                self._halt("immediate")
            self._lock.release()
            raise

    def stop(self, mode: StopMode = "fast", timeout_s: float = 60) -> None:
        """Stop the server and give up ownership; without effect when not running or merely attached.

        A stop that takes longer than `timeout_s` seconds becomes an immediate one, which loses nothing
        committed. Errors: StopFailed when even that has no effect within ten seconds.
        """
        if not self._lock.held:
            return
        pid = self.pid
        if pid is not None and not self._end(pid, _SIGNALS[mode], timeout_s):
            self._progress("PostgreSQL does not stop in time: stopping it at once")
            if not self._end(pid, signal.SIGQUIT, 10):
                raise StopFailed(f"PostgreSQL (process {pid}) does not stop, see {self.log_file}")
        self._reap()
        self._lock.release()

    def kill(self) -> None:
        """SIGKILL every process of the server, as a power failure would; `start` recovers. For tests."""
        processes.kill_all(_PROGRAM, self._pgdata)
        self._reap()

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop and start on the same port. Ownership is not given up in between. Errors: as both."""
        if not self._lock.held:
            raise DataDirInUse(f"{self._data_dir} is owned by process {self._lock.owner()}: restart it there")
        self._halt(mode)
        self.start()

    def configure(self, **settings: str) -> None:
        """Change settings of the running server that need no restart; they last as long as this object.

        Returning promises that the server was told to reload, not that every process has done so.
        """
        if not self._lock.held:
            raise DataDirInUse(f"{self._data_dir} is owned by process {self._lock.owner()}: configure it there")
        self._settings.update(settings)
        self._write_conf()
        if (pid := self.pid) is not None:
            processes.send(pid, signal.SIGHUP)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- for the kinds of server

    def _create(self, empty: Path, account: Account | None) -> None:
        """Fill `empty`, an empty directory of the account, with a cluster."""
        raise NotImplementedError

    def _initial_password(self) -> str:
        return secrets.token_urlsafe(24)

    def _all_settings(self) -> dict[str, str]:
        return dict(self._settings)

    def _require_owner(self) -> None:
        if not self._lock.held:
            raise DataDirInUse(
                f"this object does not own {self._data_dir} (process {self._lock.owner()} may): "
                "start it first, or ask its owner"
            )

    # -- steps of a start

    def _attach(self) -> bool:
        """Wait for the owner's server. False: the owner has gone meanwhile and the lock is ours."""
        deadline = time.monotonic() + self._start_timeout_s
        while time.monotonic() < deadline:
            if self._lock.acquire():
                return False
            status = self._status()
            if status and status[1] == "ready":
                port = int((self._data_dir / "port").read_text())
                if self._wanted_port not in (None, port):
                    raise DataDirInUse(
                        f"the PostgreSQL in {self._data_dir} (process {status[0]}) listens on port {port}, "
                        f"not {self._wanted_port}, and belongs to process {self._lock.owner()}: "
                        "stop that first"
                    )
                self._port = port
                self._password = (self._data_dir / "password").read_text()
                return True
            time.sleep(_POLL_S)
        raise DataDirInUse(
            f"{self._data_dir} is owned by process {self._lock.owner()}, whose PostgreSQL was not ready "
            f"within {self._start_timeout_s:.0f} s; see {self.log_file}"
        )

    def _start_as_owner(self) -> None:
        self._account = account_for(self._pgdata)
        prepare_for(self._account)
        open_path(self._pgdata, self._account)
        if self.log_file.exists() and self.log_file.stat().st_size > _LOG_LIMIT_BYTES:
            self.log_file.replace(self.log_file.with_suffix(".log.1"))
        self._load_password()
        if not (self._pgdata / "PG_VERSION").exists():
            self._create_cluster()
        found = (self._pgdata / "PG_VERSION").read_text().strip()
        if found != str(MAJOR):
            raise DataDirUnusable(
                f"{self._pgdata} was made by PostgreSQL {found}, this is {MAJOR}: "
                "dump it with the old version, or choose another data directory"
            )
        if self._take_over():
            return
        self._clear_crash()
        if (run := self.socket_dir) is not None:
            run.mkdir(mode=0o700, exist_ok=True)
            give(run, self._account)
        self._launch()

    def _load_password(self) -> None:
        file = self._data_dir / "password"
        if not file.exists():
            write_atomically(file, self._initial_password())
            give(file, self._account)  # initdb reads it
        self._password = file.read_text()

    def _create_cluster(self) -> None:
        # In a directory beside, renamed when complete: a creation that was killed is not taken for a
        # cluster at the next start.
        unfinished = self._data_dir / "pgdata.new"
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir(mode=0o700)
        give(unfinished, self._account)
        self._create(unfinished, self._account)
        with (unfinished / "postgresql.conf").open("r+", encoding="utf-8") as conf:
            line = f"include_if_exists = '{_CONF}'\n"
            if line not in conf.read():
                conf.write(line)
        unfinished.rename(self._pgdata)

    def _take_over(self) -> bool:
        status = self._status()
        if status is None:
            return False
        pid = status[0]
        if self._process is None:
            self._progress(f"taking over the running PostgreSQL (process {pid})")
        self._port = self._recorded_port()
        conf = self._pgdata / _CONF
        unchanged = conf.exists() and conf.read_text(encoding="utf-8") == self._conf_text()
        if self._port is not None and self._wanted_port in (None, self._port) and unchanged:
            self._wait_ready(pid)
            return True
        self._halt("fast")
        return False

    def _clear_crash(self) -> None:
        # Backends that outlive a killed postmaster hold the shared memory of the dead server: starting
        # beside them would corrupt data, so PostgreSQL refuses until all are gone.
        processes.kill_all(_PROGRAM, self._pgdata)
        # Nobody works here any more, so the pid in the file is stale. PostgreSQL itself would refuse to
        # start if that pid now names another process of the same account.
        (self._pgdata / "postmaster.pid").unlink(missing_ok=True)

    def _launch(self) -> None:
        for attempt in range(3):
            self._port = self._choose_port(fresh=attempt > 0)
            self._write_conf()
            with self.log_file.open("ab") as log:
                try:
                    self._process = subprocess.Popen(
                        command_as(self._account, [str(bin_dir() / _PROGRAM), "-D", str(self._pgdata)]),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd="/",
                        env=clean_environment(),
                        # Ctrl-C in a terminal is for the caller, who stops things in order.
                        start_new_session=True,
                    )
                except OSError as error:
                    raise PostgresStartFailed(f"it could not be run: {error}", self.log_file) from error
            try:
                self._wait_ready(self._process.pid)
            except PostgresStartFailed:
                lost_the_port = not self.is_running and not is_free(self.port)
                if lost_the_port and self._wanted_port is None:
                    continue
                raise
            write_atomically(self._data_dir / "port", str(self._port))
            return
        raise PostgresStartFailed("three ports in a row were taken by others", self.log_file)

    def _choose_port(self, *, fresh: bool) -> int:
        if self._wanted_port is not None:
            return self._wanted_port
        recorded = self._recorded_port()
        if fresh or recorded is None or not is_free(recorded):
            return free_port()
        return recorded

    def _recorded_port(self) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            return int((self._data_dir / "port").read_text())
        return None

    def _wait_ready(self, pid: int) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        while time.monotonic() < deadline:
            if self._status() == (pid, "ready"):
                return
            ended = self._process.poll() if self._process and self._process.pid == pid else None
            if ended is not None or not processes.is_alive(pid):
                self._reap()
                raise PostgresStartFailed(f"it ended with {ended}", self.log_file)
            time.sleep(_POLL_S)
        # Left running it would hold the directory against the next attempt.
        self._halt("immediate")
        raise PostgresStartFailed(f"it was not ready within {self._start_timeout_s:.0f} s", self.log_file)

    def _write_conf(self) -> None:
        conf = self._pgdata / _CONF
        write_atomically(conf, self._conf_text())
        give(conf, self._account)

    def _conf_text(self) -> str:
        return render(self._all_settings(), self.port, self.socket_dir)

    # -- processes

    def _status(self) -> tuple[int, str] | None:
        """Return (pid, state) of the server that runs here; None when none does."""
        try:
            lines = (self._pgdata / "postmaster.pid").read_text().splitlines()
            pid = int(lines[0])
        except (OSError, ValueError, IndexError):
            return None
        if not processes.works_in(pid, _PROGRAM, self._pgdata):
            return None
        return pid, lines[7].strip() if len(lines) > 7 else "starting"

    def _halt(self, mode: StopMode) -> None:
        pid = self.pid
        if pid is not None and not self._end(pid, _SIGNALS[mode], 60):
            self._end(pid, signal.SIGQUIT, 10)
        processes.kill_all(_PROGRAM, self._pgdata)
        self._reap()

    def _end(self, pid: int, how: signal.Signals, timeout_s: float) -> bool:
        processes.send(pid, how)
        if self._process is not None and self._process.pid == pid:
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                return False
            return True
        return processes.wait_gone(pid, timeout_s)

    def _reap(self) -> None:
        """Collect our child, which has ended or is ending."""
        if self._process is not None:
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired as error:
                raise StopFailed(f"process {self._process.pid} of {self._data_dir} does not end") from error
            self._process = None
