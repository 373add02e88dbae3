"""The whole pipeline while its processes are killed at random moments: every store ends with the same readings."""

import asyncio
import os
import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
import pytest
from atlasco.telemetry.v1 import change_pb2

from demo.audit import audit, primary_clock
from device.fleet import Fleet, FleetConfig
from device.simulated import FaultRates
from embedded.errors import JarsUnresolved, JavaMissing, MavenMissing
from embedded.kafka import EmbeddedKafka
from embedded.ports import LOOPBACK, free_port
from embedded.postgres import EmbeddedPostgres
from embedded.program import Program
from storage.kafka import KafkaConfig
from storage.maintenance import MaintenanceOptions, maintain
from storage.migrations import migrate
from storage.verify.log import LogStore
from storage.verify.readings import Primary, WarehouseStore, verify
from storage.warehouse.local import LocalWarehouse
from tests.pipeline.conftest import need_pipeline
from tests.waiting import PATIENCE_S, until

SEED = int(os.environ.get("ATLASCO_TEST_SEED", "20"))
TENANTS = ("one", "two")
DEVICES = 15
BUCKETS = 4
"""Few, so that devices of both tenants are in each."""


class Rig:
    """Everything from the gateway to the warehouse, with waits short enough for a test."""

    def __init__(self, directory: Path, resources: ExitStack) -> None:
        self.directory = directory
        self._resources = resources
        self.kafka = EmbeddedKafka(directory / "kafka", properties={"group.min.session.timeout.ms": "1000"})
        resources.callback(self.kafka.stop)
        resources.callback(self.kafka.kill)
        self.kafka.start()
        postgres = EmbeddedPostgres(directory / "postgres")
        resources.callback(postgres.stop)
        resources.callback(postgres.kill)
        postgres.start()
        postgres.ensure_database("kills")
        self.dsn = postgres.dsn("kills")
        asyncio.run(migrate(self.dsn, progress=lambda _: None))
        with psycopg.connect(self.dsn) as connection:
            connection.execute("UPDATE settings SET buckets = %s", [BUCKETS])
        asyncio.run(maintain(self.dsn, MaintenanceOptions()))
        self.warehouse = LocalWarehouse(directory / "warehouse", self.dsn)
        resources.callback(self.warehouse.close)
        self.warehouse.init()
        self.target = f"{LOOPBACK}:{free_port()}"
        self.gateway = self.process("gateway", "serve")
        self.relay = self.process("relay", "relay")
        self.loader = self.process("loader", "load")

    def process(self, name: str, command: str) -> Program:
        """A process, not started yet; killed at the end if it still runs."""
        environment = {
            "ATLASCO_DSN": self.dsn,
            "ATLASCO_LISTEN": self.target,
            "ATLASCO_REGISTER_TENANTS": "true",
            "KAFKA_BOOTSTRAP_SERVERS": self.kafka.bootstrap_servers,
            "ATLASCO_TOPIC_PARTITIONS": "4",
            "ATLASCO_RELAY_LEASE": "2s",
            "ATLASCO_RELAY_POLL": "50ms",
            "ATLASCO_RELAY_WATERMARK": "200ms",
            "ATLASCO_RELAY_IDLE_WATERMARK": "500ms",
            "ATLASCO_WAREHOUSE_DIR": str(self.directory / "warehouse"),
            "ATLASCO_LOAD_AGE": "300ms",
            "ATLASCO_LOAD_RETRY": "1s",
            "ATLASCO_LOAD_SESSION": "2s",
            # Compaction gets its share of the kills.
            "ATLASCO_WAREHOUSE_COMPACT_EVERY": "1s",
        }
        process = Program(name, ["cli.main", command], environment, self.directory / "logs" / f"{name}.log")
        self._resources.callback(process.stop)
        return process


@pytest.fixture
def rig() -> Iterator[Rig]:
    with TemporaryDirectory(prefix="atlasco-kills-") as directory, ExitStack() as resources:
        try:
            made = Rig(Path(directory), resources)
        except (JavaMissing, MavenMissing, JarsUnresolved) as error:
            need_pipeline(str(error))
        yield made


