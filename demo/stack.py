"""Everything the demo runs on, started in order and stopped in reverse."""

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from demo.processes import StackProcess
from embedded.errors import JarsUnresolved, JavaMissing, MavenMissing
from embedded.kafka import EmbeddedKafka
from embedded.ports import LOOPBACK, free_port, is_free
from embedded.postgres import EmbeddedPostgres
from storage.maintenance import MaintenanceOptions, maintain
from storage.migrations import migrate
from storage.warehouse.local import LocalWarehouse

DATABASE = "atlasco"
# Where the README and --help say that the gateway is.
_USUAL_PORT = 7070
# The default of a minute suits a warehouse of large files; somebody who watches wants to see it move.
_LOAD_AGE = "2s"


@dataclass(frozen=True, slots=True)
class Pipeline:
    """From the outbox to the warehouse: what runs only where Java does."""

    kafka: EmbeddedKafka
    relay: StackProcess
    loader: StackProcess
    warehouse: LocalWarehouse


class Stack:
    """PostgreSQL, a gateway and the pipeline to a local warehouse, below a data directory that survives restarts.

    `dsn`: an external PostgreSQL instead of the embedded one. `progress` is told what is being done. `pipeline` is
    None, and `missing` says why, on a machine that cannot run Kafka: ingest and queries then work without it.
    """

    def __init__(self, data_dir: Path, *, dsn: str = "", progress: Callable[[str], None]) -> None:
        self.data_dir = data_dir
        self.dsn = dsn
        self.target = ""
        self.pipeline: Pipeline | None = None
        self.missing = ""
        self._progress = progress
        self._resources = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as resources:
            self._start_database(resources)
            self._start_gateway(resources)
            try:
                self.pipeline = self._start_pipeline(resources)
            except (JavaMissing, MavenMissing, JarsUnresolved) as error:
                self.missing = str(error)
                self._progress(f"without Kafka and the warehouse: {error}")
            self._resources = resources.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()

    def check(self) -> None:
        """Make sure that every process still runs.

        Raises:
            ProcessFailed: one ended.
        """
        self.gateway.check()
        if self.pipeline is not None:
            self.pipeline.relay.check()
            self.pipeline.loader.check()

    def metrics(self) -> dict[str, float]:
        """The metrics of all processes, summed by name. Without those of one that does not answer."""
        processes = [self.gateway]
        if self.pipeline is not None:
            processes += [self.pipeline.relay, self.pipeline.loader]
        found: dict[str, float] = {}
        for process in processes:
            # Every process shows every counter, at 0 where it does not count: hence sums.
            for name, value in process.metrics().items():
                found[name] = found.get(name, 0.0) + value
        return found

    def _start_database(self, resources: ExitStack) -> None:
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

    def _start_gateway(self, resources: ExitStack) -> None:
        self._progress("starting the gateway")
        port = _USUAL_PORT if is_free(_USUAL_PORT) else free_port()
        self.target = f"{LOOPBACK}:{port}"
        self.gateway = self._start(
            resources, "gateway", ["serve"], {"ATLASCO_LISTEN": self.target, "ATLASCO_REGISTER_TENANTS": "true"}
        )

    def _start_pipeline(self, resources: ExitStack) -> Pipeline:
        self._progress("starting Kafka")
        kafka = EmbeddedKafka(self.data_dir / "kafka", progress=self._progress)
        resources.callback(kafka.stop)
        kafka.start()
        directory = self.data_dir / "warehouse"
        brokers = {"KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap_servers}
        self._progress("starting the relay and the loader")
        relay = self._start(resources, "relay", ["relay"], brokers)
        warehouse = LocalWarehouse(directory, self.dsn)
        resources.callback(warehouse.close)
        warehouse.init()
        settings = {"ATLASCO_WAREHOUSE_DIR": str(directory), "ATLASCO_LOAD_AGE": _LOAD_AGE}
        loader = self._start(resources, "loader", ["load"], brokers | settings)
        return Pipeline(kafka, relay, loader, warehouse)

    def _start(self, resources: ExitStack, name: str, command: list[str], environment: dict[str, str]) -> StackProcess:
        log_file = self.data_dir / "logs" / f"{name}.log"
        process = StackProcess(name, command, {"ATLASCO_DSN": self.dsn, **environment}, log_file)
        resources.callback(process.stop)
        process.start()
        return process
