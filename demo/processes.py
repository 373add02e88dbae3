"""Processes of the stack: started as an operator would start them, watched until ready, stopped in order."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from embedded.ports import free_port

_READY_DEADLINE_S = 60.0
_STOP_DEADLINE_S = 60.0
_ASK_S = 2.0


class ProcessFailed(Exception):
    """A process of the stack ended, or did not become ready; the text ends with the last lines of its log."""


class StackProcess:
    """One `atlasco` command as a process of its own, with an admin port on loopback."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log_file: Path) -> None:
        self.name = name
        self.log_file = log_file
        self.admin_port = free_port()
        self._command = [sys.executable, "-m", "cli.main", *command]
        self._environment = {
            **os.environ,
            **environment,
            "ATLASCO_ADMIN_LISTEN": f"127.0.0.1:{self.admin_port}",
            "ATLASCO_LOG_FORMAT": "json",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process and wait until its admin port says that it is ready.

        Raises:
            ProcessFailed: it ended, or was not ready within a minute.
        """
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as log:
            # A session of its own: Ctrl-C in the terminal is for the demo, which stops the others in order.
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + _READY_DEADLINE_S
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise ProcessFailed(self._failure("did not become ready"))
            time.sleep(0.05)

    def check(self) -> None:
        """Make sure that the process still runs.

        Raises:
            ProcessFailed: it ended.
        """
        if self._process is not None and self._process.poll() is not None:
            raise ProcessFailed(self._failure(f"ended with exit code {self._process.returncode}"))

    def stop(self) -> None:
        """Ask the process to end and wait until it has; a process that does not is killed."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def metrics(self) -> dict[str, float]:
        """The process's metrics: sums over their labels, by sample name. Empty while it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.admin_port}/metrics", timeout=_ASK_S) as answer:
                text = answer.read().decode()
        except OSError:
            return {}
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        return sums

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.admin_port}/readyz", timeout=_ASK_S) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _failure(self, what: str) -> str:
        tail = self.log_file.read_text(errors="replace").splitlines()[-5:]
        return f"{self.name} {what}; the end of {self.log_file}:\n" + "\n".join(tail)
