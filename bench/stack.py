"""The server under test: PostgreSQL, fresh databases in it, and gateways on them."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from uuid import uuid4

import numpy as np
import psycopg
from psycopg import sql

from bench.errors import BenchmarkVoid
from bench.workload import ENTITY_TYPE, TENANT, all_attributes, device_name
from embedded.ports import free_port
from embedded.postgres import EmbeddedPostgres
from embedded.program import Program
from storage.database import PoolSettings, Role, make_pool
from storage.migrations import grant_logins, migrate
from storage.model import ValueType
from storage.outbox import ensure_outbox
from storage.partitions import HistoryCoverage
from storage.registry import AttributeWanted, Registry
from storage.times import DAY_US

INGEST_LOGIN = "bench_ingest"
QUERY_LOGIN = "bench_query"
RELAY_LOGIN = "bench_relay"
LOADER_LOGIN = "bench_loader"
ROLLUP_LOGIN = "bench_rollup"
_LOGINS = {
    "ingest": INGEST_LOGIN,
    "query": QUERY_LOGIN,
    "relay": RELAY_LOGIN,
    "loader": LOADER_LOGIN,
    "rollup": ROLLUP_LOGIN,
}
TEMPLATE = "bench_template"
# Devices that every fresh database knows already, with a stream that was opened once.
KNOWN_DEVICES = 200

_SHOWN = (
    "server_version",
    "fsync",
    "full_page_writes",
    "synchronous_commit",
    "wal_level",
    "shared_buffers",
    "max_wal_size",
)
# What an ack promises; a figure without them means nothing.
_MUST_BE_ON = ("fsync", "full_page_writes", "synchronous_commit")
# Settings of the shell it is run from must not change what is measured.
_OURS = ("ATLASCO_", "KAFKA_")
_FOLLOWED_S = 60.0
_FOLLOWED = "SELECT min(published_through) > now() - interval '2 seconds' FROM outbox_consumers"
_STORED_TYPES = {"DOUBLE": "double", "INT64": "bigint", "BOOL": "boolean", "STRING": "text"}


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway process that serves."""

    pid: int
    target: str


class Stack:
    """One PostgreSQL server. Blocking; `prepare` once, then `fresh_database` as often as needed.

    `settings` of the server beside those of every embedded one.
    """

    def __init__(self, directory: Path, settings: Mapping[str, str] = MappingProxyType({})) -> None:
        self.directory = directory
        self._postgres = EmbeddedPostgres(directory / "postgres", settings=settings)

    def __enter__(self) -> "Stack":
        self._postgres.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._postgres.stop()

    @property
    def postgres_pid(self) -> int:
        """The process id of the server's first process."""
        pid = self._postgres.pid
        if pid is None:
            raise BenchmarkVoid("PostgreSQL has stopped")
        return pid

    def dsn(self, database: str, user: str = INGEST_LOGIN) -> str:
        """Where a database is, for a login."""
        return self._postgres.dsn(database, user)

    def settings(self) -> dict[str, str]:
        """The server's settings, as it says itself.

        Raises BenchmarkVoid when one is off that durability depends on.
        """
        with self.admin() as connection:
            shown = {}
            for name in _SHOWN:
                row = connection.execute(sql.SQL("SHOW {}").format(sql.Identifier(name))).fetchone()
                assert row is not None
                shown[name] = str(row[0])
        for name in _MUST_BE_ON:
            if shown[name] != "on":
                raise BenchmarkVoid(f"{name} is {shown[name]}")
        return shown

    @contextmanager
    def admin(self, database: str = "postgres") -> Iterator[psycopg.Connection]:
        """A connection that may do everything, each statement a transaction."""
        with psycopg.connect(self._postgres.dsn(database), autocommit=True) as connection:
            yield connection

    async def prepare(self) -> None:
        """Make the template: the schema, a tenant, its attributes and devices, and partitions around today."""
        await self.make_schema(TEMPLATE)
        pool = make_pool(PoolSettings(self.dsn(TEMPLATE), Role.INGEST, max_size=2))
        await pool.open()
        try:
            registry = Registry(pool, register_tenants=True, clock=time.monotonic)
            tenant = await registry.tenant(TENANT)
            assert tenant is not None
            wanted = [AttributeWanted(a.name, ValueType(_STORED_TYPES[a.type.name])) for a in all_attributes()]
            await registry.attributes(tenant, wanted)
            for index in range(KNOWN_DEVICES):
                name = device_name(index)
                await registry.open_stream(tenant, name, ENTITY_TYPE, {}, uuid4(), most_unconfirmed=1)
            today = int(datetime.now(UTC).timestamp()) * 1_000_000 // DAY_US
            await HistoryCoverage(pool).ensure(tenant.tenant_id, np.arange(today - 1, today + 2, dtype=np.int64))
            await ensure_outbox(pool)
        finally:
            await pool.close()

    async def make_schema(self, database: str) -> None:
        """Make a database with the schema and nothing else, and the logins."""
        self._postgres.ensure_database(database)
        for login in _LOGINS.values():
            self._postgres.ensure_login(login)
        owner = self._postgres.dsn(database)
        await migrate(owner)
        await grant_logins(owner, {group: [login] for group, login in _LOGINS.items()})

    @contextmanager
    def fresh_database(self, name: str) -> Iterator[str]:
        """A new copy of the template, dropped afterwards; everything before it is on disk."""
        self.drop(name)
        with self.admin() as connection:
            connection.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(TEMPLATE))
            )
            connection.execute("CHECKPOINT")
        try:
            yield name
        finally:
            self.drop(name)

    def drop(self, name: str) -> None:
        """Drop a database if it is there."""
        with self.admin() as connection:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def program(self, name: str, command: Sequence[str], settings: Mapping[str, str]) -> Program:
        """A program of the platform with the default settings but for these, not yet started."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(_OURS)}
        return Program(name, command, settings, self.directory / f"{name}.log", inherited=inherited)

    @contextmanager
    def gateway(self, database: str) -> Iterator[Gateway]:
        """A gateway on a database, with the default settings; stopped afterwards, the polite way."""
        target = f"127.0.0.1:{free_port()}"
        settings = {
            "ATLASCO_DSN": self.dsn(database),
            "ATLASCO_QUERY_DSN": self.dsn(database, QUERY_LOGIN),
            "ATLASCO_LISTEN": target,
        }
        with self.program("gateway", ["bench.gateway_process"], settings) as process:
            process.wait_ready()
            yield Gateway(process.pid, target)

    @contextmanager
    def rollup(self, database: str) -> Iterator[Program]:
        """A worker that keeps rollups and projections; stopped afterwards."""
        settings = {"ATLASCO_DSN": self.dsn(database, ROLLUP_LOGIN)}
        with self.program("rollup", ["cli.main", "rollup"], settings) as process:
            process.wait_ready()
            self._wait_followed(database, process)
            yield process

    def _wait_followed(self, database: str, process: Program) -> None:
        """Wait until rollups and projections are complete up to the present. Raises BenchmarkVoid."""
        deadline = time.monotonic() + _FOLLOWED_S
        with self.admin(database) as connection:
            while connection.execute(_FOLLOWED).fetchone() != (True,):
                process.check()
                if time.monotonic() > deadline:
                    raise BenchmarkVoid("the rollup worker does not follow the outbox")
                time.sleep(0.05)
