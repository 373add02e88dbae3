"""The loader against a real broker and a real catalog: what it survives, the warehouse holds every reading, once."""

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from embedded.kafka import EmbeddedKafka
from embedded.ports import free_port
from embedded.postgres import EmbeddedPostgres
from runtime.metric_definitions import MetricName
from runtime.metrics import MemoryMetrics
from storage.kafka import BrokerUnavailable
from storage.loader.dead_letters import DeadLetterWriter, UndecodableRecord, dead_letter_topic
from storage.loader.process import log_end_of, redrive_dead_letters
from storage.loader.rebuild import rebuild_warehouse
from storage.warehouse.local import LocalWarehouse
from storage.warehouse.local_limits import LocalLimits
from storage.warehouse.port import Scope
from storage.warehouse.steps import Step
from tests.loader.loader_support import SHORT_SESSION_S, Log, Running, as_loader, loaded
from tests.waiting import PATIENCE_S, wait_until
from tests.warehouse_fixtures import (
    T0,
    Reading,
    Record,
    TestDatabase,
    change_record,
    doubles,
    expected,
    fresh_database,
    held,
    watermark_record,
)

NewLog = Callable[..., Log]


def test_the_log_arrives_with_watermarks_and_offsets(
    log: Log, database: TestDatabase, warehouse: LocalWarehouse, tmp_path: Path, running: Running
) -> None:
    readings: list[Reading] = [*doubles(50), (2, 2, T0, 7), (2, 3, T0, True), (2, 4, T0, "on")]
    log.write(change_record(readings), watermark_record(T0 + 5))
    loader = running.loader(log, database, tmp_path / "warehouse")
    wait_until(loaded(warehouse, [2]), "both records are loaded")
    assert held(warehouse) == expected(readings)
    assert warehouse.completeness().as_of_us == T0 + 5
    wait_until(lambda: log.committed() == 2, "kafka knows the offset")
    wait_until(lambda: loader.follower.not_ready is None, "the loader is ready")
    with psycopg.connect(database.dsn) as connection:
        rows = connection.execute(
            "SELECT lane, (extract(epoch FROM loaded_through) * 1000000)::bigint FROM loaded_lanes"
        ).fetchall()
    assert rows == [(0, T0 + 5)]
    running.stop()


def test_an_empty_hour_advances_the_as_of(
    log: Log, database: TestDatabase, warehouse: LocalWarehouse, tmp_path: Path, running: Running
) -> None:
    running.loader(log, database, tmp_path / "warehouse")
    for i in range(1, 4):
        log.write(watermark_record(i * 1000))
        wait_until(lambda i=i: warehouse.completeness().as_of_us == i * 1000, "the watermark is loaded")
    assert held(warehouse) == {}
    running.stop()


@pytest.mark.parametrize("step", ["decoded", "parquet-written", "copied", "committed", "offsets-committed"])
def test_killed_at_a_step(
    log: Log, database: TestDatabase, warehouse: LocalWarehouse, tmp_path: Path, running: Running, step: Step
) -> None:
    first, correction, second = doubles(200), [(1, 1, T0, -1.0)], doubles(100, entity=2)
    log.write(change_record(first), change_record(correction, revision=1), watermark_record(100))
    process = running.process(log, database, tmp_path / "warehouse", kill_at=step)
    assert process.wait(PATIENCE_S) == -signal.SIGKILL
    log.write(change_record(second), watermark_record(200))
    # In a group of its own, or it would wait until the dead one's session has run out: how a loader takes over within
    # the group is the next test's.
    running.loader(log, database, tmp_path / "warehouse", group="atlasco-loader-again-" + log.topic)
    wait_until(loaded(warehouse, [5]), "everything is loaded")
    assert held(warehouse) == expected(first, correction, second)
    assert warehouse.completeness().as_of_us == 200
    running.stop()
    warehouse.compact()
    files = sorted(path for path in (tmp_path / "warehouse").rglob("*") if path.suffix in {".parquet", ".unfinished"})
    assert len(files) == sum(size.files for size in warehouse.status().sizes), "orphans are collected"
    assert held(warehouse) == expected(first, correction, second)


