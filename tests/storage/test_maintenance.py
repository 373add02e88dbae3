"""Maintenance: ahead, behind, terms; resumable, and out of the way of writers and readers."""

import asyncio
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from storage.errors import StorageUnavailable
from storage.maintenance import MaintenanceOptions, MaintenanceReport, MaintenanceRunning, maintain
from tests.storage.conftest import INGEST_LOGIN, Database
from tests.waiting import PATIENCE_S

TYPES = ("double", "bigint", "boolean", "text")
VALUES = {"double": "1.5", "bigint": "2", "boolean": "true", "text": "'x'"}
IMPATIENT = MaintenanceOptions(lock_timeout_s=0.05, attempts=2)
DAY = timedelta(days=1)


def execute(database: Database, query: str, *parameters: object) -> list[tuple[object, ...]]:
    with psycopg.connect(database(), autocommit=True) as connection:
        cursor = connection.execute(query.encode(), parameters)
        return cursor.fetchall() if cursor.description else []


def number(database: Database, query: str, *parameters: object) -> int:
    [(value,)] = execute(database, query, *parameters)
    assert isinstance(value, int)
    return value


def make_tenant(database: Database, name: str, *, days: int = 90, dedicated: bool = False) -> int:
    """A tenant whose window is as wide as its retention, so that old readings can be put there."""
    tenant = number(database, "SELECT register_tenant(%s, %s)", name, dedicated)
    execute(
        database,
        "UPDATE tenants SET retention = %s, window_past = %s WHERE tenant_id = %s",
        timedelta(days=days),
        timedelta(days=days),
        tenant,
    )
    return tenant


def shorten(database: Database, tenant: int, days: int) -> None:
    execute(
        database,
        "UPDATE tenants SET retention = %s, window_past = '1 day' WHERE tenant_id = %s",
        timedelta(days=days),
        tenant,
    )


def put(database: Database, tenant: int, age_days: float, *, readings: int = 1) -> None:
    """Readings of every type at that age, with the range they need."""
    execute(
        database,
        "SELECT ensure_history(%s, now() - %s, now() - %s + interval '1 second')",
        tenant,
        age_days * DAY,
        age_days * DAY,
    )
    for value_type in TYPES:
        execute(
            database,
            f"INSERT INTO entity_attributes_{value_type} SELECT %s, 1, n, now() - %s, {VALUES[value_type]}"
            "  FROM generate_series(1, %s) n",
            tenant,
            age_days * DAY,
            readings,
        )


def readings(database: Database, tenant: int) -> list[int]:
    """How many readings of every type there are, by age in days, oldest first."""
    return [
        count
        for (count,) in execute(
            database,
            "SELECT count(*) FROM entity_attributes WHERE tenant_id = %s GROUP BY ts::date ORDER BY ts::date",
            tenant,
        )
        if isinstance(count, int)
    ]


def leaves(database: Database) -> int:
    """Time ranges that have at least one table, attached or not."""
    return number(
        database,
        "SELECT count(DISTINCT h.suffix) FROM history_partitions h JOIN pg_class c"
        "    ON c.relname LIKE 'entity\\_attributes\\_%%' AND right(c.relname, length(h.suffix)) = h.suffix"
        "   AND c.relkind = 'r'",
    )


async def no_pause(_: float) -> None:
    await asyncio.sleep(0)


async def run(database: Database, options: MaintenanceOptions | None = None) -> MaintenanceReport:
    return await maintain(database(), options, pause=no_pause)


# -- ahead


async def test_ranges_are_made_from_the_window_to_ahead_for_slots_with_tenants(database: Database) -> None:
    execute(database, "SELECT register_tenant('a'), register_tenant('b', true)")
    report = await run(database, MaintenanceOptions(ahead_s=2 * 86400))
    spans = execute(
        database,
        "SELECT min(ts_from) <= now() - interval '7 days', max(ts_to) >= now() + interval '2 days', count(*)::int"
        "  FROM history_partitions GROUP BY tenant_from",
    )
    assert [(early, late) for early, late, _ in spans] == [(True, True)] * 2
    assert report.ranges_made == sum(count for _, _, count in spans if isinstance(count, int))
    assert report.problems == ()
    for hours in (0, 1, 47):
        execute(
            database,
            "INSERT INTO outbox (created_at, lane, batch_id, changes, tenant_ids, min_ts, max_ts, payload)"
            " VALUES (now() + make_interval(hours => %s), 0, gen_random_uuid(), 0, '{}', '{}', '{}', '')",
            hours,
        )


