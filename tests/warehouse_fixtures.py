"""What the tests of the loader and of the warehouses share: records of the log made by hand, and a database.

Readings in these tests are (tenant, entity, attribute, ts_us) -> value; the value's Python type decides the column.
"""

import itertools
import math
import tempfile
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import psycopg
from atlasco.telemetry.v1 import change_pb2, common_pb2
from psycopg import sql

from embedded.postgres import EmbeddedPostgres
from storage.loader.decode import CHANGES_SCHEMA, WATERMARK_SCHEMA, DecodedChanges, decode
from storage.model import ValueType
from storage.warehouse.batch import ChangeSet
from storage.warehouse.port import Warehouse

HOUR_US = 3_600_000_000
T0 = 1_750_000_000_000_000
"""Some moment, in microseconds."""

Key = tuple[int, int, int, int]
Reading = tuple[int, int, int, Any]
"""(entity, attribute, ts_us, value); value None: deleted."""

_databases = itertools.count(1)

_WIRE = {
    float: ("doubles", common_pb2.ATTRIBUTE_TYPE_DOUBLE),
    int: ("int64s", common_pb2.ATTRIBUTE_TYPE_INT64),
    bool: ("bools", common_pb2.ATTRIBUTE_TYPE_BOOL),
    str: ("strings", common_pb2.ATTRIBUTE_TYPE_STRING),
}


@dataclass
class Record:
    """A record of the log, as a producer takes it."""

    value: bytes
    headers: list[tuple[str, bytes]]
    key: bytes | None = None
    partition: int = 0


def change_record(
    readings: Iterable[Reading],
    *,
    tenant: int = 1,
    bucket: int = 0,
    batch_id: bytes | None = None,
    part: int = 0,
    revision: int = 0,
    revisions: list[int] | None = None,
    deletes: bool = False,
    gone: Collection[int] = (),
    of_type: type = float,
    xid: int | None = 100,
    lane: int = 0,
    partition: int = 0,
) -> Record:
    """A change record. Readings deleted have no value, so `of_type` says whose they are. `gone`: the devices that are
    gone themselves; it is a deletion then."""
    deletes = deletes or bool(gone)
    rows = list(readings)
    batch = change_pb2.ChangeBatch(
        batch_id=batch_id or uuid.uuid4().bytes,
        tenant_id=tenant,
        tenant=f"tenant-{tenant}",
        bucket=bucket,
        part=part,
        op=change_pb2.CHANGE_OP_DELETE if deletes else change_pb2.CHANGE_OP_UPSERT,
        base_time_us=min((ts for _, _, ts, _ in rows), default=T0),
    )
    entities = sorted({entity for entity, _, _, _ in rows} | set(gone))
    types = {attribute: of_type if deletes else type(value) for _, attribute, _, value in rows}
    for entity in entities:
        batch.entities.add(entity_id=entity, external_id=f"device-{entity}", gone=entity in gone)
    attributes = sorted(types)
    for attribute in attributes:
        batch.attributes.add(attribute_id=attribute, name=f"attribute-{attribute}", type=_WIRE[types[attribute]][1])
    given = revisions or [revision] * len(rows)
    for (entity, attribute, ts, value), number in zip(rows, given, strict=True):
        column = getattr(batch, _WIRE[types[attribute]][0])
        column.entities.append(entities.index(entity))
        column.attributes.append(attributes.index(attribute))
        column.time_deltas_us.append(ts - batch.base_time_us)
        if not deletes:
            column.values.append(value)
        if any(given):
            column.revisions.append(number)
    headers = [("kind", b"changes"), ("schema", CHANGES_SCHEMA), ("batch", batch.batch_id), ("lane", b"%d" % lane)]
    if xid is not None:
        headers.append(("xid", b"%d" % xid))
    return Record(batch.SerializeToString(), headers, b"%d:%d" % (tenant, bucket), partition)


def watermark_record(
    through_us: int, *, lane: int = 0, lanes: int = 1, partition: int = 0, partitions: int = 1, epoch: int = 1
) -> Record:
    """A watermark record."""
    mark = change_pb2.Watermark(
        lane=lane,
        lanes=lanes,
        partition=partition,
        partitions=partitions,
        complete_through_us=through_us,
        lease_epoch=epoch,
    )
    headers = [("kind", b"watermark"), ("schema", WATERMARK_SCHEMA), ("lane", b"%d" % lane)]
    return Record(mark.SerializeToString(), headers, None, partition)


def change_set(readings: Iterable[Reading], **options: Any) -> ChangeSet:
    """The decoded form of `change_record`."""
    record = change_record(readings, **options)
    decoded = decode(dict(record.headers), record.key, record.value)
    assert isinstance(decoded, DecodedChanges)
    return decoded.changes


def held(warehouse: Warehouse, relation: str = "entity_attributes") -> dict[Key, Any]:
    """Every reading in the warehouse; each once, or the test fails."""
    found: dict[Key, Any] = {}
    for value_type in ValueType:
        answer = warehouse.query(f"SELECT tenant_id, entity_id, attribute_id, ts, value FROM {relation}_{value_type}")
        for tenant, entity, attribute, ts, value in answer.rows:
            key = (tenant, entity, attribute, _us(ts))
            assert key not in found, f"{key} is there twice"
            found[key] = value
    return found


def resolved(warehouse: Warehouse) -> dict[Key, Any]:
    """The same, also of devices that are gone."""
    return held(warehouse, "resolved")


def _us(ts: Any) -> int:
    seconds = (ts - type(ts)(1970, 1, 1)).total_seconds()
    whole = math.floor(seconds)
    return whole * 1_000_000 + int(ts.microsecond)


def expected(*groups: Iterable[Reading], tenant: int = 1) -> dict[Key, Any]:
    """What `held` should say: later groups win; a value None is a deletion."""
    result: dict[Key, Any] = {}
    for group in groups:
        for entity, attribute, ts, value in group:
            if value is None:
                result.pop((tenant, entity, attribute, ts), None)
            else:
                result[tenant, entity, attribute, ts] = value
    return result


def doubles(
    count: int, *, entity: int = 1, attribute: int = 1, start: int = T0, step: int = 1_000_000
) -> list[Reading]:
    """Some readings of one device."""
    return [(entity, attribute, start + i * step, float(i) + 0.5) for i in range(count)]


@dataclass
class TestDatabase:
    """A fresh database with the schema."""

    __test__ = False

    server: EmbeddedPostgres
    name: str
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def dsn(self) -> str:
        return self.server.dsn(self.name)


@contextmanager
def database_server() -> Iterator[EmbeddedPostgres]:
    """A PostgreSQL with the schema in the database "template"."""
    with tempfile.TemporaryDirectory(prefix="atlasco-") as directory:
        server = EmbeddedPostgres(Path(directory, "pg"), settings={"max_locks_per_transaction": "256"})
        server.start()
        try:
            server.ensure_database("template")
            with psycopg.connect(server.dsn("template"), autocommit=True) as connection:
                connection.execute(resources.files("storage").joinpath("sql", "schema.sql").read_bytes())
            yield server
        finally:
            server.kill()
            server.stop()


@contextmanager
def fresh_database(server: EmbeddedPostgres, template: str = "template") -> Iterator[TestDatabase]:
    """A copy of the template, gone afterwards."""
    name = f"test_{next(_databases)}"
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template))
        )
    yield TestDatabase(server, name)
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
