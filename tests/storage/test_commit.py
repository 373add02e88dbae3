"""The write transaction on a real server: what is stored, what latest values say, what the outbox carries.

`Site` is what the other tests of writing work with, too.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from uuid import UUID, uuid4

import numpy as np
import psycopg
import pytest
from atlasco.telemetry.v1 import change_pb2, ingest_pb2

from storage.commit import UnaryRequest, Writer, request_digest
from storage.database import Pool, PoolSettings, Role, make_pool
from storage.errors import DuplicateKey
from storage.model import (
    Attribute,
    BatchMessage,
    Columns,
    Names,
    Outcome,
    Reason,
    RejectedReading,
    ValueType,
    WriteBatch,
)
from storage.outbox import ensure_outbox
from tests.storage.conftest import INGEST_LOGIN, Database
from tests.waiting import PATIENCE_S, until

BUCKETS = 16
SECOND = 1_000_000
T0 = int(time.time()) // 86_400 * 86_400 * SECOND - 86_400 * SECOND
"""Yesterday at midnight UTC."""

DTYPES: dict[ValueType, Any] = {
    ValueType.DOUBLE: np.float64,
    ValueType.BIGINT: np.int64,
    ValueType.BOOLEAN: np.bool_,
    ValueType.TEXT: object,
}
KIND = {"d": ValueType.DOUBLE, "i": ValueType.BIGINT, "b": ValueType.BOOLEAN, "s": ValueType.TEXT}

Key: TypeAlias = tuple[str, str, int]
"""Device, attribute, microseconds."""


@dataclass
class Sent:
    """A message: readings are (attribute, microseconds, value); an attribute's first letter is its type."""

    device: str
    readings: Sequence[tuple[str, int, Any]]
    epoch: int | None = None
    sequence: int = 0
    session: UUID | None = None
    historical: bool = False
    aside: Sequence[tuple[str, int, Any]] = ()
    rejections: list[RejectedReading] = field(default_factory=list)


