"""A long history: devices with twenty attributes, each read every five minutes, in the real schema.

The rows lie as ingest would have left them: in the order of time, devices in turn, each device's attributes side by
side. So the readings of one series lie far apart, a page or more for each, as they do in life; rows in the order of
the key would make series ten times cheaper to read than they are. To be fast, each partition is taken out, filled
without its index by two processes, indexed, and put back; what then stands there is what the schema makes.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from typing import Any

import numpy as np
import psycopg
from psycopg import sql

from bench.kept import Say
from bench.stack import INGEST_LOGIN, ROLLUP_LOGIN, Stack
from bench.workload import ENTITY_TYPE, TENANT, all_attributes, device_name
from runtime.metrics import NullMetrics
from storage.binary import COPY_COLUMNS, copy_rows
from storage.database import PoolSettings, Role, make_pool
from storage.model import Columns, ValueType
from storage.partitions import HistoryCoverage, tenant_slot
from storage.rollup.config import RollupConfig
from storage.rollup.declare import create_rollup
from storage.rollup.service import rollup_pool
from storage.rollup.worker import Worker
from storage.times import DAY_US

SAMPLE_US = 300_000_000
"""Between two readings of a series, microseconds."""

ROLLED = "attribute-00"
"""The attribute that has a rollup."""

VALUE_TYPES = {
    "DOUBLE": ValueType.DOUBLE,
    "INT64": ValueType.BIGINT,
    "BOOL": ValueType.BOOLEAN,
    "STRING": ValueType.TEXT,
}
_PROCESSES = 2
# Samples of half of the devices in one COPY.
_SAMPLES_PER_COPY = 6
_STATES = (b"running", b"idle", b"maintenance", b"fault: overheated")


@dataclass(frozen=True, slots=True)
class History:
    """So many readings of so many devices; `build` leaves them, with latest values and a rollup, in a database."""

    readings: int
    devices: int
    version: int = 1

    @property
    def database(self) -> str:
        """See `Content`."""
        return f"bench_history_{self.readings}_{self.devices}"

    @property
    def samples(self) -> int:
        """Readings of each series."""
        return max(1, self.readings // (self.devices * len(all_attributes())))

    def build(self, stack: Stack, say: Say) -> Mapping[str, Any]:
        """See `Content`."""
        end_us = time.time_ns() // 1000 // SAMPLE_US * SAMPLE_US
        start_us = end_us - self.samples * SAMPLE_US
        tenant, attributes = make_registry(
            stack, self.database, {a.name: VALUE_TYPES[a.type.name] for a in all_attributes()}
        )
        make_entities(stack, self.database, tenant, np.arange(self.devices), ENTITY_TYPE)
        days = np.arange(start_us // DAY_US, (end_us - 1) // DAY_US + 1)
        asyncio.run(_partitions(stack, self.database, tenant, days))
        say(f"{self.devices:,} devices, {self.samples} samples of {len(attributes)} attributes")
        context = get_context("spawn")
        with ProcessPoolExecutor(_PROCESSES, mp_context=context) as workers:
            for day in days.tolist():
                first, last = (
                    (min(max(at, start_us), end_us) - start_us) // SAMPLE_US
                    for at in (day * DAY_US, (day + 1) * DAY_US)
                )
                parts = [
                    _Part(
                        stack.dsn(self.database, "postgres"), tenant, attributes, self.devices, number, start_us,
                        first, last, leaf_suffix(tenant, day),
                    )
                    for number in range(_PROCESSES)
                ]  # fmt: skip
                self._fill_day(stack, tenant, day, parts, workers, say)
            list(workers.map(_copy_latest, [_Part.latest(part, self.samples) for part in parts]))
        say("latest values are there; a rollup")
        asyncio.run(_roll_up(stack, self.database, tenant))
        say("vacuum")
        with stack.admin(self.database) as connection:
            connection.execute("VACUUM (ANALYZE)")
        return {"start_us": start_us, "end_us": end_us}

    def _fill_day(
        self, stack: Stack, tenant: int, day: int, parts: Sequence["_Part"], workers: ProcessPoolExecutor, say: Say
    ) -> None:
        started = time.monotonic()
        with stack.admin(self.database) as connection:
            bounds = {}
            for value_type in ValueType:
                bounds[value_type] = _take_out(connection, value_type, parts[0].suffix)
            rows = sum(workers.map(_copy_day, parts))
            seconds = time.monotonic() - started
            say(f"{rows:,} readings of {_day(day)} at {rows / seconds:,.0f}/s; indexes")
            connection.execute("SET maintenance_work_mem = '768MB'")
            for value_type, bound in bounds.items():
                _put_back(connection, value_type, tenant, parts[0].suffix, bound)
        say(f"{_day(day)} is done in {time.monotonic() - started:.0f} s")


# -- the parts that a fleet has too -----------------------------------------------------------------------------------


def make_registry(
    stack: Stack, database: str, attributes: Mapping[str, ValueType]
) -> tuple[int, dict[str, tuple[int, ValueType]]]:
    """A tenant with attributes; returns its id, and theirs by name."""
    with stack.admin(database) as connection:
        tenant = _scalar(connection, "SELECT register_tenant(%s)", TENANT)
        ids = dict(
            connection.execute(
                "SELECT name, attribute_id FROM register_attributes(%s, %s, %s::attribute_type[], %s)",
                [tenant, list(attributes), [str(t) for t in attributes.values()], [""] * len(attributes)],
            ).fetchall()
        )
        connection.execute("SELECT ensure_outbox(now(), now() + interval '1 day')")
    return tenant, {name: (ids[name], value_type) for name, value_type in attributes.items()}


def make_entities(stack: Stack, database: str, tenant: int, names: "np.ndarray[Any, Any]", entity_type: str) -> None:
    """Devices with the ids 1, 2, …; `names` has their numbers in that order."""
    with stack.admin(database) as connection:
        with connection.cursor().copy(
            "COPY entities (tenant_id, entity_id, external_id, entity_type, labels) FROM STDIN"
        ) as copy:
            for at in range(0, len(names), 50_000):
                block = names[at : at + 50_000].tolist()
                copy.write(
                    "".join(
                        f'{tenant}\t{at + place}\t{device_name(name)}\t{entity_type}\t{{"site": "site-{name % 50}"}}\n'
                        for place, name in enumerate(block, 1)
                    )
                )
        connection.execute("SELECT setval(pg_get_serial_sequence('entities', 'entity_id'), %s)", [len(names) + 1])


def columns(tenant: int, entity: Any, attribute: Any, time_us: Any, value: Any) -> Columns:
    """Readings; what is not an array holds for all of them."""
    count = len(value)
    return Columns(
        np.full(count, tenant, np.int32),
        np.broadcast_to(np.asarray(entity, np.int64), count),
        np.broadcast_to(np.asarray(attribute, np.int32), count),
        np.broadcast_to(np.asarray(time_us, np.int64), count),
        value,
        np.zeros(count, np.int32),
        np.zeros(count, np.int32),
        np.zeros(count, np.bool_),
    )


def copy_latest(connection: psycopg.Connection[Any], value_type: ValueType, readings: Columns) -> None:
    """Store these as latest values."""
    _copy(connection, "latest_values", (*COPY_COLUMNS[:-1], f"{value_type}_value"), copy_rows(value_type, readings))


def leaf_suffix(tenant: int, day: int) -> str:
    """The ending of the names of a day's partitions, as ensure_history() makes it."""
    return f"s{tenant_slot(tenant)[0] >> 20:03}_{datetime.fromtimestamp(day * 86_400, UTC):%Y%m%d}"


