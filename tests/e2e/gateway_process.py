"""A gateway as a process of its own, to be killed."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

from embedded.ports import free_port
from tests.storage.conftest import Database

ROOT = Path(__file__).parents[2]
_SERVE = "import sys; from cli.main import main; sys.exit(main(['serve']))"


class GatewayProcess:
    """`atlasco serve` on a port that stays the same over restarts."""

    def __init__(self, database: Database, log: Path, **settings: str) -> None:
        self.port = free_port()
        self.admin_port = free_port()
        self._log = log
        self._environment = {
            **os.environ,
            "ATLASCO_DSN": database(user="test_ingest"),
            "ATLASCO_QUERY_DSN": database(user="test_query"),
            "ATLASCO_LISTEN": f"127.0.0.1:{self.port}",
            "ATLASCO_ADMIN_LISTEN": f"127.0.0.1:{self.admin_port}",
            "ATLASCO_REGISTER_TENANTS": "true",
            **settings,
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and wait until it is ready."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SERVE], cwd=ROOT, env=self._environment, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 60
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the gateway did not start:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.05)

    def _ready(self) -> bool:
        try:
            return bool(json.loads(self.admin("readyz"))["ready"])
        except OSError:
            return False

    def admin(self, path: str) -> str:
        """What the admin port says."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin_port}/{path}", timeout=5) as answer:
            return str(answer.read().decode())

    def kill(self) -> None:
        """As a power failure would."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(10)

    def terminate(self) -> None:
        """Ask it to end."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)

    def wait(self, deadline_s: float = 40) -> int:
        """Its exit code."""
        assert self._process is not None
        return self._process.wait(deadline_s)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()