@dataclass
class Site:
    """A tenant of a database, with the devices and attributes that messages have named so far."""

    database: Database
    pool: Pool
    tenant_id: int
    tenant: str
    devices: dict[str, int] = field(default_factory=dict)
    attributes: dict[str, Attribute] = field(default_factory=dict)

    def execute(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        """As the owner of the database."""
        with psycopg.connect(self.database(), autocommit=True) as connection:
            cursor = connection.execute(query.encode(), parameters or None)
            return cursor.fetchall() if cursor.description else []

    def writer(self) -> Writer:
        return Writer(self.pool, buckets=BUCKETS)

    def device(self, name: str) -> int:
        if name not in self.devices:
            [(self.devices[name],)] = self.execute("SELECT register_entity(%s, %s, '', '{}')", self.tenant_id, name)
        return self.devices[name]

    def attribute(self, name: str, *, keeps_latest: bool = True) -> Attribute:
        if name not in self.attributes:
            kind = KIND[name[0]]
            [(number,)] = self.execute(
                "INSERT INTO attributes (tenant_id, name, type, keeps_latest) VALUES (%s, %s, %s, %s) "
                "RETURNING attribute_id",
                self.tenant_id, name, kind.value, keeps_latest,
            )  # fmt: skip
            self.attributes[name] = Attribute(number, name, kind, keeps_latest)
        return self.attributes[name]

    def hello(self, device: str, session: UUID) -> tuple[int, int]:
        """Epoch and committed sequence."""
        [(epoch, committed)] = self.execute(
            "SELECT * FROM open_stream(%s, %s, %s)", self.tenant_id, self.device(device), session
        )
        return epoch, committed

    def batch(self, *sent: Sent, lane: int = 0) -> WriteBatch:
        return WriteBatch(
            lane=lane,
            messages=[
                BatchMessage(self.tenant_id, self.device(m.device), m.session, m.epoch, m.sequence, list(m.rejections))
                for m in sent
            ],
            readings=self._columns([(n, m, m.readings) for n, m in enumerate(sent)]),
            quarantined=self._columns([(n, m, m.aside) for n, m in enumerate(sent)]),
            names=Names(
                {self.tenant_id: self.tenant},
                {number: name for name, number in self.devices.items()},
                {attribute.attribute_id: attribute for attribute in self.attributes.values()},
            ),
        )

    def _columns(self, parts: Sequence[tuple[int, Sent, Sequence[tuple[str, int, Any]]]]) -> dict[ValueType, Columns]:
        rows: dict[ValueType, list[tuple[Any, ...]]] = {}
        for source, message, readings in parts:
            for index, (name, time_us, value) in enumerate(readings):
                attribute = self.attribute(name)
                rows.setdefault(attribute.type, []).append(
                    (
                        self.device(message.device),
                        attribute.attribute_id,
                        time_us,
                        value.encode() if isinstance(value, str) else value,
                        source,
                        index,
                        message.historical or not attribute.keeps_latest,
                    )
                )
        made = {}
        for value_type, found in rows.items():
            values = np.empty(len(found), DTYPES[value_type])
            values[:] = [row[3] for row in found]
            made[value_type] = Columns(
                tenant=np.full(len(found), self.tenant_id, np.int32),
                entity=np.array([row[0] for row in found], np.int64),
                attribute=np.array([row[1] for row in found], np.int32),
                time_us=np.array([row[2] for row in found], np.int64),
                value=values,
                source=np.array([row[4] for row in found], np.int32),
                index=np.array([row[5] for row in found], np.int32),
                historical=np.array([row[6] for row in found], bool),
            )
        return made

    def history(self) -> dict[Key, tuple[Any, int]]:
        """Value and revision of every reading."""
        found = self.execute(
            "SELECT e.external_id, a.name, (extract(epoch FROM h.ts) * 1000000)::bigint, h.double_value, "
            "h.bigint_value, h.boolean_value, h.text_value, h.revision FROM entity_attributes h "
            "JOIN entities e USING (tenant_id, entity_id) JOIN attributes a USING (tenant_id, attribute_id) "
            "WHERE tenant_id = %s",
            self.tenant_id,
        )
        return {(row[0], row[1], row[2]): (plain(value_of(row[1], row[3:7])), row[7]) for row in found}

    def latest(self) -> dict[tuple[str, str], tuple[int, Any]]:
        """Microseconds and value of every latest value."""
        found = self.execute(
            "SELECT e.external_id, a.name, (extract(epoch FROM l.ts) * 1000000)::bigint, l.double_value, "
            "l.bigint_value, l.boolean_value, l.text_value FROM latest_values l "
            "JOIN entities e USING (tenant_id, entity_id) JOIN attributes a USING (tenant_id, attribute_id) "
            "WHERE tenant_id = %s",
            self.tenant_id,
        )
        return {(row[0], row[1]): (row[2], plain(value_of(row[1], row[3:7]))) for row in found}

    def outbox(self) -> list[tuple[Key, Any, int]]:
        """Every change of the tenant in the outbox, in the order of the transactions' ids."""
        found = []
        for (payload,) in self.execute("SELECT payload FROM outbox ORDER BY xid, id"):
            for frame in change_pb2.OutboxPayload.FromString(payload).frames:
                if frame.tenant_id == self.tenant_id:
                    found += changes_of(change_pb2.ChangeBatch.FromString(frame.change_batch))
        return found

    def replayed(self) -> dict[Key, tuple[Any, int]]:
        """The outbox as a consumer keeps it: the highest revision of each reading; each revision comes once."""
        kept: dict[Key, tuple[Any, int]] = {}
        seen = set()
        for key, value, revision in self.outbox():
            assert (key, revision) not in seen
            seen.add((key, revision))
            if key not in kept or kept[key][1] < revision:
                kept[key] = (value, revision)
        return kept

    def quarantined(self) -> list[tuple[str, str, int, Any]]:
        found = self.execute(
            "SELECT e.external_id, a.name, (extract(epoch FROM q.ts) * 1000000)::bigint, q.double_value, "
            "q.bigint_value, q.boolean_value, q.text_value FROM quarantine q "
            "JOIN entities e USING (tenant_id, entity_id) JOIN attributes a USING (tenant_id, attribute_id) "
            "WHERE tenant_id = %s ORDER BY quarantine_id",
            self.tenant_id,
        )
        return [(row[0], row[1], row[2], plain(value_of(row[1], row[3:7]))) for row in found]


def value_of(attribute: str, values: Sequence[Any]) -> Any:
    return values["dibs".index(attribute[0])]


def plain(value: Any) -> Any:
    """A value that equals itself also when it is NaN."""
    return "NaN" if isinstance(value, float) and math.isnan(value) else value


def changes_of(batch: change_pb2.ChangeBatch) -> list[tuple[Key, Any, int]]:
    found = []
    column: Any
    for column in (batch.doubles, batch.int64s, batch.bools, batch.strings):
        revisions = list(column.revisions) or [0] * len(column.values)
        for place, value in enumerate(column.values):
            key = (
                batch.entities[column.entities[place]].external_id,
                batch.attributes[column.attributes[place]].name,
                batch.base_time_us + column.time_deltas_us[place],
            )
            found.append((key, plain(value), revisions[place]))
    return found


@asynccontextmanager
async def site_of(database: Database, tenant: str, *, dsn: str | None = None) -> AsyncIterator[Site]:
    """A site as an ingest login writes to it."""
    settings = PoolSettings(
        dsn or database(user=INGEST_LOGIN), Role.INGEST, min_size=2, max_size=8, timeout_s=PATIENCE_S
    )
    async with make_pool(settings) as pool:
        await ensure_outbox(pool)
        async with pool.connection() as connection:
            row = await (await connection.execute("SELECT register_tenant(%s)", [tenant])).fetchone()
            assert row is not None
            await connection.execute(
                "SELECT ensure_history(%s, now() - interval '2 days', now() + interval '1 day')", [row[0]]
            )
        yield Site(database, pool, row[0], tenant)


@pytest.fixture
async def site(module_database: Database, request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    async with site_of(module_database, request.node.name) as made:
        yield made


ALL_TYPES = [
    ("d", T0, 1.5), ("d", T0 + 1, math.nan), ("d", T0 + 2, -math.inf), ("i", T0, 2**63 - 1), ("i", T0 + 1, -(2**63)),
    ("b", T0, True), ("b", T0 + 1, False), ("s", T0, ""), ("s", T0 + 1, "käse 𝄞"),
]  # fmt: skip


# -- copy and merge


async def test_new_readings_are_copied_and_are_everywhere(site: Site) -> None:
    written = await site.writer().write(site.batch(Sent("pump", ALL_TYPES)))
    expected = {("pump", name, time_us): (plain(value), 0) for name, time_us, value in ALL_TYPES}
    assert (written.outcomes, written.copied, written.merged) == ([Outcome.COMMITTED], 9, 0)
    assert (written.changes, written.corrections) == (9, 0)
    assert site.history() == site.replayed() == expected
    assert site.latest() == {
        ("pump", "d"): (T0 + 2, -math.inf),
        ("pump", "i"): (T0 + 1, -(2**63)),
        ("pump", "b"): (T0 + 1, False),
        ("pump", "s"): (T0 + 1, "käse 𝄞"),
    }
    assert site.execute("SELECT revision FROM entity_attributes_double WHERE revision = 0") == []


async def test_the_transaction_is_the_one_in_the_outbox(site: Site) -> None:
    written = await site.writer().write(site.batch(Sent("pump", [("d", T0, 1.0)]), lane=3))
    rows = site.execute(
        "SELECT xid::text::bigint, lane, changes, tenant_ids FROM outbox WHERE tenant_ids = ARRAY[%s]::int[]",
        site.tenant_id,
    )
    assert rows == [(written.xid, 3, 1, [site.tenant_id])]


async def test_the_same_values_again_change_nothing(site: Site) -> None:
    writer = site.writer()
    await writer.write(site.batch(Sent("pump", ALL_TYPES)))
    before = site.history(), site.latest(), site.outbox()
    written = await writer.write(site.batch(Sent("pump", ALL_TYPES)))
    assert (written.copied, written.merged, written.changes) == (0, 9, 0)
    assert (site.history(), site.latest(), site.outbox()) == before
    assert site.execute("SELECT count(*) FROM outbox WHERE %s = ANY (tenant_ids)", site.tenant_id) == [(1,)]


async def test_a_conflict_makes_the_lane_merge_for_a_while(site: Site) -> None:
    writer = site.writer()
    await writer.write(site.batch(Sent("pump", [("d", T0, 1.0)])))
    ways = []
    for n in range(11):
        # The first is a repetition, the others are new.
        written = await writer.write(site.batch(Sent("pump", [("d", T0 + n, 1.0)])))
        ways.append("merge" if written.merged else "copy")
    assert ways == ["merge"] * 9 + ["copy"] * 2


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("d", [1.0, 2.0, math.nan, 1.0]),
        ("i", [1, 2**63 - 1, 1]),
        ("b", [True, False, True]),
        ("s", ["", "a", ""]),
    ],
)
async def test_corrections_take_one_revision_each(site: Site, name: str, values: list[Any]) -> None:
    writer = site.writer()
    for revision, value in enumerate(values):
        for _ in range(2):
            written = await writer.write(site.batch(Sent("pump", [(name, T0, value)])))
        assert site.history() == {("pump", name, T0): (plain(value), revision)}
        assert site.latest() == {("pump", name): (T0, plain(value))}
        assert written.changes == 0
    assert [(value, revision) for _, value, revision in site.outbox()] == [
        (plain(value), revision) for revision, value in enumerate(values)
    ]