def test_two_loaders_share_and_one_is_killed(
    new_log: NewLog, database: TestDatabase, warehouse: LocalWarehouse, tmp_path: Path, running: Running
) -> None:
    log = new_log(4)
    readings = [doubles(20, entity=i) for i in range(40)]
    process = running.process(log, database, tmp_path / "warehouse")
    running.loader(log, database, tmp_path / "warehouse", session_s=SHORT_SESSION_S)
    for i, group in enumerate(readings[:20]):
        log.write(change_record(group, partition=i % 4))
    wait_until(loaded(warehouse, [5] * 4), "the first half is loaded")
    process.send_signal(signal.SIGKILL)
    for i, group in enumerate(readings[20:]):
        log.write(change_record(group, partition=i % 4))
    wait_until(loaded(warehouse, [10] * 4), "the survivor loads the second half")
    assert held(warehouse) == expected(*readings)
    running.stop()


def test_a_rebalance_in_the_middle_of_a_load(
    new_log: NewLog, database: TestDatabase, warehouse: LocalWarehouse, tmp_path: Path, running: Running
) -> None:
    log = new_log(2)
    reached, go_on = threading.Event(), threading.Event()

    def at(step: Step) -> None:
        if step == "parquet-written" and not go_on.is_set():
            reached.set()
            assert go_on.wait(PATIENCE_S)

    groups = [doubles(30, entity=i) for i in range(6)]
    for i, group in enumerate(groups[:4]):
        log.write(change_record(group, partition=i % 2))
    running.loader(log, database, tmp_path / "warehouse", at=at, session_s=SHORT_SESSION_S)
    assert reached.wait(PATIENCE_S)
    running.loader(log, database, tmp_path / "warehouse", session_s=SHORT_SESSION_S)
    # One of the two partitions goes to the second loader, which loads it while the first one's load still stands.
    wait_until(lambda: any(offset > 0 for offset in _offsets(warehouse)), "the second loader loads")
    go_on.set()
    for i, group in enumerate(groups[4:]):
        log.write(change_record(group, partition=i % 2))
    wait_until(loaded(warehouse, [3, 3]), "everything is loaded")
    assert held(warehouse) == expected(*groups)
    running.stop()


def _offsets(warehouse: LocalWarehouse) -> list[int]:
    return [state.next_offset for state in warehouse.states().values()]


def test_records_that_come_again_load_once(
    log: Log, database: TestDatabase, warehouse: LocalWarehouse, tmp_path: Path, running: Running
) -> None:
    records = [change_record(doubles(10, entity=i)) for i in range(5)]
    loader = running.loader(log, database, tmp_path / "warehouse")
    log.write(*records)
    wait_until(loaded(warehouse, [5]), "they are loaded")
    log.write(*records, change_record(doubles(3, entity=9)))
    wait_until(loaded(warehouse, [11]), "they are passed over")
    assert held(warehouse) == expected(*(doubles(10, entity=i) for i in range(5)), doubles(3, entity=9))
    assert loader.metrics.value("atlasco_loader_duplicates") == 5
    running.stop()


def test_records_of_one_transaction_are_told_apart(
    log: Log, database: TestDatabase, warehouse: LocalWarehouse, tmp_path: Path, running: Running
) -> None:
    one, other = doubles(10), doubles(10, entity=2)
    batch: dict[str, Any] = {"batch_id": b"t" * 16, "bucket": 3}
    gone = [(*one[0][:3], None)]
    records = [
        change_record(one, **batch),
        change_record(other, **batch, tenant=2),
        change_record(gone, **batch, deletes=True),
    ]
    loader = running.loader(log, database, tmp_path / "warehouse")
    log.write(*records)
    wait_until(loaded(warehouse, [3]), "all are loaded")
    assert held(warehouse) == expected(one, gone) | expected(other, tenant=2)
    assert loader.metrics.value("atlasco_loader_duplicates") == 0
    log.write(*records)
    wait_until(loaded(warehouse, [6]), "they come again")
    wait_until(lambda: loader.metrics.value("atlasco_loader_duplicates") == 3, "each is recognised")
    assert held(warehouse) == expected(one, gone) | expected(other, tenant=2)
    running.stop()


def test_two_writers_of_one_key_out_of_order(
    log: Log, database: TestDatabase, warehouse: LocalWarehouse, tmp_path: Path, running: Running
) -> None:
    key = (1, 1, T0)
    running.loader(log, database, tmp_path / "warehouse")
    log.write(change_record([(*key, 2.0)], revision=2))
    wait_until(loaded(warehouse, [1]), "the later correction is loaded first")
    log.write(change_record([(*key, 1.0)], revision=1))
    wait_until(loaded(warehouse, [2]), "then the earlier one")
    log.write(change_record([(*key, 0.0)]))
    wait_until(loaded(warehouse, [3]), "then the first value")
    assert held(warehouse) == {(1, *key): 2.0}
    warehouse.compact()
    assert held(warehouse) == {(1, *key): 2.0}
    running.stop()