async def test_a_second_run_has_nothing_to_do(database: Database) -> None:
    execute(database, "SELECT register_tenant('a')")
    assert (await run(database)).ranges_made > 0
    report = await run(database)
    # One more of the outbox where the hour turned in between.
    assert report.ranges_made == 0 and report.outbox_partitions_made <= 1
    assert (report.ranges_retired, report.tables_dropped, dict(report.deleted)) == ((), 0, {})


async def test_a_database_without_tenants_is_fine(database: Database) -> None:
    report = await run(database)
    assert report.ranges_made == 0
    assert report.outbox_partitions_made > 70
    assert report.outbox.oldest is None


async def test_a_window_of_decades_does_not_make_decades_of_empty_tables(database: Database) -> None:
    make_tenant(database, "archive", days=20 * 365)
    assert (await run(database)).ranges_made < 45


async def test_a_full_slot_is_a_problem_and_the_others_are_served(database: Database) -> None:
    full, other = (make_tenant(database, name, days=3, dedicated=True) for name in ("full", "other"))
    execute(
        database,
        "INSERT INTO history_partitions SELECT %s, %s, at, at + interval '1 hour', 'fake' || n"
        "  FROM generate_series(1, 2000) n, LATERAL (SELECT now() + n * interval '10 days' AS at) a",
        full,
        full + 1,
    )
    report = await run(database)
    assert len(report.problems) == 1
    assert "2000 ranges" in report.problems[0]
    put(database, other, 0)


# -- behind


async def test_ranges_past_the_longest_retention_of_their_slot_go_for_good(database: Database) -> None:
    tenant = make_tenant(database, "a")
    for age in (0, 20, 29, 33, 60, 80):
        put(database, tenant, age)
    shorten(database, tenant, 30)
    report = await run(database)
    retired = number(database, "SELECT count(*) FROM history_partitions WHERE retired_at IS NOT NULL")
    assert len(report.ranges_retired) == retired > 0
    assert report.tables_dropped == 4 * retired
    assert report.tables_delayed == ()
    kept = readings(database, tenant)
    assert kept[-3:] == [4, 4, 4]
    # Beyond a month past the retention: old history may lie in ranges of a month, which go whole.
    assert number(database, "SELECT count(*) FROM entity_attributes WHERE ts < now() - interval '62 days'") == 0
    before = leaves(database)
    execute(database, "UPDATE tenants SET retention = '90 days', window_past = '90 days'")
    execute(database, "SELECT ensure_history(%s, now() - interval '90 days', now())", tenant)
    assert leaves(database) > before, "ranges that never were may come"
    sealed = "SELECT count(*) FROM history_partitions WHERE retired_at IS NOT NULL"
    assert number(database, sealed) == retired, "retired ones stay so"
    for suffix in report.ranges_retired:
        assert execute(database, "SELECT to_regclass(%s)", f"entity_attributes_double_{suffix}") == [(None,)]


async def test_a_shorter_retention_than_the_slots_deletes_that_tenants_rows_alone(database: Database) -> None:
    execute(database, "UPDATE settings SET shared_slots = 1")
    short, long = make_tenant(database, "short"), make_tenant(database, "long")
    assert short >> 20 == long >> 20
    for tenant in (short, long):
        for age in (0, 12, 20):
            put(database, tenant, age, readings=30)
    shorten(database, short, 10)
    report = await run(database)
    assert report.ranges_retired == ()
    assert report.deleted == {"entity_attributes": 2 * 4 * 30}
    assert readings(database, short) == [120]
    assert readings(database, long) == [120, 120, 120]
    assert "entity_attributes" not in (await run(database)).deleted


def kept_from(database: Database, tenant: int) -> datetime | None:
    """None: since ever."""
    [(at,)] = execute(database, "SELECT nullif(kept_from, '-infinity') FROM tenants WHERE tenant_id = %s", tenant)
    assert at is None or isinstance(at, datetime)
    return at


async def test_what_is_dropped_is_noted_for_those_who_had_it(database: Database) -> None:
    execute(database, "UPDATE settings SET shared_slots = 1")
    short, long, alone = (make_tenant(database, name, dedicated=name == "alone") for name in ("short", "long", "alone"))
    for tenant in (short, long, alone):
        put(database, tenant, 0)
        put(database, tenant, 20)
    for tenant in (short, alone):
        shorten(database, tenant, 10)
    await run(database)
    [(end,)] = execute(
        database,
        "SELECT ts_to FROM history_partitions WHERE tenant_from = 0 AND ts_from < now() - interval '20 days' "
        "ORDER BY ts_to DESC LIMIT 1",
    )
    assert kept_from(database, short) == end, "its rows were deleted"
    [(end,)] = execute(database, "SELECT max(ts_to) FROM history_partitions WHERE retired_at IS NOT NULL")
    assert kept_from(database, alone) == end, "its ranges were retired"
    assert kept_from(database, long) is None
    for _ in range(2):
        await run(database)
        assert kept_from(database, long) is None


