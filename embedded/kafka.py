"""Apache Kafka on one machine: broker and controller in one process, KRaft mode, no ZooKeeper.

Layout of a data directory:

    owner.lock          who may start and stop the broker (see `ownership`)
    ports               of the broker and of its controller, kept over restarts
    server.properties   written at each start
    kafka.log           everything the broker says
    data/               topics and metadata
"""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from embedded import processes
from embedded.errors import DataDirInUse, DataDirUnusable, KafkaStartFailed, StopFailed
from embedded.jars import default_cache_dir, find_java, kafka_jars
from embedded.kafka_probe import serves
from embedded.kafka_properties import render, with_defaults
from embedded.ownership import OwnerLock, write_atomically
from embedded.ports import LOOPBACK, free_port, is_free
from embedded.processes import Progress, silent

_PROGRAM = "java"
_POLL_S = 0.05
_LOG_LIMIT_BYTES = 20_000_000
_LOG4J = Path(__file__).resolve().with_name("kafka-log4j2.properties")


class EmbeddedKafka:
    """A Kafka broker in a data directory of the caller's choice, on 127.0.0.1, without authentication.

        with EmbeddedKafka(Path("data/kafka"), progress=print) as kafka:
            Producer({"bootstrap.servers": kafka.bootstrap_servers})

    `properties` are broker properties over `kafka_properties.DEFAULTS`. `port`: a fixed port; by default a free one is
    chosen once and kept over restarts, so that clients connect again. `heap_mb`: the Java heap in MiB.
    `cache_dir`: where the jars are kept, by default in the user's cache directory. `start_timeout_s` is
    in seconds; resolving jars does not count against it. `progress` gets a line when something long begins.

    An acknowledged record survives the death of the broker. It may not survive the machine's: like any
    Kafka, this one leaves writing to disk to the operating system, and here no other broker has a copy.
    Not thread-safe.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        properties: Mapping[str, str] = MappingProxyType({}),
        port: int | None = None,
        heap_mb: int = 384,
        cache_dir: Path | None = None,
        start_timeout_s: float = 90,
        progress: Progress = silent,
    ) -> None:
        # Resolved: the broker is recognised by its working directory, which the kernel resolves.
        self._data_dir = data_dir.expanduser().resolve()
        self._properties = with_defaults(properties)
        self._wanted_port = port
        self._ports: tuple[int, int] | None = None
        self._heap_mb = heap_mb
        self._cache_dir = cache_dir or default_cache_dir()
        self._start_timeout_s = start_timeout_s
        self._progress = progress
        self._lock = OwnerLock(self._data_dir / "owner.lock")
        self._process: subprocess.Popen[bytes] | None = None

    # -- what it is

    @property
    def data_dir(self) -> Path:
        """The directory given at construction, resolved."""
        return self._data_dir

    @property
    def log_file(self) -> Path:
        """Where the broker writes; rotated once (`.1`) when a start finds it over 20 MB."""
        return self._data_dir / "kafka.log"

    @property
    def is_owner(self) -> bool:
        """Whether this object started or took over the broker, and so stops it."""
        return self._lock.held

    @property
    def pid(self) -> int | None:
        """The broker's process id; None when none runs in the data directory."""
        running = processes.working_in(_PROGRAM, self._data_dir)
        return running[0] if running else None

    @property
    def is_running(self) -> bool:
        """Whether a broker runs in the data directory, whoever started it, ready or not."""
        return self.pid is not None

    @property
    def port(self) -> int:
        """The broker's port on 127.0.0.1. Known after the first `start` ever, and kept."""
        ports = self._ports or self._recorded_ports()
        if ports is None:
            raise RuntimeError("the port is known after start()")
        return ports[0]

    @property
    def bootstrap_servers(self) -> str:
        """What clients take as `bootstrap.servers`."""
        return f"{LOOPBACK}:{self.port}"

    # -- what it does

    def start(self) -> None:
        """Make the broker run and serve; format its storage first if there is none.

        Attaches to the broker of another living process, takes over one whose owner is dead, recovers
        after a crash: the same rules as `PostgresCluster.start`. The broker outlives this process if that
        is killed.

        Errors: JavaMissing, MavenMissing, JarsUnresolved; KafkaStartFailed with the log's last lines;
        DataDirInUse when attaching and the owner's broker does not become ready or has another port than
        asked for; DataDirUnusable.
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
                self.kill()
            self._lock.release()
            raise

    def stop(self, timeout_s: float = 30) -> None:
        """Stop the broker and give up ownership; without effect when not running or merely attached.

        A broker that takes longer than `timeout_s` seconds is killed, which loses nothing acknowledged.
        """
        if not self._lock.held:
            return
        self._halt(timeout_s)
        self._lock.release()

    def kill(self) -> None:
        """SIGKILL the broker; `start` recovers. For tests."""
        processes.kill_all(_PROGRAM, self._data_dir)
        self._reap()

    def restart(self) -> None:
        """Stop and start on the same port. Ownership is not given up in between. Errors: as both."""
        if not self._lock.held:
            raise DataDirInUse(f"{self._data_dir} may be owned by process {self._lock.owner()}: ask there")
        self._halt(30)
        self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- steps of a start

    def _attach(self) -> bool:
        """Wait for the owner's broker. False: the owner has gone meanwhile and the lock is ours."""
        deadline = time.monotonic() + self._start_timeout_s
        while time.monotonic() < deadline:
            if self._lock.acquire():
                return False
            ports = self._recorded_ports()
            if ports is not None and self.is_running and serves(ports[0]):
                if self._wanted_port not in (None, ports[0]):
                    raise DataDirInUse(
                        f"the Kafka in {self._data_dir} listens on port {ports[0]}, not {self._wanted_port}, "
                        f"and belongs to process {self._lock.owner()}: stop that first"
                    )
                self._ports = ports
                return True
            time.sleep(_POLL_S)
        raise DataDirInUse(
            f"{self._data_dir} is owned by process {self._lock.owner()}, whose Kafka was not ready "
            f"within {self._start_timeout_s:.0f} s; see {self.log_file}"
        )

    def _start_as_owner(self) -> None:
        if self._take_over():
            return
        java = find_java()
        jars = kafka_jars(self._cache_dir, self._progress)
        if self.log_file.exists() and self.log_file.stat().st_size > _LOG_LIMIT_BYTES:
            self.log_file.replace(self.log_file.with_suffix(".log.1"))
        processes.kill_all(_PROGRAM, self._data_dir)
        for attempt in range(3):
            self._ports = self._choose_ports(fresh=attempt > 0)
            write_atomically(self._properties_file, self._properties_text())
            # Written last by the formatting: without it the storage is not formatted, or only half.
            if not (self._data_dir / "data" / "meta.properties").exists():
                self._format(java, jars)
            try:
                self._launch(java, jars)
            except KafkaStartFailed:
                if self._wanted_port is None and not all(is_free(port) for port in self._ports):
                    continue
                raise
            broker, controller = self._ports
            write_atomically(self._data_dir / "ports", f"{broker} {controller}\n")
            return
        raise KafkaStartFailed("three times in a row its ports were taken by others", self.log_file)

    def _take_over(self) -> bool:
        pid = self.pid
        if pid is None:
            return False
        if self._process is None:
            self._progress(f"taking over the running Kafka (process {pid})")
        self._ports = self._recorded_ports()
        if self._ports is not None and self._wanted_port in (None, self._ports[0]):
            with contextlib.suppress(OSError):
                if self._properties_file.read_text(encoding="utf-8") == self._properties_text():
                    self._wait_ready(pid)
                    return True
        self._halt(30)
        return False

    def _format(self, java: Path, jars: Path) -> None:
        self._progress("formatting Kafka's storage (a few seconds, once)")
        # Kafka's ids are 16 bytes in URL-safe base64; a leading "-" would be taken for an option.
        cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "A", 1)
        arguments = ["format", "--ignore-formatted", f"--cluster-id={cluster_id}"]
        command = self._command(java, jars, "kafka.tools.StorageTool", *arguments)
        with self.log_file.open("ab") as log:
            try:
                subprocess.run(
                    [*command, f"--config={self._properties_file}"],
                    check=True,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self._data_dir,
                    env=_environment(),
                    timeout=self._start_timeout_s,
                )
            except subprocess.CalledProcessError as error:
                reason = f"formatting its storage ended with {error.returncode}"
                raise KafkaStartFailed(reason, self.log_file) from error
            except (subprocess.TimeoutExpired, OSError) as error:
                reason = f"its storage could not be formatted ({type(error).__name__})"
                raise KafkaStartFailed(reason, self.log_file) from error

    def _launch(self, java: Path, jars: Path) -> None:
        with self.log_file.open("ab") as log:
            try:
                self._process = subprocess.Popen(
                    self._command(java, jars, "kafka.Kafka", str(self._properties_file)),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self._data_dir,  # by which it is recognised
                    env=_environment(),
                    # Ctrl-C in a terminal is for the caller, who stops things in order.
                    start_new_session=True,
                )
            except OSError as error:
                raise KafkaStartFailed(f"it could not be run: {error}", self.log_file) from error
        self._wait_ready(self._process.pid)

    def _command(self, java: Path, jars: Path, main: str, *arguments: str) -> list[str]:
        return [
            str(java),
            f"-Xmx{self._heap_mb}m",
            "-Xms64m",
            # Collectors that work in parallel reserve threads and memory that a small heap cannot repay.
            "-XX:+UseSerialGC",
            "-XX:+ExitOnOutOfMemoryError",
            "-Djava.awt.headless=true",
            "-Djava.net.preferIPv4Stack=true",
            f"-Dlog4j2.configurationFile={_LOG4J.as_uri()}",
            "-cp",
            f"{jars}/*",
            main,
            *arguments,
        ]

    def _wait_ready(self, pid: int) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        while time.monotonic() < deadline:
            ended = self._process.poll() if self._process and self._process.pid == pid else None
            if ended is not None or not processes.is_alive(pid):
                self._reap()
                raise KafkaStartFailed(f"it ended with {ended}", self.log_file)
            if serves(self.port):
                return
            time.sleep(_POLL_S)
        self.kill()  # left running it would hold the directory against the next attempt
        raise KafkaStartFailed(f"it was not ready within {self._start_timeout_s:.0f} s", self.log_file)

    # -- configuration

    @property
    def _properties_file(self) -> Path:
        return self._data_dir / "server.properties"

    def _properties_text(self) -> str:
        assert self._ports is not None
        return render(self._properties, self._ports)

    def _choose_ports(self, *, fresh: bool) -> tuple[int, int]:
        recorded = None if fresh else self._recorded_ports()
        broker, controller = recorded or (free_port(), free_port())
        if self._wanted_port is not None:
            broker = self._wanted_port
        elif not is_free(broker):
            broker = free_port()
        while controller == broker or not is_free(controller):
            controller = free_port()
        return broker, controller

    def _recorded_ports(self) -> tuple[int, int] | None:
        with contextlib.suppress(OSError, ValueError):
            broker, controller = (self._data_dir / "ports").read_text().split()
            return int(broker), int(controller)
        return None

    # -- processes

    def _halt(self, timeout_s: float) -> None:
        pid = self.pid
        if pid is not None:
            processes.send(pid, signal.SIGTERM)
            if not processes.wait_gone(pid, timeout_s):
                self._progress("Kafka does not stop in time: killing it")
        self.kill()

    def _reap(self) -> None:
        """Collect our child, which has ended or is ending."""
        if self._process is not None:
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired as error:
                raise StopFailed(f"process {self._process.pid} of {self._data_dir} does not end") from error
            self._process = None


def _environment() -> dict[str, str]:
    # Java takes the encoding of file names from the locale and cannot open what its own cannot spell.
    return {**os.environ, "LC_ALL": "C.UTF-8"}