def test_kafka_restarted(
    log: Log, kafka: EmbeddedKafka, database: TestDatabase, warehouse: LocalWarehouse, tmp_path: Path, running: Running
) -> None:
    running.loader(log, database, tmp_path / "warehouse")
    log.write(change_record(doubles(10)))
    wait_until(loaded(warehouse, [1]), "the first record is loaded")
    kafka.kill()
    kafka.start()
    log.write(change_record(doubles(10, entity=2)))
    wait_until(loaded(warehouse, [2]), "the second record is loaded")
    assert held(warehouse) == expected(doubles(10), doubles(10, entity=2))
    running.stop()


def test_the_warehouse_is_away_for_a_while(
    log: Log,
    postgres: EmbeddedPostgres,
    database: TestDatabase,
    warehouse: LocalWarehouse,
    tmp_path: Path,
    running: Running,
) -> None:
    loader = running.loader(log, database, tmp_path / "warehouse")
    log.write(change_record(doubles(10)))
    wait_until(loaded(warehouse, [1]), "the first record is loaded")
    postgres.kill()
    log.write(change_record(doubles(10, entity=2)))
    wait_until(lambda: loader.metrics.value("atlasco_loader_retries") > 0, "loads fail")
    assert loader.follower.not_ready is not None
    postgres.start()
    wait_until(loaded(warehouse, [2]), "the second record is loaded")
    assert held(warehouse) == expected(doubles(10), doubles(10, entity=2))
    running.stop()


def test_memory_is_bounded(
    log: Log, database: TestDatabase, warehouse: LocalWarehouse, tmp_path: Path, running: Running
) -> None:
    go_on = threading.Event()

    def at(step: Step) -> None:
        if step == "parquet-written":
            assert go_on.wait(PATIENCE_S)

    loader = running.loader(
        log, database, tmp_path / "warehouse", at=at, age_s=0.05, size_bytes=50_000, memory_bytes=200_000
    )
    groups = [doubles(100, entity=i) for i in range(100)]
    log.write(*(change_record(group) for group in groups))
    # One poll brings at most 500 records; here all come within one or two, so the bound is passed by no more than that.
    wait_until(lambda: loader.metrics.value("atlasco_loader_buffer_bytes") >= 200_000, "the bound is reached")
    go_on.set()
    wait_until(loaded(warehouse, [100]), "everything is loaded")
    assert held(warehouse) == expected(*groups)
    running.stop()


def test_the_lag_counts_records_and_seconds(
    new_log: NewLog, database: TestDatabase, warehouse: LocalWarehouse, tmp_path: Path, running: Running
) -> None:
    log = new_log(2)
    reached, go_on = threading.Event(), threading.Event()

    def at(step: Step) -> None:
        if step == "parquet-written":
            reached.set()
            assert go_on.wait(PATIENCE_S)

    def now_us() -> int:
        """The primary's clock."""
        with psycopg.connect(database.dsn) as connection:
            row = connection.execute("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint").fetchone()
        assert row is not None
        return int(row[0])

    minute_ago = now_us() - 60_000_000
    log.write(*(change_record(doubles(1, entity=i), partition=i % 2) for i in range(7)))
    loader = running.loader(log, database, tmp_path / "warehouse", at=at)
    metrics = loader.metrics
    assert reached.wait(PATIENCE_S)
    # Read and not loaded is lag, too.
    wait_until(lambda: _known(metrics, "atlasco_loader_lag_records") == 7, "all of them lag")
    assert _known(metrics, "atlasco_loader_behind_seconds") is None, "nothing is known to be complete yet"
    go_on.set()
    log.write(*(watermark_record(minute_ago, partition=p, partitions=2) for p in range(2)))
    wait_until(loaded(warehouse, [5, 4]), "everything is loaded")
    wait_until(lambda: _known(metrics, "atlasco_loader_lag_records") == 0, "none lags")
    behind = wait_until(lambda: _known(metrics, "atlasco_loader_behind_seconds"), "the lateness is known")
    # A second for clocks that do not run alike.
    assert 60 <= behind < (now_us() - minute_ago) / 1e6 + 1
    assert (_known(metrics, "atlasco_loader_behind_seconds") or 0) > behind, "it grows by itself"
    running.stop()