# -- filling a day ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Part:
    """What one process writes of a day: the samples [first, last) of one half of the devices."""

    dsn: str
    tenant: int
    attributes: Mapping[str, tuple[int, ValueType]]
    devices: int
    number: int
    start_us: int
    first: int
    last: int
    suffix: str

    @classmethod
    def latest(cls, part: "_Part", samples: int) -> "_Part":
        return cls(
            part.dsn, part.tenant, part.attributes, part.devices, part.number, part.start_us, samples - 1, samples, ""
        )

    def readings(self, value_type: ValueType, first: int, last: int) -> Columns:
        """Its readings of one type, in the order of time."""
        ids = sorted(number for number, kind in self.attributes.values() if kind is value_type)
        edges = [self.devices * place // _PROCESSES for place in (self.number, self.number + 1)]
        entities = np.arange(edges[0], edges[1], dtype=np.int64) + 1
        size = len(entities) * len(ids)
        count = last - first
        return columns(
            self.tenant,
            np.tile(np.repeat(entities, len(ids)), count),
            np.tile(np.array(ids, np.int32), len(entities) * count),
            np.repeat(self.start_us + np.arange(first, last, dtype=np.int64) * SAMPLE_US, size),
            np.concatenate([self._values(value_type, sample, size) for sample in range(first, last)]),
        )

    def _values(self, value_type: ValueType, sample: int, count: int) -> "np.ndarray[Any, Any]":
        # Every sample has a generator of its own: the last one is made twice, for the latest values too.
        rng = np.random.default_rng([sample, self.number, list(ValueType).index(value_type)])
        match value_type:
            case ValueType.DOUBLE:
                return rng.normal(20.0, 5.0, count)
            case ValueType.BIGINT:
                return rng.integers(0, 100_000, count)
            case ValueType.BOOLEAN:
                return rng.random(count) < 0.1
            case _:
                return np.array(_STATES, object)[rng.integers(0, len(_STATES), count)]


def _copy_day(part: _Part) -> int:
    """Write one part of a day into its partitions, which have no index; returns the readings."""
    written = 0
    with psycopg.connect(part.dsn, autocommit=True) as connection:
        for first in range(part.first, part.last, _SAMPLES_PER_COPY):
            for value_type in ValueType:
                readings = part.readings(value_type, first, min(first + _SAMPLES_PER_COPY, part.last))
                leaf = f"entity_attributes_{value_type}_{part.suffix}"
                _copy(connection, leaf, COPY_COLUMNS, copy_rows(value_type, readings))
                written += len(readings)
    return written


def _copy_latest(part: _Part) -> None:
    with psycopg.connect(part.dsn, autocommit=True) as connection:
        for value_type in ValueType:
            copy_latest(connection, value_type, part.readings(value_type, part.first, part.last))


def _copy(connection: psycopg.Connection[Any], table: str, names: Sequence[str], data: bytes) -> None:
    statement = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT BINARY)").format(
        sql.Identifier(table), sql.SQL(", ").join(map(sql.Identifier, names))
    )
    with connection.cursor().copy(statement) as copy:
        copy.write(data)


