"""What the tests of the router share: the pair of servers, writing and reading."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from typing import Any

import grpc
import psutil
import psycopg
import pytest
from atlasco.telemetry.v1 import common_pb2, ingest_pb2, ingest_pb2_grpc, query_pb2, query_pb2_grpc
from psycopg import sql

from embedded.cluster import PostgresCluster
from embedded.postgres import EmbeddedPostgres
from embedded.replica import StreamingReplica
from storage.warehouse.cancellation import Cancellation
from storage.warehouse.port import Warehouse
from storage.warehouse.reader import WarehouseReader
from tests.waiting import PATIENCE_S, until

DATABASE = "routed"
ATTRIBUTE = "stamp"
LOGINS = {"test_ingest": "atlasco_ingest", "test_query": "atlasco_query"}

PRIMARY = query_pb2.Provenance.SOURCE_PRIMARY
REPLICA = query_pb2.Provenance.SOURCE_REPLICA

DRIVER_WARNINGS = [
    pytest.mark.filterwarnings(r"ignore:ssl\.:DeprecationWarning"),
    # Connections that the driver leaves to the garbage collector.
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <(ssl.SSLS|socket.s)ocket:pytest.PytestUnraisableExceptionWarning"
    ),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]
"""What Redshift's driver makes Python warn of: it makes its TLS context the old way."""


@dataclass
class Pair:
    """A primary with its replica."""

    primary: EmbeddedPostgres
    replica: StreamingReplica
    name: str = DATABASE

    @property
    def replica_dsn(self) -> str:
        return self.replica.dsn(self.name, "test_query")

    def catch_up(self) -> None:
        self.replica.wait_caught_up(PATIENCE_S)

    def pause_replay(self) -> None:
        self.replica.pause_replay(PATIENCE_S)


def prepared(server: EmbeddedPostgres, name: str = DATABASE) -> None:
    """A database with the schema, and the login roles."""
    server.ensure_database(name)
    with psycopg.connect(server.dsn(name), autocommit=True) as connection:
        connection.execute(resources.files("storage").joinpath("sql", "schema.sql").read_bytes())
        for login, group in LOGINS.items():
            server.ensure_login(login)
            connection.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(group), sql.Identifier(login)))


@contextmanager
def hanging(server: PostgresCluster) -> Iterator[None]:
    """Within the block, the server and all its processes are there and do nothing: connections are not even refused."""
    postmaster = psutil.Process(server.pid)
    stopped = [postmaster]
    postmaster.suspend()
    try:
        for process in postmaster.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.suspend()
                stopped.append(process)
        yield
    finally:
        for process in stopped:
            # A child that ended before it was stopped is there until the postmaster goes on and reaps it.
            with suppress(psutil.NoSuchProcess):
                process.resume()


def metadata(tenant: str) -> list[tuple[str, str]]:
    return [("atlasco-tenant", tenant), ("atlasco-service", "checker")]


async def write(
    channel: grpc.aio.Channel, tenant: str, device: str, value: int, *, time_us: int | None = None
) -> bytes:
    """One reading, acked; its read token."""
    request = ingest_pb2.WriteBatchRequest(
        request_id=os.urandom(16),
        aliases=[ingest_pb2.AliasDefinition(alias=1, name=ATTRIBUTE, type=common_pb2.ATTRIBUTE_TYPE_INT64)],
        devices=[
            ingest_pb2.DeviceReadings(
                device_id=device,
                readings=ingest_pb2.Readings(
                    base_time_us=time_us or time.time_ns() // 1000,
                    int64s=ingest_pb2.Int64Column(aliases=[1], values=[value]),
                ),
            )
        ],
    )
    stub: Any = ingest_pb2_grpc.IngestServiceStub(channel)
    answer = await stub.WriteBatch(request, metadata=metadata(tenant), timeout=PATIENCE_S)
    assert not answer.rejections
    return bytes(answer.read_token)


async def ask(channel: grpc.aio.Channel, tenant: str, request: Any, *, timeout_s: float = PATIENCE_S) -> Any:
    """The answer; the method follows from the request's type."""
    stub: Any = query_pb2_grpc.QueryServiceStub(channel)
    method = getattr(stub, type(request).__name__.removesuffix("Request"))
    return await method(request, metadata=metadata(tenant), timeout=timeout_s)


async def latest(channel: grpc.aio.Channel, tenant: str, device: str, **freshness: Any) -> Any:
    request = query_pb2.GetLatestRequest(entity=device, freshness=query_pb2.Freshness(explain=True, **freshness))
    return await ask(channel, tenant, request)


async def latest_of_replica(channel: grpc.aio.Channel, tenant: str, device: str, **freshness: Any) -> Any:
    """The first answer that is the replica's: one that has not begun within a second is another source's."""
    answers: list[Any] = []

    async def answered() -> bool:
        answers.append(await latest(channel, tenant, device, **freshness))
        return bool(answers[-1].provenance.source == REPLICA)

    await until(answered, "an answer of the replica")
    return answers[-1]


def value_of(answer: Any) -> int:
    (value,) = answer.latest.values
    return int(value.value.int64_value)


def reader_of(warehouse: Warehouse) -> WarehouseReader:
    """A reader of questions that nobody gives up."""
    return WarehouseReader(warehouse, Cancellation())