def test_however_many_ranges_are_retired_a_tenant_is_written_once(database: Database) -> None:
    execute(database, "UPDATE settings SET shared_slots = 1")
    for name in ("a", "b", "alone"):
        put(database, make_tenant(database, name, dedicated=name == "alone"), 20)
    execute(
        database,
        "INSERT INTO history_partitions SELECT tenant_from, tenant_to, at, at + interval '1 hour', 'fake' || n"
        "  FROM history_partitions CROSS JOIN LATERAL (SELECT n, ts_to + n * interval '1 hour' AS at"
        "       FROM generate_series(1, 50) n ORDER BY n) h WHERE tenant_from = 0",
    )
    written = "SELECT pg_stat_get_xact_tuples_updated('tenants'::regclass)::int"
    with psycopg.connect(database()) as connection:
        retired = connection.execute(
            "UPDATE history_partitions SET retired_at = now() WHERE tenant_from = 0 RETURNING ts_to"
        ).fetchall()
        assert len(retired) > 50
        assert connection.execute(written).fetchone() == (2,)
        kept = connection.execute("SELECT name, kept_from FROM tenants WHERE kept_from > '-infinity' ORDER BY 1")
        last = max(ts_to for (ts_to,) in retired)
        assert kept.fetchall() == [("a", last), ("b", last)]
        # What was retired before says nothing new, nor does a change of something else.
        connection.execute("UPDATE tenants SET kept_from = '-infinity' WHERE name = 'a'")
        connection.execute("UPDATE history_partitions SET retired_at = now() WHERE retired_at IS NOT NULL")
        connection.execute("UPDATE history_partitions SET created_at = now()")
        assert connection.execute(written).fetchone() == (3,)


async def test_rows_of_a_retention_that_is_raised_meanwhile_stay(database: Database) -> None:
    """An operator raises it while maintenance, which has listed what to delete, waits for a table."""
    execute(database, "UPDATE settings SET shared_slots = 1")
    short, long = make_tenant(database, "short"), make_tenant(database, "long")
    for tenant in (short, long):
        put(database, tenant, 20)
    shorten(database, short, 10)
    with psycopg.connect(database()) as operator:
        operator.execute("UPDATE tenants SET retention = '90 days' WHERE tenant_id = %s", [short])
        report = await run(database, IMPATIENT)
        assert any("rows not deleted" in problem for problem in report.problems)
    assert (await run(database)).deleted == {}
    assert readings(database, short) == [4]


async def test_a_tenant_that_is_being_changed_delays_what_retires_its_ranges(database: Database) -> None:
    tenant = make_tenant(database, "a")
    put(database, tenant, 80)
    shorten(database, tenant, 30)
    with psycopg.connect(database()) as operator:
        operator.execute("UPDATE tenants SET attribute_quota = 7 WHERE tenant_id = %s", [tenant])
        report = await run(database, IMPATIENT)
        assert report.ranges_retired == ()
        assert any("ranges not retired" in problem for problem in report.problems)
        assert report.tables, "it has done everything else"
    assert (await run(database)).ranges_retired


@pytest.mark.parametrize(
    ("device", "age_days", "noted"),
    [
        pytest.param(True, 20, True, id="with a device and a range that began before"),
        pytest.param(False, 20, False, id="without a device"),
        pytest.param(True, 5, False, id="without a range that began before"),
    ],
)
def test_a_retention_that_changes_notes_what_the_one_before_gave_up(
    database: Database, device: bool, age_days: int, noted: bool
) -> None:
    tenant = make_tenant(database, "a")
    if device:
        execute(database, "SELECT register_entity(%s, 'd', '', '{}')", tenant)
    put(database, tenant, age_days)
    execute(database, "UPDATE tenants SET kept_from = '-infinity'")
    shorten(database, tenant, 10)
    [(before,)] = execute(database, "SELECT now() - interval '10 days'")
    execute(database, "UPDATE tenants SET attribute_quota = 5, retention = retention")
    assert (kept_from(database, tenant) or datetime.min.replace(tzinfo=UTC)) < before  # type: ignore[operator]
    execute(database, "UPDATE tenants SET retention = '90 days'")
    after = kept_from(database, tenant)
    assert (after is not None and after >= before) is noted  # type: ignore[operator]
    # Never back by itself; an operator who knows better may say so.
    execute(database, "UPDATE tenants SET retention = '80 days'")
    assert kept_from(database, tenant) == after
    execute(database, "UPDATE tenants SET kept_from = '-infinity'")
    assert kept_from(database, tenant) is None