def _known(metrics: MemoryMetrics, name: MetricName) -> float | None:
    """A gauge's value; None where it is left out."""
    try:
        return metrics.value(name)
    except LookupError:
        return None


def test_dead_letter_and_redrive(
    log: Log, database: TestDatabase, warehouse: LocalWarehouse, tmp_path: Path, running: Running
) -> None:
    good, lost = doubles(10), doubles(5, entity=2)
    torn = change_record(lost, bucket=3)
    broken = Record(torn.value[:-7], torn.headers, torn.key)
    loader = running.loader(log, database, tmp_path / "warehouse")
    log.write(change_record(good), broken, Record(b"?", [("kind", b"riddle")], b"1:4"), watermark_record(50))
    wait_until(loaded(warehouse, [4]), "the rest is not held up")
    assert held(warehouse) == expected(good)
    assert loader.metrics.value("atlasco_loader_dead_letters") == 2
    incomplete = warehouse.completeness(Scope(tenant_id=1)).incomplete
    assert [(letter.offset, letter.tenant_id, letter.bucket) for letter in incomplete] == [(1, 1, 3), (2, 1, 4)]
    assert warehouse.completeness(Scope(tenant_id=2)).incomplete == ()
    running.stop()
    first = redrive_dead_letters(log.settings, warehouse)
    assert (first.loaded, first.still_undecodable, first.missing) == (0, 2, 0)
    # Repaired copies, under the positions of the broken ones.
    position = [("dead-letter-partition", b"0"), ("dead-letter-offset", b"1")]
    other = [("dead-letter-partition", b"0"), ("dead-letter-offset", b"2")]
    letters = Log(log.kafka, log.topic + ".dead-letter", 1)
    more = doubles(2, entity=3)
    fixed = change_record(more, bucket=4)
    letters.write(
        Record(torn.value, torn.headers + position, torn.key), Record(fixed.value, fixed.headers + other, fixed.key)
    )
    assert redrive_dead_letters(log.settings, warehouse).loaded == 2
    assert held(warehouse) == expected(good, lost, more)
    assert warehouse.completeness().incomplete == ()
    assert redrive_dead_letters(log.settings, warehouse).loaded == 0


def letters_of(log: Log, servers: str) -> DeadLetterWriter:
    """A writer whose producer holds ten records."""
    producer = Producer({"bootstrap.servers": servers, "queue.buffering.max.messages": 10})
    return DeadLetterWriter(producer, AdminClient({"bootstrap.servers": log.kafka.bootstrap_servers}), log.topic)


def riddles(count: int) -> list[UndecodableRecord]:
    return [UndecodableRecord(0, offset, None, b"?", (), "a riddle") for offset in range(count)]


def test_more_dead_letters_than_the_producer_holds(log: Log) -> None:
    letters_of(log, log.kafka.bootstrap_servers).write("topic", riddles(200), PATIENCE_S)
    consumer = Consumer({"bootstrap.servers": log.kafka.bootstrap_servers, "group.id": "counting"})
    try:
        ends = consumer.get_watermark_offsets(TopicPartition(dead_letter_topic(log.topic), 0), timeout=PATIENCE_S)
    finally:
        consumer.close()
    assert ends == (0, 200)


def test_more_dead_letters_than_the_producer_holds_and_no_broker(log: Log) -> None:
    letters = letters_of(log, f"127.0.0.1:{free_port()}")
    # Beforehand, or making it might take all the time.
    letters._make_topic(PATIENCE_S)
    with pytest.raises(BrokerUnavailable):
        letters.write("topic", riddles(20), 0.3)


