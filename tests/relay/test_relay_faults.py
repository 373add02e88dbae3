"""Deaths, outages and replacements: at least once, and the set equals the outbox."""

import asyncio
import http.client
import os
import signal
from collections import Counter

from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource

from embedded.ports import free_port
from runtime.metrics import MemoryMetrics
from tests.relay.relay_support import LANES, Bench, running, stop
from tests.waiting import PATIENCE_S, eventually


def arrived(bench: Bench) -> bool:
    return bench.read().contents() == bench.outbox()


async def test_kill_9_between_produce_and_mark(bench: Bench) -> None:
    # Who lost its lease could not take its lanes again while their rows are locked; and the end of it is waited for.
    process = bench.relay_process(ATLASCO_RELAY_LEASE="15s")
    bench.write(8)
    await eventually(lambda: arrived(bench), "the first batches")
    await eventually(
        lambda: (
            bench.one("SELECT count(*) FROM relay_lanes WHERE target IS NULL AND published_through IS NOT NULL")
            == LANES
        ),
        "the cursors stored",
    )
    stored = bench.one("SELECT array_agg(published::text ORDER BY lane) FROM relay_lanes")
    with bench.connect() as connection:
        # Nobody can move a cursor while these rows are locked: the relay produces and then waits to mark.
        stored = connection.execute(
            "SELECT array_agg(published::text ORDER BY lane) FROM (SELECT * FROM relay_lanes FOR UPDATE) l"
        ).fetchone()
        # One for each lane: of two it could produce the first by itself, and would then wait with the second.
        bench.write(LANES)
        await eventually(lambda: arrived(bench), "the second batches, produced and not marked")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        # Its last statement still waits in the server for the lock; end it as the server would find it dead.
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'atlasco-relay' AND datname = current_database()"
        )
    await eventually(
        lambda: (
            not bench.one(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'atlasco-relay' "
                "AND datname = current_database()"
            )
        ),
        "the dead relay's sessions gone",
    )
    now = bench.one("SELECT array_agg(published::text ORDER BY lane) FROM relay_lanes")
    assert stored is not None and now == stored[0]
    second = bench.relay_process(ATLASCO_RELAY_LEASE="15s")
    bench.write(4)
    await eventually(lambda: arrived(bench), "everything, after the restart")
    await eventually(lambda: 2 in bench.read().seen().values(), "the unmarked batches again")
    # Once by each that held the lane: two, or a few more where a busy machine cost the second one its lease.
    assert max(bench.log.seen().values()) <= 4
    assert stop(second) == 0


async def test_kafka_restarted_while_data_flows(bench: Bench) -> None:
    async with running(bench.relay()):
        bench.write(20)
        await eventually(lambda: arrived(bench), "the first batches")
        writing = asyncio.create_task(asyncio.to_thread(bench.write, 600))
        await asyncio.to_thread(bench.kafka.restart)
        await writing
        await eventually(lambda: arrived(bench), "everything, after the broker's restart", patience_s=120)
        committed_by = bench.now_us()
        await eventually(lambda: (bench.read().complete_through() or 0) > committed_by, "watermarks")


async def test_kafka_killed_and_down_while_ingest_goes_on(bench: Bench) -> None:
    metrics = MemoryMetrics()
    async with running(bench.relay(metrics, delivery_timeout_s=2.0)):
        bench.write(20)
        await eventually(lambda: arrived(bench), "the first batches")
        # They may be in the topic before the relay hears of it.
        await eventually(lambda: metrics.value("atlasco_relay_batches_published") == 20, "the broker's word for them")
        await eventually(lambda: metrics.value("atlasco_outbox_batches", lane="0") == 0, "the cursors behind them")
        await asyncio.to_thread(bench.kafka.kill)
        try:
            await asyncio.to_thread(bench.write, 200)
            await eventually(
                lambda: metrics.value("atlasco_relay_failures", source="kafka") >= LANES, "failures are counted"
            )
            await eventually(lambda: metrics.value("atlasco_outbox_oldest_seconds", lane="0") > 2, "the age shows")
            assert metrics.value("atlasco_outbox_batches", lane="0") == 50
            assert metrics.value("atlasco_outbox_bytes") > 0
            published = metrics.value("atlasco_relay_batches_published")
            assert published == 20
        finally:
            await asyncio.to_thread(bench.kafka.start)
        await eventually(lambda: arrived(bench), "everything, once the broker is back")
        await eventually(lambda: metrics.value("atlasco_outbox_batches", lane="0") == 0, "nothing waits")
    assert metrics.value("atlasco_relay_batches_published") == 220


async def test_the_end_is_asked_for_while_kafka_is_down(bench: Bench) -> None:
    # A part of it is what pages have to end in.
    process = bench.relay_process(ATLASCO_RELAY_LEASE="9s")
    bench.write(8)
    await eventually(lambda: arrived(bench), "the first batches")
    await asyncio.to_thread(bench.kafka.kill)
    try:
        bench.write(8)
        # Its pages are on their way to a broker that is not there.
        assert await asyncio.to_thread(stop, process) == 0
        assert bench.one("SELECT count(*) FROM leases WHERE holder IS NOT NULL") == 0
    finally:
        await asyncio.to_thread(bench.kafka.start)
    async with running(bench.relay()):
        await eventually(lambda: arrived(bench), "everything, by the next relay")