@pytest.mark.timeout(170)
@pytest.mark.parametrize("seed", [SEED])
def test_after_random_kills_every_store_has_every_reading_once(rig: Rig, seed: int) -> None:
    since = primary_clock(rig.dsn)
    fleets = [
        Fleet(
            FleetConfig(
                target=rig.target,
                tenant=tenant,
                devices=DEVICES,
                duration_s=None,
                rate=20.0,
                message_interval_s=0.5,
                # The audit of the ledgers takes a correction for a reading that came twice, so only one tenant has any.
                faults=FaultRates(corrected=0.1 if tenant == "two" else 0.0),
                seed=seed,
            )
        )
        for tenant in TENANTS
    ]
    kills = asyncio.run(_stream_and_kill(rig, fleets, random.Random(seed)))
    assert kills >= 7

    assert _shared_buckets(rig.dsn) > 0, "no transaction had records of both tenants in one bucket"
    primary = Primary(rig.dsn)
    for_the_log = LogStore(KafkaConfig(bootstrap_servers=rig.kafka.bootstrap_servers))
    try:
        for store in (WarehouseStore(rig.warehouse), for_the_log):
            result = verify(primary, store, patience_s=PATIENCE_S)
            assert result.readings > 0
            assert [str(difference) for difference in result.differences] == []
    finally:
        for_the_log.close()
    assert for_the_log.undecodable == 0
    for fleet in fleets:
        assert fleet.statistics().unacked == 0
        found = audit(rig.dsn, fleet.config.tenant, fleet.ledgers(), since=since, warehouse=rig.warehouse)
        assert found.lost == 0
        assert found.acked == found.stored == found.loaded > 0
        assert fleet.config.tenant == "two" or found.duplicated == 0


async def _stream_and_kill(rig: Rig, fleets: list[Fleet], rng: random.Random) -> int:
    """Stream throughout; returns how many processes were killed."""
    kills = 0

    def acked() -> int:
        return sum(fleet.statistics().acked for fleet in fleets)

    async def at_a_random_moment() -> None:
        """Measured in readings: however slow the machine is, something happens in between."""
        goal = acked() + rng.randint(100, 1200)
        await until(lambda: acked() >= goal, "readings are acked")

    async def keep_killing(process: Program, times: int) -> None:
        nonlocal kills
        for _ in range(times):
            await at_a_random_moment()
            process.kill()
            kills += 1
            await asyncio.to_thread(process.start)

    async def a_second(name: str, command: str) -> None:
        """Shares the work for a while, then dies without a successor."""
        nonlocal kills
        process = rig.process(f"second-{name}", command)
        await at_a_random_moment()
        await asyncio.to_thread(process.start)
        await at_a_random_moment()
        process.kill()
        kills += 1

    async def restart_kafka() -> None:
        await at_a_random_moment()
        await asyncio.to_thread(rig.kafka.kill)
        await asyncio.to_thread(rig.kafka.start)

    await asyncio.gather(*(asyncio.to_thread(p.start) for p in (rig.gateway, rig.relay, rig.loader)))
    async with asyncio.TaskGroup() as streaming:
        for fleet in fleets:
            streaming.create_task(fleet.run())
        async with asyncio.TaskGroup() as trouble:
            trouble.create_task(keep_killing(rig.relay, 2))
            trouble.create_task(keep_killing(rig.loader, 2))
            trouble.create_task(keep_killing(rig.gateway, 1))
            trouble.create_task(a_second("relay", "relay"))
            trouble.create_task(a_second("loader", "load"))
            trouble.create_task(restart_kafka())
        for fleet in fleets:
            fleet.stop()
    return kills


def _shared_buckets(dsn: str) -> int:
    """How many times a transaction changed readings of several tenants in one bucket."""
    tenants: defaultdict[tuple[bytes, int], set[int]] = defaultdict(set)
    with psycopg.connect(dsn) as connection:
        for (payload,) in connection.execute("SELECT payload FROM outbox"):
            for frame in change_pb2.OutboxPayload.FromString(payload).frames:
                batch = change_pb2.ChangeBatch.FromString(frame.change_batch)
                tenants[batch.batch_id, batch.bucket].add(batch.tenant_id)
    return sum(len(found) > 1 for found in tenants.values())