def test_a_gap_at_the_log_start_halts_until_the_rebuild(
    new_log: NewLog, postgres: EmbeddedPostgres, tmp_path: Path, running: Running
) -> None:
    log = new_log(2)
    with fresh_database(postgres) as database:
        warehouse = LocalWarehouse(tmp_path / "warehouse", database.dsn)
        warehouse.init()
        first, missed, later = doubles(5), doubles(5, entity=3), doubles(5, entity=5)
        running.loader(log, database, tmp_path / "warehouse")
        log.write(change_record(first), watermark_record(100), change_record([(2, 1, T0, 1.0)], partition=1))
        wait_until(loaded(warehouse, [2, 1]), "the beginning is loaded")
        running.stop()
        log.write(change_record(missed), change_record(later))
        log.remove_before(0, 3)
        loader = running.loader(log, database, tmp_path / "warehouse")
        wait_until(lambda: "rebuild" in (loader.follower.not_ready or ""), "the loader halts")
        wait_until(lambda: warehouse.completeness().halted, "the warehouse knows it too")
        assert warehouse.completeness().halted == ("records 2 to 2 were removed from the log before they were loaded",)
        assert loader.metrics.value("atlasco_loader_halted_partitions") == 1
        log.write(change_record([(2, 1, T0 + 1, 2.0)], partition=1))
        wait_until(lambda: warehouse.states()[1].next_offset == 2, "the other partition goes on")
        assert len(held(warehouse)) == 7
        history = _Postgres(database)
        history.write("double", 1, [*first, *missed, *later, (2, 1, T0, 1.0), (2, 1, T0 + 1, 2.0)])
        history.rebuild(log, warehouse)
        wait_until(lambda: loader.follower.not_ready is None, "the loader goes on by itself")
        after = doubles(2, entity=7)
        log.write(change_record(after, xid=10**9))
        wait_until(lambda: 7 in {key[1] for key in held(warehouse)}, "what comes later is loaded")
        assert held(warehouse) == expected(first, missed, later, [(2, 1, T0, 1.0), (2, 1, T0 + 1, 2.0)], after)
        running.stop()
        warehouse.close()


def test_a_topic_made_anew_halts_until_the_rebuild(
    log: Log, postgres: EmbeddedPostgres, tmp_path: Path, running: Running
) -> None:
    with fresh_database(postgres) as database:
        warehouse = LocalWarehouse(tmp_path / "warehouse", database.dsn)
        warehouse.init()
        loader = running.loader(log, database, tmp_path / "warehouse")
        log.write(change_record(doubles(5)), change_record(doubles(5, entity=2)))
        wait_until(loaded(warehouse, [2]), "the old topic is loaded")
        log.delete()
        log.create()
        # As many records as the old one had and more: the offsets alone would fit.
        log.write(*(change_record([(4, 1, T0 + i, 0.0)]) for i in range(5)))
        wait_until(lambda: "made anew" in (loader.follower.not_ready or ""), "the loader halts")
        assert held(warehouse) == expected(doubles(5), doubles(5, entity=2))
        history = _Postgres(database)
        everything = [*doubles(5), *doubles(5, entity=2), *((4, 1, T0 + i, 0.0) for i in range(5))]
        history.write("double", 1, everything)
        history.write("text", 2, [(4, 2, T0, 'two\nlines, "quoted"'), (4, 2, T0 + 1, "")])
        history.rebuild(log, warehouse)
        wait_until(lambda: loader.follower.not_ready is None, "the loader goes on by itself")
        assert held(warehouse) == expected(everything, [(4, 2, T0, 'two\nlines, "quoted"'), (4, 2, T0 + 1, "")])
        running.stop()
        warehouse.close()


def test_a_log_that_begins_late_halts_at_once(
    log: Log, database: TestDatabase, warehouse: LocalWarehouse, tmp_path: Path, running: Running
) -> None:
    log.write(change_record(doubles(5)), change_record(doubles(5, entity=2)))
    log.remove_before(0, 1)
    loader = running.loader(log, database, tmp_path / "warehouse")
    wait_until(lambda: "before they were ever loaded" in (loader.follower.not_ready or ""), "the loader halts")
    wait_until(lambda: warehouse.completeness().halted, "the warehouse knows it too")
    assert held(warehouse) == {}
    running.stop()


def test_changes_of_the_rebuilds_own_snapshot_are_passed_over(
    log: Log, postgres: EmbeddedPostgres, tmp_path: Path, running: Running
) -> None:
    with fresh_database(postgres) as database:
        warehouse = LocalWarehouse(tmp_path / "warehouse", database.dsn)
        warehouse.init()
        history = _Postgres(database)
        xid = history.write("double", 1, doubles(5))
        history.rebuild(log, warehouse)
        # Published late: the outbox row of the very transaction that the snapshot holds, then one after it.
        later = [(1, 1, T0, 99.0)]
        log.write(
            change_record(doubles(5), xid=xid),
            Record(b"torn", change_record(doubles(1), xid=xid).headers, b"1:0"),
            change_record(later, revision=1, xid=xid + 1000),
            watermark_record(4 * 10**15, lanes=1),
        )
        running.loader(log, database, tmp_path / "warehouse")
        wait_until(loaded(warehouse, [4]), "the log is read")
        assert held(warehouse) == expected(doubles(5), later)
        assert warehouse.completeness().incomplete == ()
        assert warehouse.states()[0].rebuild is None
        running.stop()
        warehouse.close()


