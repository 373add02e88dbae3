"""Everything the demo runs on, started in order and stopped in reverse."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from demo.databases import Databases, start_databases
from embedded.errors import JarsUnresolved, JavaMissing, MavenMissing, ProcessFailed
from embedded.kafka import EmbeddedKafka
from embedded.ports import LOOPBACK, free_port
from embedded.program import Program
from embedded.replica import StreamingReplica
from storage.warehouse.local import LocalWarehouse

# The default of a minute suits a warehouse of large files; somebody who watches wants to see it move.
_LOAD_AGE = "2s"


@dataclass(frozen=True, slots=True)
class Pipeline:
    """From the outbox to the warehouse: what runs only where Java does."""

    kafka: EmbeddedKafka
    relay: Program
    loader: Program
    warehouse: LocalWarehouse
    directory: Path


class Stack:
    """PostgreSQL, a replica, a gateway, the rollup worker and the pipeline to a local warehouse.

    All of it lies below a data directory that survives restarts. `dsn`: an external PostgreSQL instead of the embedded
    one; there is no replica then. `port`: the gateway's; a free one by default. `progress` is told what is being done.
    `pipeline` is None, and `missing` says why, on a machine that cannot run Kafka: ingest, queries and rollups then
    work without it.
    """

    gateway: Program
    rollup: Program

    def __init__(
        self, data_dir: Path, *, dsn: str = "", port: int | None = None, progress: Callable[[str], None]
    ) -> None:
        self.data_dir = data_dir
        self.dsn = dsn
        self.target = f"{LOOPBACK}:{port or free_port()}"
        self.replica: StreamingReplica | None = None
        self.pipeline: Pipeline | None = None
        self.missing = ""
        self._progress = progress
        self._resources = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as resources:
            databases = start_databases(resources, self.data_dir, self.dsn, self._progress)
            self.dsn, self.replica = databases.dsn, databases.replica
            try:
                with ExitStack() as parts:
                    self.pipeline = self._start_pipeline(parts)
                    resources.push(parts.pop_all())
            except (JavaMissing, MavenMissing, JarsUnresolved) as error:
                self.missing = str(error)
                self._progress(f"without Kafka and the warehouse: {error}")
            self._progress("starting the rollup worker")
            self.rollup = self._start(resources, "rollup", ["rollup"], {"ATLASCO_DSN": databases.rollup_dsn})
            # The last to start is the first to stop: nothing is taken in any more while the rest ends.
            self._start_gateway(resources, databases)
            self._resources = resources.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()

    @property
    def processes(self) -> list[Program]:
        """The `atlasco` processes, in the order of the flow."""
        pipeline = [self.pipeline.relay, self.pipeline.loader] if self.pipeline is not None else []
        return [self.gateway, *pipeline, self.rollup]

    def check(self) -> None:
        """Make sure that every process still runs.

        Raises:
            ProcessFailed: one ended.
        """
        for process in self.processes:
            process.check()
        if self.replica is not None and not self.replica.is_running:
            raise ProcessFailed(f"the replica ended, see {self.replica.log_file}")

    def metrics(self) -> dict[str, float]:
        """The metrics of all processes, summed by name. Without those of one that does not answer."""
        found: dict[str, float] = {}
        for process in self.processes:
            # Every process shows every counter, at 0 where it does not count: hence sums.
            for name, value in process.metrics().items():
                found[name] = found.get(name, 0.0) + value
        return found

    def _start_gateway(self, resources: ExitStack, databases: Databases) -> None:
        self._progress("starting the gateway")
        settings = {
            "ATLASCO_LISTEN": self.target,
            "ATLASCO_REGISTER_TENANTS": "true",
            "ATLASCO_QUERY_DSN": databases.query_dsn,
            "ATLASCO_REPLICA_DSNS": databases.replica_dsn,
        }
        if self.pipeline is not None:
            settings["ATLASCO_WAREHOUSE_DIR"] = str(self.pipeline.directory)
        self.gateway = self._start(resources, "gateway", ["serve"], settings)

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
        return Pipeline(kafka, relay, loader, warehouse, directory)

    def _start(self, resources: ExitStack, name: str, command: list[str], own: dict[str, str]) -> Program:
        settings = {"ATLASCO_DSN": self.dsn, "ATLASCO_LOG_FORMAT": "json", **own}
        log_file = self.data_dir / "logs" / f"{name}.log"
        process = Program(name, ["cli.main", *command], settings, log_file)
        resources.callback(process.stop)
        process.start()
        return process