async def test_latest_values_go_with_their_readings(database: Database) -> None:
    tenant = make_tenant(database, "a")
    shorten(database, tenant, 90)
    execute(
        database,
        "INSERT INTO latest_values SELECT %s, 1, n, now() - n * interval '1 day', 1 FROM generate_series(1, 100) n",
        tenant,
    )
    report = await run(database)
    # The one of 90 days not yet: a retention that is just being raised may have counted it as kept.
    assert report.deleted == {"latest_values": 10}
    execute(database, "UPDATE latest_values SET ts = ts - interval '61 minutes'")
    assert (await run(database)).deleted == {"latest_values": 1}
    assert number(database, "SELECT count(*) FROM latest_values WHERE ts < now() - interval '90 days'") == 0


async def test_a_row_that_a_gateway_holds_is_left_to_the_next_run(database: Database) -> None:
    tenant = make_tenant(database, "a")
    shorten(database, tenant, 90)
    execute(
        database,
        "INSERT INTO latest_values SELECT %s, 1, n, now() - interval '1 year', 1 FROM generate_series(1, 2) n",
        tenant,
    )
    with psycopg.connect(database()) as gateway:
        gateway.execute("UPDATE latest_values SET ts = now() WHERE entity_id = 1")
        assert (await run(database, IMPATIENT)).deleted == {"latest_values": 1}
    assert (await run(database, IMPATIENT)).deleted == {}
    assert number(database, "SELECT count(*) FROM latest_values") == 1


async def test_terms(database: Database) -> None:
    tenant = make_tenant(database, "a")
    shorten(database, tenant, 90)
    for age in (1, 29, 31, 89, 91):
        at = datetime.now(UTC) - age * DAY
        execute(
            database,
            "INSERT INTO device_sessions VALUES (%s, 1, gen_random_uuid(), 1, %s)",
            tenant,
            at,
        )
        execute(database, "INSERT INTO stream_rejections VALUES (%s, 1, gen_random_uuid(), 1, '', %s)", tenant, at)
        execute(database, "INSERT INTO write_requests VALUES (%s, gen_random_uuid(), '', '', %s)", tenant, at)
        execute(database, "INSERT INTO dictionaries VALUES (%s, gen_random_uuid(), '', %s)", tenant, at.date())
    execute(database, "INSERT INTO device_streams VALUES (%s, 1, 1, gen_random_uuid(), 1, '2020-01-01')", tenant)
    report = await run(database)
    assert report.deleted == {"device_sessions": 3, "stream_rejections": 3, "write_requests": 3, "dictionaries": 1}
    assert number(database, "SELECT count(*) FROM device_streams") == 1, "a device's own session has no term"


async def test_the_outbox_is_reported_and_left_alone(database: Database) -> None:
    execute(database, "SELECT ensure_outbox(now() - interval '1 hour', now() + interval '1 hour')")
    execute(
        database,
        "INSERT INTO outbox (created_at, lane, batch_id, changes, tenant_ids, min_ts, max_ts, payload)"
        " SELECT now() - interval '1 hour', 0, gen_random_uuid(), 0, '{}', '{}', '{}', '' FROM generate_series(1, 3)",
    )
    report = await run(database)
    assert report.outbox.oldest is not None
    assert timedelta(minutes=59) < datetime.now(UTC) - report.outbox.oldest < timedelta(minutes=61)
    assert report.outbox.bytes > 0
    assert number(database, "SELECT count(*) FROM outbox") == 3
    assert {size.table: size.partitions for size in report.tables}["outbox"] == report.outbox.partitions


# -- interrupted, and in company


@pytest.fixture
def expired(database: Database) -> tuple[Database, int]:
    """A tenant with one range that is past its retention and one of today."""
    tenant = make_tenant(database, "a")
    put(database, tenant, 0)
    put(database, tenant, 20)
    shorten(database, tenant, 10)
    return database, tenant