async def test_the_outbox_carries_only_what_changed(site: Site) -> None:
    writer = site.writer()
    await writer.write(site.batch(Sent("pump", [("d", T0, 1.0), ("d", T0 + 1, 1.0)])))
    count = len(site.outbox())
    written = await writer.write(site.batch(Sent("pump", [("d", T0, 1.0), ("d", T0 + 1, 2.0), ("d", T0 + 2, 3.0)])))
    assert (written.changes, written.corrections) == (2, 1)
    assert site.outbox()[count:] == [(("pump", "d", T0 + 1), 2.0, 1), (("pump", "d", T0 + 2), 3.0, 0)]


async def test_an_older_reading_does_not_move_the_latest_value(site: Site) -> None:
    writer = site.writer()
    await writer.write(site.batch(Sent("pump", [("d", T0 + 5, 5.0)])))
    await writer.write(site.batch(Sent("pump", [("d", T0 + 4, 4.0)])))
    assert site.latest() == {("pump", "d"): (T0 + 5, 5.0)}


async def test_a_message_is_told_what_it_replaced_itself(site: Site) -> None:
    session = uuid4()
    epoch, _ = site.hello("pump", session)
    batch = site.batch(Sent("pump", [("d", T0, 1.0), ("d", T0, 2.0)], epoch, 1, session))
    await site.writer().write(batch)
    assert [(r.index, r.reason) for r in batch.messages[0].rejections] == [(0, Reason.SUPERSEDED_IN_MESSAGE)]
    assert site.history() == {("pump", "d", T0): (2.0, 0)}


