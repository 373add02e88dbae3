"""The raw limit: what PostgreSQL takes from psycopg when nothing else is to be done.

The transactions are those that a gateway wrote: each row of its outbox says what one of them held. They are made
again as buffers and parameters, with the functions the gateway makes them with, and replayed into a fresh database
with the same statements in the same round trips. The timed loop does nothing but psycopg's input and output.
"""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, LiteralString, TypeAlias
from uuid import uuid4

import numpy as np
import psycopg
from atlasco.telemetry.v1 import change_pb2
from psycopg import sql

from bench.cpu import cpu_seconds
from bench.errors import BenchmarkVoid
from bench.stack import Stack
from storage import binary
from storage.arrange import all_new, arrange, latest_candidates
from storage.binary import Int4Array, Int8Array, TimestampArray, copy_rows, value_array
from storage.database import Role, connection_info
from storage.model import Attribute, Columns, Names, Outcome, ValueType
from storage.outbox import encode_outbox
from storage.statements import statements

_SQL = statements("ingest.sql")
_COPY = {
    value_type: sql.SQL("COPY {} ({}) FROM STDIN (FORMAT BINARY)").format(
        sql.Identifier(f"entity_attributes_{value_type}"), sql.SQL(", ").join(map(sql.Identifier, binary.COPY_COLUMNS))
    )
    for value_type in ValueType
}
_RAISE_LATEST: dict[ValueType, LiteralString] = {
    value_type: _SQL["raise_latest"].replace("{type}", value_type) for value_type in ValueType
}
# The streams of the template were opened once.
_EPOCH = 1

Statement: TypeAlias = tuple[LiteralString, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Transaction:
    """One transaction, ready to be sent."""

    lane: int
    readings: int
    fence: Statement
    copies: list[tuple[sql.Composed, bytes]]
    rest: list[Statement]


@dataclass(frozen=True, slots=True)
class Replayed:
    """How a replay went."""

    connections: int
    readings_per_s: float
    # CPU seconds per million readings.
    client_cpu_s: float
    postgres_cpu_s: float


class _Prebuilt:
    """An array parameter that was encoded beforehand."""

    def __init__(self, array: binary.ArrayParameter) -> None:
        self._encoded = array.encode()

    def encode(self) -> bytes:
        return self._encoded


# The driver finds an object's format by its class, base classes included.
_PREBUILT: dict[type[binary.ArrayParameter], type[Any]] = {
    kind: type(f"Prebuilt{kind.__name__}", (_Prebuilt, kind), {})
    for kind in (
        binary.Int4Array,
        binary.Int8Array,
        binary.Float8Array,
        binary.BoolArray,
        binary.TimestampArray,
        binary.TextArray,
    )
}


def _prebuilt(parameters: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _PREBUILT[type(value)](value) if isinstance(value, binary.ArrayParameter) else value
        for name, value in parameters.items()
    }


# -- building ---------------------------------------------------------------------------------------------------------


def build_transactions(stack: Stack, database: str) -> list[Transaction]:
    """The transactions that a gateway committed to a database, in their order."""
    with stack.admin(database) as connection:
        row = connection.execute("SELECT buckets FROM settings").fetchone()
        assert row is not None
        buckets = int(row[0])
        rows = connection.execute("SELECT lane, payload FROM outbox ORDER BY xid, id", binary=True).fetchall()
    sequences: Counter[int] = Counter()
    return [_transaction(lane, payload, sequences, buckets) for lane, payload in rows]


def _transaction(lane: int, payload: bytes, sequences: Counter[int], buckets: int) -> Transaction:
    readings, names = _readings(payload)
    arranged = arrange(readings, [Outcome.COMMITTED], buckets=buckets).readings
    tenant = next(iter(names.tenants))
    entities = sorted(names.entities)
    # A device's stream is at its next message: the numbers need only rise.
    sequences.update(entities)
    fence = {
        "tenant": Int4Array([tenant] * len(entities)),
        "entity": Int8Array(entities),
        "epoch": Int8Array([_EPOCH] * len(entities)),
        "sequence": Int8Array([sequences[entity] for entity in entities]),
    }
    rest: list[Statement] = []
    for value_type, columns in arranged.items():
        latest = latest_candidates(columns)
        parameters = {
            "tenant": Int4Array(latest.tenant),
            "entity": Int8Array(latest.entity),
            "attribute": Int4Array(latest.attribute),
            "ts": TimestampArray(latest.time_us),
            "value": value_array(value_type, latest.value),
        }
        rest.append((_RAISE_LATEST[value_type], _prebuilt(parameters)))
    changes = {value_type: all_new(columns) for value_type, columns in arranged.items()}
    row = encode_outbox(uuid4(), changes, names, buckets=buckets)
    assert row is not None
    outbox = {
        "lane": lane,
        "batch": row.batch_id,
        "changes": row.changes,
        "tenants": Int4Array(row.tenants),
        "min_ts": TimestampArray(row.min_us),
        "max_ts": TimestampArray(row.max_us),
        "payload": row.payload,
    }
    rest.append((_SQL["append_outbox"], _prebuilt(outbox)))
    return Transaction(
        lane=lane,
        readings=row.changes,
        fence=(_SQL["fence_streams"], _prebuilt(fence)),
        copies=[(_COPY[value_type], copy_rows(value_type, columns)) for value_type, columns in arranged.items()],
        rest=rest,
    )


def _readings(payload: bytes) -> tuple[dict[ValueType, Columns], Names]:
    """The readings and the names in one row of the outbox."""
    parts: dict[ValueType, list[Columns]] = {}
    tenants: dict[int, str] = {}
    entities: dict[int, str] = {}
    attributes: dict[int, Attribute] = {}
    for frame in change_pb2.OutboxPayload.FromString(payload).frames:
        batch = change_pb2.ChangeBatch.FromString(frame.change_batch)
        tenants[batch.tenant_id] = batch.tenant
        entities |= {entity.entity_id: entity.external_id for entity in batch.entities}
        for value_type, column in (
            (ValueType.DOUBLE, batch.doubles),
            (ValueType.BIGINT, batch.int64s),
            (ValueType.BOOLEAN, batch.bools),
            (ValueType.TEXT, batch.strings),
        ):
            if len(column.values):
                parts.setdefault(value_type, []).append(_columns(batch, column, value_type))
                for position in set(column.attributes):
                    named = batch.attributes[position]
                    attributes[named.attribute_id] = Attribute(named.attribute_id, named.name, value_type, True)
    return {value_type: _joined(each) for value_type, each in parts.items()}, Names(tenants, entities, attributes)


def _columns(batch: change_pb2.ChangeBatch, column: Any, value_type: ValueType) -> Columns:
    count = len(column.values)
    if value_type is ValueType.TEXT:
        values = np.empty(count, object)
        values[:] = [text.encode() for text in column.values]
    else:
        values = np.array(column.values)
    return Columns(
        tenant=np.full(count, batch.tenant_id, np.int32),
        entity=np.array([entity.entity_id for entity in batch.entities], np.int64)[np.array(column.entities)],
        attribute=np.array([a.attribute_id for a in batch.attributes], np.int32)[np.array(column.attributes)],
        time_us=batch.base_time_us + np.array(column.time_deltas_us, np.int64),
        value=values,
        source=np.zeros(count, np.int32),
        index=np.arange(count, dtype=np.int32),
        historical=np.zeros(count, bool),
    )


def _joined(parts: Sequence[Columns]) -> Columns:
    fields = ("tenant", "entity", "attribute", "time_us", "value", "source", "index", "historical")
    return Columns(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))