async def test_a_reader_delays_a_drop_but_nobody_else_and_the_next_run_finishes_it(
    expired: tuple[Database, int],
) -> None:
    database, tenant = expired
    with psycopg.connect(database()) as reader:
        before = reader.execute("SELECT count(*) FROM entity_attributes").fetchone()
        report = await run(database, IMPATIENT)
        assert len(report.ranges_retired) == 1
        assert len(report.tables_delayed) == 4
        pending = number(database, "SELECT count(*) FROM pg_inherits WHERE inhdetachpending")
        assert pending == 4, "detachment has begun"
        put(database, tenant, 0)
        assert readings(database, tenant)[-1] == 8, "writers and new readers go on, without the retired range"
        assert reader.execute("SELECT count(*) FROM entity_attributes").fetchone() == before
    report = await run(database, IMPATIENT)
    assert (report.ranges_retired, report.tables_dropped, report.tables_delayed) == ((), 4, ())
    assert leaves(database) == number(database, "SELECT count(*) FROM history_partitions WHERE retired_at IS NULL")


async def test_a_run_goes_on_wherever_the_last_one_died(expired: tuple[Database, int]) -> None:
    database, tenant = expired
    [(suffix,)] = execute(
        database,
        "UPDATE history_partitions SET retired_at = now() WHERE ts_to < now() - interval '10 days' RETURNING suffix",
    )
    slot = f"s{tenant >> 20:03d}"
    # One of each: still attached, half detached, detached, gone.
    with psycopg.connect(database()) as reader, psycopg.connect(database(), autocommit=True) as dying:
        reader.execute("SELECT count(*) FROM entity_attributes_bigint")
        dying.execute("SET lock_timeout = '50ms'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            dying.execute(
                f"ALTER TABLE entity_attributes_bigint_{slot}"
                f" DETACH PARTITION entity_attributes_bigint_{suffix} CONCURRENTLY".encode()
            )
    execute(database, f"ALTER TABLE entity_attributes_text_{slot} DETACH PARTITION entity_attributes_text_{suffix}")
    execute(database, f"DROP TABLE entity_attributes_boolean_{suffix}")
    report = await run(database)
    assert (report.tables_dropped, report.tables_delayed) == (3, ())
    assert readings(database, tenant) == [4]


async def test_writers_go_on_while_ranges_come_and_go(database: Database) -> None:
    tenant = make_tenant(database, "a")
    for age in range(11, 31):
        put(database, tenant, age)
    put(database, tenant, 0)
    shorten(database, tenant, 10)
    written, done = 0, asyncio.Event()

    async def write() -> None:
        nonlocal written
        async with await psycopg.AsyncConnection.connect(database(user=INGEST_LOGIN)) as connection:
            while not done.is_set() or written < 10:
                async with connection.transaction(), connection.cursor() as cursor:
                    await cursor.execute(f"SET LOCAL lock_timeout = '{PATIENCE_S:g}s'".encode())
                    async with cursor.copy(
                        "COPY entity_attributes_double (tenant_id, attribute_id, entity_id, ts, value) FROM STDIN"
                    ) as copy:
                        for entity in range(100):
                            await copy.write_row((tenant, 2, entity, datetime.now(UTC), 1.0))
                written += 100

    async with asyncio.TaskGroup() as group:
        group.create_task(write())
        # The writer may stand still in the middle of a transaction, and with it whoever waits for its end.
        report = await run(database, MaintenanceOptions(lock_timeout_s=PATIENCE_S))
        done.set()
    assert report.tables_dropped >= 4
    assert report.tables_delayed == ()
    assert number(database, "SELECT count(*) FROM entity_attributes_double WHERE attribute_id = 2") == written


async def test_one_run_at_a_time(database: Database) -> None:
    with psycopg.connect(database()) as other:
        other.execute("SELECT pg_advisory_lock(hashtext('atlasco.maintenance'))")
        with pytest.raises(MaintenanceRunning):
            await run(database)
    await run(database)


async def test_a_killed_connection_is_unavailable_and_the_next_run_works(database: Database) -> None:
    execute(database, "SELECT register_tenant('a')")

    def kill(_: str) -> None:
        execute(
            database,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'atlasco-maintain'"
            "   AND datname = current_database()",
        )

    with pytest.raises(StorageUnavailable):
        await maintain(database(), progress=kill)
    assert (await run(database)).problems == ()


@pytest.mark.parametrize("ahead_s", [0, -1, 40 * 86400])
def test_ahead_has_bounds(ahead_s: float) -> None:
    with pytest.raises(ValueError, match="39 days"):
        MaintenanceOptions(ahead_s=ahead_s)
