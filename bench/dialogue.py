"""A process of the benchmark that is talked with, one JSON line at a time."""

import json
import subprocess
import sys
from typing import Any, Self

_END_S = 30.0


class Dialogue:
    """A module run as a process of its own; its input ends, and with it the process, when the block is left."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._command = [sys.executable, "-m", module, *arguments]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def tell(self, what: Any) -> None:
        """Tell it one thing."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any] | None:
        """Wait for the next thing it says; None when it has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        told: dict[str, Any] | None = json.loads(line) if line else None
        return told
