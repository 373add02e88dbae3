"""A primary with readings and outbox, and a local warehouse that is loaded by command."""

import uuid
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from atlasco.telemetry.v1 import change_pb2
from psycopg import sql

from embedded.postgres import EmbeddedPostgres
from storage.loader.decode import CHANGES_SCHEMA, DecodedChanges, decode
from storage.reads.model import SeriesQuestion
from storage.warehouse.local import LocalWarehouse
from storage.warehouse.port import LaneWatermark, Unit
from tests.router.router_support import DATABASE

TENANT = "acme"
HOUR_US = 3_600_000_000
DAY_US = 24 * HOUR_US
DEVICES = ("d0", "d1", "d2")
ATTRIBUTES = ("temperature", "state")
TYPES = {"temperature": "double", "state": "text"}


class Platform:
    """A primary with readings and outbox, and a local warehouse that is loaded by command."""

    def __init__(self, server: EmbeddedPostgres, directory: Path) -> None:
        self.server = server
        self.directory = directory
        self.owner = psycopg.connect(server.dsn(DATABASE), autocommit=True)
        self.warehouse = LocalWarehouse(directory, server.dsn(DATABASE))
        self.warehouse.init()
        self.offset = 0
        self.loaded_to = (0, 0)
        self.tenant: int = self.one("SELECT register_tenant(%s)", TENANT)
        self.owner.execute("UPDATE tenants SET window_past = '60 days', retention = '60 days'")
        self.now_us: int = self.one("SELECT (extract(epoch FROM now()) * 1000000)::bigint")
        self.one("SELECT ensure_history(%s, now() - interval '20 days', now() + interval '1 hour')", self.tenant)
        self.one("SELECT ensure_outbox(now(), now() + interval '2 hours')")
        self.ids = {name: self.one("SELECT register_entity(%s, %s, '', '{}')", self.tenant, name) for name in DEVICES}
        for name, kind in TYPES.items():
            self.owner.execute(
                "INSERT INTO attributes (tenant_id, name, type) VALUES (%s, %s, %s)", [self.tenant, name, kind]
            )
        rows = self.owner.execute("SELECT name, attribute_id FROM attributes WHERE tenant_id = %s", [self.tenant])
        self.attributes: dict[str, int] = dict(rows.fetchall())
        # (device, attribute) -> time -> (value, revision)
        self.readings: dict[tuple[str, str], dict[int, tuple[Any, int]]] = {}

    def one(self, statement: str, *parameters: Any) -> Any:
        row = self.owner.execute(statement.encode(), parameters).fetchone()
        assert row is not None
        return row[0]

    def write(self, rows: list[tuple[str, str, int, Any]]) -> None:
        """One transaction: history, with revisions, and the outbox row of what changed."""
        batch = change_pb2.ChangeBatch(
            batch_id=uuid.uuid4().bytes, tenant_id=self.tenant, tenant=TENANT, op=change_pb2.CHANGE_OP_UPSERT
        )
        batch.base_time_us = min(time_us for _, _, time_us, _ in rows)
        for name, number in self.ids.items():
            batch.entities.add(entity_id=number, external_id=name)
        for name, kind in zip(ATTRIBUTES, (1, 4), strict=True):
            batch.attributes.add(attribute_id=self.attributes[name], name=name, type=kind)  # type: ignore[arg-type]
        with self.owner.transaction():
            for device, attribute, time_us, value in rows:
                run = self.readings.setdefault((device, attribute), {})
                revision = run[time_us][1] + 1 if time_us in run else 0
                run[time_us] = (value, revision)
                self.owner.execute(
                    sql.SQL(
                        "INSERT INTO {} (tenant_id, entity_id, attribute_id, ts, value, revision) "
                        "VALUES (%s, %s, %s, 'epoch'::timestamptz + %s * interval '1 microsecond', %s, %s) "
                        "ON CONFLICT (tenant_id, entity_id, attribute_id, ts) "
                        "DO UPDATE SET value = excluded.value, revision = excluded.revision"
                    ).format(sql.Identifier(f"entity_attributes_{TYPES[attribute]}")),
                    [self.tenant, self.ids[device], self.attributes[attribute], time_us, value, revision or None],
                )
                column = batch.doubles if attribute == "temperature" else batch.strings
                column.entities.append(list(self.ids).index(device))
                column.attributes.append(ATTRIBUTES.index(attribute))
                column.time_deltas_us.append(time_us - batch.base_time_us)
                column.values.append(value)
                column.revisions.append(revision)
            frame = change_pb2.OutboxFrame(
                tenant_id=self.tenant, bucket=0, changes=len(rows), change_batch=batch.SerializeToString()
            )
            times = [time_us for _, _, time_us, _ in rows]
            self.owner.execute(
                "INSERT INTO outbox (lane, batch_id, changes, tenant_ids, min_ts, max_ts, payload) VALUES "
                "(0, %s, %s, %s, ARRAY['epoch'::timestamptz + %s * interval '1 microsecond'], "
                "ARRAY['epoch'::timestamptz + %s * interval '1 microsecond'], %s)",
                [
                    uuid.UUID(bytes=batch.batch_id),
                    len(rows),
                    [self.tenant],
                    min(times),
                    max(times),
                    change_pb2.OutboxPayload(frames=[frame]).SerializeToString(),
                ],
            )

    def load(self, *, batches: int | None = None) -> None:
        """What relay and loader do: load the next batches; with all of them loaded, say so in relay_lanes."""
        clock_us = self.one("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")
        snapshot = self.one("SELECT pg_current_snapshot()::text")
        rows = self.owner.execute(
            "SELECT xid::text::bigint, id, payload FROM outbox WHERE (xid::text::bigint, id) > (%s, %s) ORDER BY 1, 2",
            self.loaded_to,
        ).fetchall()
        taken = rows if batches is None else rows[:batches]
        changes = []
        for xid, number, payload in taken:
            self.loaded_to = (xid, number)
            for frame in change_pb2.OutboxPayload.FromString(payload).frames:
                headers = {"kind": b"changes", "schema": CHANGES_SCHEMA, "lane": b"0", "batch": b"", "xid": b"1"}
                decoded = decode(headers, b"%d:0" % self.tenant, frame.change_batch)
                assert isinstance(decoded, DecodedChanges)
                changes.append(decoded.changes)
        everything = len(taken) == len(rows)
        lanes = self.one("SELECT lanes FROM settings")
        marks = [LaneWatermark(lane, 0, lanes, 1, clock_us, 1) for lane in range(lanes)] if everything else []
        state = self.warehouse.open_partitions("topic", {0: 0})[0]
        unit = Unit(0, "topic", state.generation, self.offset, self.offset + 1 + len(taken), changes, marks)
        self.offset = unit.end
        (outcome,) = self.warehouse.load([unit])
        assert outcome.loaded
        if everything:
            self.owner.execute(
                "INSERT INTO relay_lanes (lane, loaded) SELECT n, %s::pg_snapshot FROM generate_series(0, %s - 1) n "
                "ON CONFLICT (lane) DO UPDATE SET loaded = excluded.loaded",
                [snapshot, lanes],
            )

    def expected(self, question: SeriesQuestion) -> list[tuple[str, str, int, Any, int]]:
        rows = []
        order = -1 if question.descending else 1
        for device in sorted(question.entities, key=self.ids.__getitem__)[::order]:
            for attribute in sorted(question.attributes, key=self.attributes.__getitem__)[::order]:
                run = self.readings.get((device, attribute), {})
                times = [t for t in sorted(run) if question.start_us <= t < question.end_us][::order]
                times = times[: question.limit_per_series or None]
                rows += [(device, attribute, t, *run[t]) for t in times]
        return rows


def some_rows(platform: Platform, random: np.random.Generator, count: int, oldest_us: int) -> list[Any]:
    rows = {}
    for _ in range(count):
        device, attribute = str(random.choice(DEVICES)), str(random.choice(ATTRIBUTES))
        time_us = platform.now_us - int(random.integers(0, oldest_us // HOUR_US)) * HOUR_US
        value: Any = float(random.normal()) if attribute == "temperature" else f"s{random.integers(100)}"
        rows[device, attribute, time_us] = value
    return [(*key, value) for key, value in rows.items()]