# -- historical


async def test_back_filled_readings_move_no_latest_value(site: Site) -> None:
    writer = site.writer()
    await writer.write(site.batch(Sent("pump", [("d", T0, 1.0)])))
    await writer.write(site.batch(Sent("pump", [("d", T0 + 9, 9.0), ("d-other", T0, 0.0)], historical=True)))
    assert site.latest() == {("pump", "d"): (T0, 1.0)}
    assert len(site.history()) == 3


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([Sent("pump", [("d", T0, 2.0)], historical=True)], (T0, 2.0)),
        ([Sent("pump", [("d", T0 - 1, 2.0)], historical=True)], (T0, 1.0)),
        ([Sent("pump", [("d", T0, 2.0), ("d", T0 + 1, 3.0)], historical=True)], (T0, 2.0)),
        ([Sent("pump", [("d", T0, 2.0)], historical=True), Sent("pump", [("d", T0 + 1, 3.0)])], (T0 + 1, 3.0)),
        ([Sent("pump", [("d", T0, 2.0)], historical=True), Sent("pump", [("d", T0 - 2, 3.0)])], (T0, 2.0)),
        ([Sent("pump", [("d", T0 - 1, 7.0), ("d", T0, 2.0)], historical=True)], (T0, 2.0)),
    ],
    ids=["the-very-reading", "another", "and-a-newer-one", "overtaken", "with-an-older-candidate", "two-corrections"],
)
async def test_a_correction_of_what_latest_holds_reaches_it(
    site: Site, given: list[Sent], expected: tuple[int, float]
) -> None:
    writer = site.writer()
    await writer.write(site.batch(Sent("pump", [("d", T0 - 1, 0.0), ("d", T0, 1.0)])))
    written = await writer.write(site.batch(*given))
    assert written.corrections >= 1
    assert site.latest() == {("pump", "d"): expected}
    time_us, value = expected
    assert site.history()["pump", "d", time_us][0] == value


async def test_an_attribute_may_keep_no_latest_value(site: Site) -> None:
    site.attribute("d", keeps_latest=False)
    writer = site.writer()
    for value in (1.0, 2.0):
        await writer.write(site.batch(Sent("pump", [("d", T0, value)])))
    assert site.latest() == {}
    assert site.history() == {("pump", "d", T0): (2.0, 1)}


# -- rejections and quarantine


async def test_rejections_commit_with_their_message_and_are_read_again(site: Site) -> None:
    session = uuid4()
    epoch, _ = site.hello("pump", session)
    told = [
        RejectedReading(7, Reason.TIMESTAMP_TOO_OLD, "late", quarantined=True),
        RejectedReading(None, Reason.TOO_MANY_READINGS, "whole"),
    ]
    await site.writer().write(site.batch(Sent("pump", [], epoch, 1, session, rejections=told)))
    [(sequence, stored)] = site.execute(
        "SELECT sequence, rejections FROM stream_rejections WHERE tenant_id = %s", site.tenant_id
    )
    ack = ingest_pb2.Ack.FromString(stored)
    assert sequence == 1
    assert [(r.sequence, r.index if r.HasField("index") else None, r.reason, r.text, r.quarantined) for r in
            ack.rejections] == [(1, 7, 14, "late", True), (1, None, 19, "whole", False)]  # fmt: skip
    assert site.hello("pump", session)[1] == 1