# -- replaying --------------------------------------------------------------------------------------------------------


def replay(stack: Stack, database: str, transactions: Sequence[Transaction], connections: int) -> Replayed:
    """Write the transactions over so many connections; a lane stays on one of them, so devices do not meet.

    Raises BenchmarkVoid when not everything is in the database afterwards.
    """
    shares = [[one for one in transactions if one.lane % connections == number] for number in range(connections)]
    failures: list[BaseException] = []
    ready = threading.Barrier(connections + 1)
    threads = [
        threading.Thread(target=_replay_share, args=(stack.dsn(database), share, ready, failures)) for share in shares
    ]
    for thread in threads:
        thread.start()
    ready.wait(30)
    started, own, server = time.perf_counter(), time.process_time(), cpu_seconds(stack.postgres_pid)
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    own, server = time.process_time() - own, cpu_seconds(stack.postgres_pid) - server
    if failures:
        raise BenchmarkVoid(f"the replay failed: {failures[0]!r}") from failures[0]
    readings = sum(one.readings for one in transactions)
    _verify(stack, database, readings, len(transactions))
    return Replayed(connections, readings / seconds, own / readings * 1e6, server / readings * 1e6)


def _replay_share(
    dsn: str, share: Sequence[Transaction], ready: threading.Barrier, failures: list[BaseException]
) -> None:
    try:
        with psycopg.connect(connection_info(dsn, Role.INGEST), prepare_threshold=0) as connection:
            ready.wait(30)
            for transaction in share:
                _write(connection, transaction)
    except BaseException as error:
        ready.abort()
        failures.append(error)


def _write(connection: psycopg.Connection, transaction: Transaction) -> None:
    with connection.cursor(binary=True) as cursor:
        # In a pipeline BEGIN travels with the statement.
        with connection.pipeline():
            cursor.execute(*transaction.fence)
        for statement, rows in transaction.copies:
            with cursor.copy(statement) as copy:
                copy.write(rows)
        with connection.pipeline():
            for query, parameters in transaction.rest:
                connection.execute(query, parameters)
            answer = connection.execute(_SQL["writing_transaction"])
            connection.commit()
        answer.fetchone()


def _verify(stack: Stack, database: str, readings: int, transactions: int) -> None:
    with stack.admin(database) as connection:
        row = connection.execute(
            "SELECT (SELECT count(*) FROM entity_attributes), (SELECT count(*) FROM outbox),"
            " (SELECT count(*) FROM device_streams WHERE committed_sequence > 0),"
            " (SELECT count(DISTINCT entity_id) FROM latest_values)"
        ).fetchone()
    assert row is not None
    if row[0] != readings or row[1] != transactions or row[2] != row[3]:
        raise BenchmarkVoid(f"the replay of {readings} readings in {transactions} transactions left {row}")