def test_the_loaders_role_may_do_what_a_loader_does_and_no_more(
    log: Log, postgres: EmbeddedPostgres, tmp_path: Path, running: Running
) -> None:
    with fresh_database(postgres) as owned:
        database = as_loader(owned)
        with psycopg.connect(database.dsn, autocommit=True) as connection:
            for forbidden in (
                "DELETE FROM outbox",
                "DELETE FROM loaded_lanes",
                "UPDATE tenants SET name = name",
                "INSERT INTO entity_attributes_double DEFAULT VALUES",
                "CREATE TABLE warehouse.mine ()",
            ):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    connection.execute(forbidden)
        warehouse = LocalWarehouse(tmp_path / "warehouse", database.dsn, limits=LocalLimits(grace_s=0.0))
        warehouse.init()
        good, lost = doubles(10), doubles(5, entity=2)
        torn = change_record(lost)
        loader = running.loader(log, database, tmp_path / "warehouse")
        log.write(
            change_record(good),
            change_record([(*good[0][:3], -1.0)], revision=1),
            Record(torn.value[:-7], torn.headers, torn.key),
            watermark_record(100),
        )
        wait_until(loaded(warehouse, [4]), "everything is loaded")
        wait_until(lambda: loader.metrics.value("atlasco_loader_dead_letters") == 1, "the torn record is set aside")
        with psycopg.connect(database.dsn) as connection:
            wait_until(lambda: connection.execute("SELECT 1 FROM loaded_lanes").fetchall(), "the progress is reported")
        dead = ("dead-letter-topic-id", b"-"), ("dead-letter-partition", b"0"), ("dead-letter-offset", b"2")
        Log(log.kafka, log.topic + ".dead-letter", 1).write(Record(torn.value, [*torn.headers, *dead], torn.key))
        assert redrive_dead_letters(log.settings, warehouse).loaded == 1
        assert warehouse.compact().corrections_folded == 1
        assert warehouse.expire(good[1][2]).rows_expired == 2
        assert held(warehouse) == expected(good[1:], lost[1:])
        history = _Postgres(owned)
        history.write("double", 1, good)
        history.rebuild(log, warehouse, database.dsn)
        assert held(warehouse) == expected(good)
        log.write(change_record(lost, xid=10**9))
        wait_until(lambda: 2 in {key[1] for key in held(warehouse)}, "the loader goes on after the rebuild")
        assert warehouse.status().generation == 2
        running.stop()
        warehouse.close()


class _Postgres:
    """The operational database, written by hand."""

    def __init__(self, database: TestDatabase) -> None:
        self.dsn = database.dsn
        with psycopg.connect(self.dsn) as connection:
            connection.execute(
                "INSERT INTO tenants (tenant_id, name, window_past, retention) "
                "VALUES (1, 'tenant-1', '20 years', '20 years')"
            )

    def write(self, of_type: str, attribute: int, readings: list[Any]) -> int:
        """Insert readings, as first values; returns the transaction id."""
        with psycopg.connect(self.dsn) as connection, connection.cursor() as cursor:
            cursor.execute(
                "SELECT ensure_history(1, timestamptz 'epoch' + %(ts)s * interval '1 us', "
                "timestamptz 'epoch' + (%(ts)s + 86400000000) * interval '1 us')",
                {"ts": T0},
            )
            cursor.execute(
                "INSERT INTO attributes (tenant_id, attribute_id, name, type) VALUES (1, %s, %s, %s) "
                "ON CONFLICT DO NOTHING",
                (attribute, f"attribute-{attribute}", of_type),
            )
            cursor.executemany(
                "INSERT INTO entities (tenant_id, entity_id, external_id) VALUES (1, %s, %s) ON CONFLICT DO NOTHING",
                sorted({(entity, f"device-{entity}") for entity, _, _, _ in readings}),
            )
            cursor.executemany(
                f"INSERT INTO entity_attributes_{of_type} (tenant_id, entity_id, attribute_id, ts, value) "
                "VALUES (1, %s, %s, timestamptz 'epoch' + %s * interval '1 us', %s)",
                [(entity, attribute, ts, value) for entity, _, ts, value in readings],
            )
            return int(cursor.execute("SELECT pg_current_xact_id()::text::bigint").fetchone()[0])  # type: ignore[index]

    def rebuild(self, log: Log, warehouse: LocalWarehouse, dsn: str = "") -> None:
        rebuild_warehouse(dsn or self.dsn, warehouse, log_end_of(log.settings), lambda _: None)