def _take_out(connection: psycopg.Connection[Any], value_type: ValueType, suffix: str) -> str:
    """Detach a leaf and drop its key; returns its bounds."""
    leaf, parent = _names(value_type, suffix)
    bound: str = _scalar(
        connection, "SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE oid = %s::regclass", leaf
    )
    connection.execute(sql.SQL("ALTER TABLE {} DETACH PARTITION {}").format(*map(sql.Identifier, (parent, leaf))))
    connection.execute(
        sql.SQL("ALTER TABLE {} DROP CONSTRAINT {}").format(*map(sql.Identifier, (leaf, f"{leaf}_pkey")))
    )
    return bound


def _put_back(connection: psycopg.Connection[Any], value_type: ValueType, tenant: int, suffix: str, bound: str) -> None:
    leaf, parent = _names(value_type, suffix)
    connection.execute(
        sql.SQL("ALTER TABLE {} ADD PRIMARY KEY (tenant_id, entity_id, attribute_id, ts)").format(sql.Identifier(leaf))
    )
    # The bounds come from the catalog, where they stood before.
    connection.execute(
        sql.SQL("ALTER TABLE {} ATTACH PARTITION {} {}").format(
            sql.Identifier(parent), sql.Identifier(leaf), sql.SQL(bound)
        )
    )


def _names(value_type: ValueType, suffix: str) -> tuple[str, str]:
    leaf = f"entity_attributes_{value_type}_{suffix}"
    return leaf, leaf.rpartition("_")[0]


async def _partitions(stack: Stack, database: str, tenant: int, days: "np.ndarray[Any, Any]") -> None:
    pool = make_pool(PoolSettings(stack.dsn(database, INGEST_LOGIN), Role.INGEST, max_size=1))
    await pool.open()
    try:
        await HistoryCoverage(pool).ensure(tenant, days)
    finally:
        await pool.close()


async def _roll_up(stack: Stack, database: str, tenant: int) -> None:
    """Declare a rollup and have a worker fill it."""
    owner = make_pool(PoolSettings(stack.dsn(database, "postgres"), Role.MAINTAIN, max_size=1))
    await owner.open()
    try:
        await create_rollup(owner, tenant, "bench", [ROLLED])
    finally:
        await owner.close()
    await fill_all(stack, database)


async def fill_all(stack: Stack, database: str) -> None:
    """Have a worker fill every rollup and projection that is declared."""
    dsn = stack.dsn(database, ROLLUP_LOGIN)
    pool = rollup_pool(dsn)
    await pool.open()
    try:
        worker = Worker(pool, 1, RollupConfig(dsn=dsn), NullMetrics())
        await worker.adopt()
        while await worker.turn():
            pass
    finally:
        await pool.close()


def _day(day: int) -> str:
    return f"{datetime.fromtimestamp(day * 86_400, UTC):%Y-%m-%d}"


def _scalar(connection: psycopg.Connection[Any], statement: str, *parameters: object) -> Any:
    row = connection.execute(statement.encode(), parameters).fetchone()
    assert row is not None
    return row[0]
