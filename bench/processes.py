"""Programs of the platform as processes of their own: started, asked how they are doing, stopped the polite way."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from prometheus_client.parser import text_string_to_metric_families

from bench.errors import BenchmarkVoid
from embedded.ports import free_port

_READY_S = 60.0
_STOP_S = 60.0
_ASK_S = 2.0
# Settings of the shell it is run from must not change what is measured.
_OURS = ("ATLASCO_", "KAFKA_")


class Process:
    """A Python module run with an admin port; started and stopped by `with`. `wait_ready` is for the caller."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log_file: Path) -> None:
        self._name = name
        self._command = [sys.executable, "-m", *command]
        self._admin = f"127.0.0.1:{free_port()}"
        self._environment = {key: value for key, value in os.environ.items() if not key.startswith(_OURS)}
        self._environment |= {**environment, "ATLASCO_ADMIN_LISTEN": self._admin}
        self._log_file = log_file

    def __enter__(self) -> Self:
        with self._log_file.open("ab") as log:
            self._process = subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=log)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def check(self) -> None:
        """Raises BenchmarkVoid when it has ended."""
        if self._process.poll() is not None:
            raise BenchmarkVoid(f"the {self._name} ended: {self._log_tail()}")

    def wait_ready(self) -> None:
        """Wait until it says that it is ready. Raises BenchmarkVoid."""
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline:
            self.check()
            if self._ask("readyz") is not None:
                return
            time.sleep(0.05)
        raise BenchmarkVoid(f"the {self._name} was not ready within {_READY_S:.0f} s: {self._log_tail()}")

    def metrics(self) -> dict[str, float]:
        """Its metrics, summed over their labels, by sample name; empty while it does not answer."""
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(self._ask("metrics") or ""):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        return sums

    def _ask(self, what: str) -> str | None:
        try:
            with urllib.request.urlopen(f"http://{self._admin}/{what}", timeout=_ASK_S) as answer:
                return str(answer.read().decode())
        except (urllib.error.URLError, OSError):
            return None

    def _log_tail(self) -> str:
        return self._log_file.read_text(errors="replace")[-2000:]
