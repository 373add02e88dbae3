"""A gateway as a process of its own, to be killed."""

from pathlib import Path

from embedded.ports import LOOPBACK, free_port
from embedded.program import Program
from tests.storage.conftest import Database


class GatewayProcess(Program):
    """`atlasco serve` on a port that stays the same over restarts; by default one of its own."""

    def __init__(self, database: Database, log: Path, target: str = "") -> None:
        self.target = target or f"{LOOPBACK}:{free_port()}"
        settings = {
            "ATLASCO_DSN": database(user="test_ingest"),
            "ATLASCO_QUERY_DSN": database(user="test_query"),
            "ATLASCO_LISTEN": self.target,
            "ATLASCO_REGISTER_TENANTS": "true",
        }
        super().__init__("gateway", ["cli.main", "serve"], settings, log)