async def test_two_relays_share_the_lanes_and_one_dies(bench: Bench) -> None:
    holders = "SELECT array_agg(n ORDER BY n) FROM (SELECT count(*) n FROM leases GROUP BY holder) h"
    epochs = "SELECT array_agg(epoch ORDER BY item) FROM leases"
    # Long, so that a busy machine takes no lane from one that lives, and waited for when one dies.
    lease = {"ATLASCO_RELAY_LEASE": "10s"}
    first = bench.relay_process(**lease)
    await eventually(lambda: bench.one(holders) == [4], "all lanes at the first relay")
    second = bench.relay_process(**lease)
    await eventually(lambda: bench.one(holders) == [2, 2], "the lanes shared")
    shared = bench.one(epochs)
    bench.write(40)
    await eventually(lambda: arrived(bench), "batches by two relays")
    # Unless it took one all the same.
    assert set(bench.log.seen().values()) == {1} or bench.one(epochs) != shared
    first.kill()
    bench.write(40)
    await eventually(lambda: arrived(bench), "the dead relay's lanes taken over")
    third = bench.relay_process(**lease)
    await eventually(lambda: bench.one(holders) == [2, 2], "the lanes shared again")
    assert stop(third) == 0
    # Said goodbye: its lanes are taken at once.
    await eventually(lambda: bench.one(holders) == [4], "the lanes of the one that left")
    assert stop(second) == 0
    assert bench.one("SELECT count(*) FROM leases WHERE holder IS NOT NULL") == 0
    # Every change of hands shows in the watermarks, and none was marked under a token that nobody held.
    assert all(len({m.lease_epoch for m in bench.log.watermarks() if m.lane == lane}) >= 2 for lane in range(LANES))


async def test_the_database_restarts(bench: Bench) -> None:
    async with running(bench.relay()):
        bench.write(20)
        await eventually(lambda: arrived(bench), "the first batches")
        await asyncio.to_thread(bench.postgres.restart)
        bench.write(20)
        await eventually(lambda: arrived(bench), "everything, after the server's restart")


async def test_a_topic_made_again_gets_the_whole_outbox(bench: Bench) -> None:
    async with running(bench.relay()):
        bench.write(20)
        await eventually(lambda: arrived(bench), "the first batches")
    topic = bench.kafka_config.topic
    admin = AdminClient({"bootstrap.servers": bench.kafka.bootstrap_servers})
    await asyncio.wrap_future(admin.delete_topics([topic])[topic])
    await eventually(lambda: topic not in admin.list_topics(timeout=PATIENCE_S).topics, "the topic gone")
    bench.write(20)
    metrics = MemoryMetrics()
    bench.forget_topic()
    async with running(bench.relay(metrics)):
        await eventually(lambda: arrived(bench), "everything in the new topic")
    assert metrics.value("atlasco_relay_rewinds", reason="rewind") == LANES


async def test_rows_copied_from_another_server_are_renumbered(bench: Bench) -> None:
    bench.write(20)
    async with running(bench.relay()):
        await eventually(lambda: arrived(bench), "the first batches")
    with bench.connect() as connection:
        # As a logical restore leaves it: ids of a server that was far ahead, and a cursor in their terms.
        connection.execute("UPDATE outbox SET xid = (xid::text::bigint + 4000000000)::text::xid8")
        connection.execute(
            "UPDATE relay_lanes SET server = 'another', published = '4100000000:4100000000:', "
            "loaded = '4100000000:4100000000:'"
        )
    bench.write(20)
    metrics = MemoryMetrics()
    async with running(bench.relay(metrics)):
        await eventually(lambda: arrived(bench), "old and new rows")
    assert metrics.value("atlasco_relay_rewinds", reason="renumber") == LANES
    assert bench.one("SELECT count(DISTINCT loaded::text) FROM relay_lanes WHERE loaded::text = '3:3:'") == 1


async def test_the_topics_limit_is_lowered_under_way(bench: Bench) -> None:
    async with running(bench.relay()):
        bench.write(8)
        await eventually(lambda: arrived(bench), "the first batches")
        admin = AdminClient({"bootstrap.servers": bench.kafka.bootstrap_servers})
        resource = ConfigResource(
            ConfigResource.Type.TOPIC,
            bench.kafka_config.topic,
            incremental_configs=[
                ConfigEntry("max.message.bytes", "20000", incremental_operation=AlterConfigOpType.SET)
            ],
        )
        await asyncio.wrap_future(admin.incremental_alter_configs([resource])[resource])
        # Not compressible below the limit.
        values = [float.fromhex(f"0x1.{os.urandom(6).hex()}p3") for _ in range(20_000)]
        await asyncio.to_thread(bench.write, 4, values=values)
        await eventually(lambda: arrived(bench), "batches split for the new limit")
    assert Counter(b.part > 1 for b in bench.log.batches())[True] >= 12


async def test_the_admin_port_tells_readiness_and_counts(bench: Bench) -> None:
    port = free_port()
    process = bench.relay_process(ATLASCO_ADMIN_LISTEN=f"127.0.0.1:{port}")
    bench.write(8)

    def get(path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except OSError:
            return 0, ""
        finally:
            connection.close()

    await eventually(lambda: get("/readyz")[0] == 200, "the relay ready")
    await eventually(lambda: "atlasco_relay_batches_published_total 8.0" in get("/metrics")[1], "the batches counted")
    await eventually(lambda: "atlasco_relay_lanes_held 4.0" in get("/metrics")[1], "the lanes held")
    assert stop(process) == 0
