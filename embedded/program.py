"""A program with an admin port as a child process: started, watched until ready, asked how it is doing, stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from prometheus_client.parser import text_string_to_metric_families

from embedded.errors import ProcessFailed, tail
from embedded.ports import LOOPBACK, free_port

_READY_DEADLINE_S = 60.0
_STOP_DEADLINE_S = 60.0
_ASK_S = 2.0
_LOG_LINES = 5


class Program:
    """A Python module as a process of its own, with an admin port on loopback that stays the same over restarts.

    `command`: the module and its arguments. `settings` are put over what is `inherited` of the environment. In a `with`
    block it is started, without waiting until it is ready, and stopped at the end.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        settings: Mapping[str, str],
        log_file: Path,
        *,
        inherited: Mapping[str, str] = os.environ,
    ) -> None:
        self.name = name
        self.log_file = log_file
        self._admin = f"{LOOPBACK}:{free_port()}"
        self._command = [sys.executable, "-m", *command]
        self._environment = {**inherited, **settings, "ATLASCO_ADMIN_LISTEN": self._admin}
        self._process: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        """Start the process and return at once."""
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as log:
            # A session of its own: Ctrl-C in the terminal is for the caller, who stops things in order.
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait_ready(self) -> None:
        """Wait until its admin port says that it is ready.

        Raises:
            ProcessFailed: it ended, or was not ready within a minute.
        """
        deadline = time.monotonic() + _READY_DEADLINE_S
        while not self._ready():
            if self._running().poll() is not None or time.monotonic() > deadline:
                raise ProcessFailed(self._failure("did not become ready"))
            time.sleep(0.05)

    def start(self) -> None:
        """Start the process and wait until it is ready.

        Raises:
            ProcessFailed: it ended, or was not ready within a minute.
        """
        self.launch()
        self.wait_ready()

    def check(self) -> None:
        """Make sure that the process still runs, unless it was stopped.

        Raises:
            ProcessFailed: it ended.
        """
        if self._process is not None and self._process.poll() is not None:
            raise ProcessFailed(self._failure(f"ended with exit code {self._process.returncode}"))

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._running().pid

    def terminate(self) -> None:
        """Ask the process to end."""
        self._running().terminate()

    def wait(self, deadline_s: float = _STOP_DEADLINE_S) -> int:
        """Wait until the process has ended; returns its exit code. Raises subprocess.TimeoutExpired."""
        return self._running().wait(deadline_s)

    def stop(self) -> None:
        """Ask the process to end and wait until it has; a process that does not is killed."""
        if self._process is None:
            return
        self.terminate()
        try:
            self.wait()
        except subprocess.TimeoutExpired:
            self.kill()
        self._process = None

    def kill(self) -> None:
        """End the process as a power failure would."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process = None

    def __enter__(self) -> Self:
        self.launch()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def ask(self, path: str) -> str:
        """What the admin port says. Raises OSError when it does not answer, or with an error."""
        with urllib.request.urlopen(f"http://{self._admin}/{path}", timeout=_ASK_S) as answer:
            return str(answer.read().decode())

    def metrics(self) -> dict[str, float]:
        """The process's metrics: sums over their labels, by sample name. Empty while it does not answer."""
        try:
            text = self.ask("metrics")
        except OSError:
            return {}
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        return sums

    def _ready(self) -> bool:
        try:
            self.ask("readyz")
        except OSError:
            return False
        return True

    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, f"{self.name} was not started"
        return self._process

    def _failure(self, what: str) -> str:
        return f"{self.name} {what}; the end of {self.log_file}:\n" + "\n".join(tail(self.log_file, _LOG_LINES))
