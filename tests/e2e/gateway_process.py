"""A gateway as a process of its own, to be killed."""

import time
from collections.abc import Mapping
from pathlib import Path

from embedded.ports import LOOPBACK, free_port
from embedded.program import Program
from tests.storage.conftest import Database
from tests.waiting import PATIENCE_S


class GatewayProcess(Program):
    """`atlasco serve` on a port that stays the same over restarts; by default one of its own."""

    def __init__(
        self, database: Database, log: Path, target: str = "", settings: Mapping[str, str] | None = None
    ) -> None:
        self.target = target or f"{LOOPBACK}:{free_port()}"
        own = {
            "ATLASCO_DSN": database(user="test_ingest"),
            "ATLASCO_QUERY_DSN": database(user="test_query"),
            "ATLASCO_LISTEN": self.target,
            "ATLASCO_REGISTER_TENANTS": "true",
        }
        super().__init__("gateway", ["cli.main", "serve"], {**own, **(settings or {})}, log)

    def ask(self, path: str) -> str:
        """As of any program, but one that does not answer for a while is asked again."""
        ends = time.monotonic() + PATIENCE_S
        while True:
            try:
                return super().ask(path)
            except OSError as error:
                slow = isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError)
                if not slow or time.monotonic() > ends:
                    raise
