"""The outbox row says exactly what changed, split by tenant and device bucket."""

import math
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from atlasco.telemetry.v1 import change_pb2
from hypothesis import given
from hypothesis import strategies as st

from storage.database import Pool, PoolSettings, Role, make_pool
from storage.model import Attribute, Changes, Names, ValueType
from storage.outbox import WIRE_TYPES, encode_outbox, ensure_outbox
from tests.storage.conftest import INGEST_LOGIN, Database

BUCKETS = 5
DTYPES: dict[ValueType, Any] = {
    ValueType.DOUBLE: np.float64,
    ValueType.BIGINT: np.int64,
    ValueType.BOOLEAN: np.bool_,
    ValueType.TEXT: object,
}
VALUES: dict[ValueType, st.SearchStrategy[Any]] = {
    ValueType.DOUBLE: st.floats(),
    ValueType.BIGINT: st.integers(-(2**63), 2**63 - 1),
    ValueType.BOOLEAN: st.booleans(),
    ValueType.TEXT: st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5).map(
        str.encode
    ),
}
# Attribute n is of type n modulo 4.
TYPES = [*ValueType]
NAMES = Names(
    tenants={1: "acme", 2: "rival", 1 << 30: "large"},
    entities={n: f"device-{n}" for n in range(12)},
    attributes={n: Attribute(n, f"attribute-{n}", TYPES[n % 4], True) for n in range(8)},
)
TIMES = st.one_of(st.integers(-5, 5), st.integers(-(2**52), 2**53))


def changes_of(value_type: ValueType) -> st.SearchStrategy[list[tuple[Any, ...]]]:
    own = [number for number, attribute in NAMES.attributes.items() if attribute.type is value_type]
    key = st.tuples(st.sampled_from([1, 2, 1 << 30]), st.integers(0, 11), st.sampled_from(own), TIMES)
    return st.lists(
        st.tuples(key, VALUES[value_type], st.sampled_from([0, 0, 1, 7])), max_size=8, unique_by=lambda row: row[0]
    )


def as_changes(value_type: ValueType, rows: list[tuple[Any, ...]]) -> Changes:
    rows = sorted(rows, key=lambda row: (row[0][0], row[0][1] % BUCKETS, *row[0][1:]))
    values = np.empty(len(rows), DTYPES[value_type])
    values[:] = [row[1] for row in rows]
    return Changes(
        tenant=np.array([row[0][0] for row in rows], np.int32),
        entity=np.array([row[0][1] for row in rows], np.int64),
        attribute=np.array([row[0][2] for row in rows], np.int32),
        time_us=np.array([row[0][3] for row in rows], np.int64),
        value=values,
        revision=np.array([row[2] for row in rows], np.int32),
    )


def exact(value: Any) -> Any:
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else (value, math.copysign(1, value))
    return value.encode() if isinstance(value, str) else value


@given(st.fixed_dictionaries({value_type: changes_of(value_type) for value_type in ValueType}))
def test_the_payload_is_the_changes(given: dict[ValueType, list[tuple[Any, ...]]]) -> None:
    batch_id = uuid4()
    changes = {value_type: as_changes(value_type, rows) for value_type, rows in given.items()}
    row = encode_outbox(batch_id, changes, NAMES, buckets=BUCKETS)
    expected = {
        (value_type, *key): (exact(value), revision)
        for value_type, rows in given.items()
        for key, value, revision in rows
    }
    if not expected:
        assert row is None
        return
    assert row is not None
    found = {}
    frames = change_pb2.OutboxPayload.FromString(row.payload).frames
    assert len({(frame.tenant_id, frame.bucket) for frame in frames}) == len(frames)
    for frame in frames:
        batch = change_pb2.ChangeBatch.FromString(frame.change_batch)
        assert (batch.tenant_id, batch.bucket, batch.part) == (frame.tenant_id, frame.bucket, 0)
        assert (batch.batch_id, batch.tenant) == (batch_id.bytes, NAMES.tenants[batch.tenant_id])
        assert batch.op == change_pb2.CHANGE_OP_UPSERT
        assert {(a.attribute_id, a.name, a.type) for a in batch.attributes} == {
            (a.attribute_id, f"attribute-{a.attribute_id}", WIRE_TYPES[TYPES[a.attribute_id % 4]])
            for a in batch.attributes
        }
        times, count = [], 0
        column: Any
        for value_type, column in zip(TYPES, (batch.doubles, batch.int64s, batch.bools, batch.strings), strict=True):
            lengths = {len(column.entities), len(column.attributes), len(column.time_deltas_us), len(column.values)}
            assert len(lengths) == 1
            assert not len(column.revisions) or any(column.revisions)
            count += len(column.values)
            for place, value in enumerate(column.values):
                entity = batch.entities[column.entities[place]]
                assert entity.external_id == f"device-{entity.entity_id}"
                assert entity.entity_id % BUCKETS == frame.bucket
                time_us = batch.base_time_us + column.time_deltas_us[place]
                times.append(time_us)
                attribute = batch.attributes[column.attributes[place]].attribute_id
                key = (value_type, batch.tenant_id, entity.entity_id, attribute, time_us)
                assert key not in found
                found[key] = (exact(value), column.revisions[place] if column.revisions else 0)
        assert (min(times), count) == (batch.base_time_us, frame.changes)
    assert found == expected
    assert (row.batch_id, row.changes) == (batch_id, len(expected))
    spans = {
        tenant: (
            min(key[4] for key in expected if key[1] == tenant),
            max(key[4] for key in expected if key[1] == tenant),
        )
        for tenant in sorted({key[1] for key in expected})
    }
    assert row.tenants == list(spans)
    assert list(zip(row.min_us.tolist(), row.max_us.tolist(), strict=True)) == list(spans.values())


@pytest.fixture
async def pool(database: Database) -> AsyncIterator[Pool]:
    async with make_pool(PoolSettings(database(user=INGEST_LOGIN), Role.INGEST)) as made:
        yield made


async def test_partitions_are_made_ahead_and_once(pool: Pool) -> None:
    counts = []
    for _ in range(2):
        await ensure_outbox(pool)
        async with pool.connection() as connection:
            cursor = await connection.execute("SELECT count(*) FROM pg_inherits WHERE inhparent = 'outbox'::regclass")
            counts.append(await cursor.fetchone())
    assert counts == [(4,), (4,)]
