"""Everything the demo runs on, started in order and stopped in reverse."""

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from demo.processes import StackProcess
from embedded.ports import LOOPBACK, free_port, is_free
from embedded.postgres import EmbeddedPostgres
from storage.maintenance import MaintenanceOptions, maintain
from storage.migrations import migrate

DATABASE = "atlasco"
# Where the README and --help say that the gateway is.
_USUAL_PORT = 7070


class Stack:
    """PostgreSQL and a gateway, below a data directory that survives restarts.

    `dsn`: an external PostgreSQL instead of the embedded one. `progress` is told what is being done.
    """

    def __init__(self, data_dir: Path, *, dsn: str = "", progress: Callable[[str], None]) -> None:
        self.data_dir = data_dir
        self.dsn = dsn
        self.target = ""
        self._progress = progress
        self._resources = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as resources:
            if not self.dsn:
                self._progress("starting PostgreSQL")
                postgres = EmbeddedPostgres(self.data_dir / "postgres", progress=self._progress)
                resources.callback(postgres.stop)
                postgres.start()
                postgres.ensure_database(DATABASE)
                self.dsn = postgres.dsn(dbname=DATABASE)
            self._progress("bringing the schema up to date")
            asyncio.run(migrate(self.dsn, progress=self._progress))
            asyncio.run(maintain(self.dsn, MaintenanceOptions()))
            self._progress("starting the gateway")
            port = _USUAL_PORT if is_free(_USUAL_PORT) else free_port()
            self.target = f"{LOOPBACK}:{port}"
            self.gateway = StackProcess(
                "gateway",
                ["serve"],
                {"ATLASCO_DSN": self.dsn, "ATLASCO_LISTEN": self.target, "ATLASCO_REGISTER_TENANTS": "true"},
                self.data_dir / "logs" / "gateway.log",
            )
            resources.callback(self.gateway.stop)
            self.gateway.start()
            self._resources = resources.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()