async def test_readings_set_aside_take_part_in_nothing_else(site: Site) -> None:
    await site.writer().write(site.batch(Sent("pump", [("d", T0, 1.0)], aside=[("d", 5, 7.0), ("s", 9, "x")])))
    assert sorted(site.quarantined()) == [("pump", "d", 5, 7.0), ("pump", "s", 9, "x")]
    assert list(site.history()) == [("pump", "d", T0)]
    assert len(site.outbox()) == 1


# -- unary


def request_of(site: Site, request_id: UUID, content: bytes = b"content") -> UnaryRequest:
    return UnaryRequest(
        site.tenant_id,
        request_id,
        request_digest(content),
        lambda messages, xid: f"{[len(m.rejections) for m in messages]} {xid}".encode(),
    )


async def test_a_unary_write_is_remembered_with_its_response(site: Site) -> None:
    writer, request_id = site.writer(), uuid4()
    assert await writer.find_request(site.tenant_id, request_id) is None
    batch = site.batch(Sent("pump", [("d", T0, 1.0), ("d", T0, 2.0)]), Sent("fan", [("d", T0, 1.0)]))
    written = await writer.write(batch, request_of(site, request_id))
    assert await writer.find_request(site.tenant_id, request_id) == (
        request_digest(b"content"),
        f"[1, 0] {written.xid}".encode(),
    )


async def test_a_request_that_was_carried_out_writes_nothing(site: Site) -> None:
    writer, request_id = site.writer(), uuid4()
    await writer.write(site.batch(Sent("pump", [("d", T0, 1.0)])), request_of(site, request_id))
    await writer.write(site.batch(Sent("pump", [("d", T0, 2.0)])), request_of(site, uuid4()))
    before = site.history(), site.outbox()
    with pytest.raises(DuplicateKey):
        await writer.write(site.batch(Sent("pump", [("d", T0, 1.0), ("d", T0 + 1, 1.0)])), request_of(site, request_id))
    assert (site.history(), site.outbox()) == before


async def test_of_two_equal_requests_at_once_one_is_carried_out(site: Site) -> None:
    request_id = uuid4()
    batches = [site.batch(Sent("pump", [("d", T0, 1.0)])) for _ in range(4)]
    results = await asyncio.gather(
        *(site.writer().write(batch, request_of(site, request_id)) for batch in batches), return_exceptions=True
    )
    assert sorted(type(result).__name__ for result in results) == ["DuplicateKey"] * 3 + ["Written"]
    assert len(site.outbox()) == 1


# -- two writers


async def waiting(site: Site, count: int) -> bool:
    [(found,)] = site.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    return bool(found >= count)


async def test_two_writers_of_one_key_take_different_revisions(site: Site) -> None:
    await site.writer().write(site.batch(Sent("pump", [("d", T0, 0.0)])))
    batches = [site.batch(Sent("pump", [("d", T0, float(n))])) for n in range(1, 6)]
    async with await psycopg.AsyncConnection.connect(site.database()) as blocker:
        await blocker.execute("SELECT FROM entity_attributes_double WHERE tenant_id = %s FOR UPDATE", [site.tenant_id])
        async with asyncio.TaskGroup() as writers:
            for batch in batches:
                writers.create_task(site.writer().write(batch))
            await until(lambda: waiting(site, len(batches)), "all wait for the key")
            await blocker.rollback()
    assert sorted(revision for _, _, revision in site.outbox()) == list(range(6))
    value, revision = site.history()["pump", "d", T0]
    assert revision == 5
    assert site.latest() == {("pump", "d"): (T0, value)}
    assert site.replayed() == site.history()


async def test_two_writers_of_a_new_key_agree(site: Site) -> None:
    """Both copy; the one that comes second waits for the first, fails on the key and merges."""
    site.batch(Sent("pump", [("d", T0, 0.0)]))
    for n in range(10):
        batches = [site.batch(Sent("pump", [("d", T0 + n, value)])) for value in (1.0, 2.0)]
        await asyncio.gather(*(site.writer().write(batch) for batch in batches))
    assert site.replayed() == site.history()
    assert {revision for _, revision in site.history().values()} == {1}
    assert site.latest() == {("pump", "d"): (T0 + 9, site.history()["pump", "d", T0 + 9][0])}
