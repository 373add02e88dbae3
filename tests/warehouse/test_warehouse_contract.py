"""What every warehouse promises, whichever adapter it is."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace

import pytest

from storage.errors import QueryCanceled
from storage.warehouse.batch import ChangeSet
from storage.warehouse.cancellation import Cancellation
from storage.warehouse.port import (
    DeadLetter,
    LaneWatermark,
    Outcome,
    QueryRefused,
    RebuildRequired,
    RebuildResult,
    Scope,
    Unit,
    Warehouse,
)
from storage.warehouse.tables import tables_of
from tests.waiting import PATIENCE_S, wait_until
from tests.warehouse_fixtures import HOUR_US, T0, Reading, change_set, doubles, expected, held, resolved

# Redshift's driver makes its TLS context the old way.
pytestmark = pytest.mark.filterwarnings(r"ignore:ssl\.:DeprecationWarning")

TOPIC = "topic-id-1"


def opened(warehouse: Warehouse, *partitions: int) -> None:
    warehouse.open_partitions(TOPIC, dict.fromkeys(partitions or (0,), 0))


def unit(first: int, end: int, *changes: ChangeSet, partition: int = 0, **more: object) -> Unit:
    return replace(Unit(partition, TOPIC, 1, first, end, changes), **more)  # type: ignore[arg-type]


def load(warehouse: Warehouse, *units: Unit) -> list[Outcome]:
    outcomes = warehouse.load(units)
    assert [outcome.loaded for outcome in outcomes] == [True] * len(units)
    return outcomes


def mark(
    through: int, *, lane: int = 0, partition: int = 0, lanes: int = 1, partitions: int = 1, epoch: int = 1
) -> LaneWatermark:
    return LaneWatermark(lane, partition, lanes, partitions, through, epoch)


def test_a_load_is_visible_with_its_types(warehouse: Warehouse) -> None:
    opened(warehouse)
    readings: list[Reading] = [
        (1, 1, T0, 0.1 + 0.2),
        (1, 2, T0 + 1, -(2**63)),
        (1, 3, T0 + 2, True),
        (1, 4, T0 + 3, "grüße\n\"'\\,"),
        (2, 1, T0 + 4, math.inf),
        (2, 4, T0 + 5, ""),
        (2, 2, -5 * HOUR_US + 7, 2**63 - 1),
    ]
    (outcome,) = load(warehouse, unit(0, 3, change_set(readings)))
    assert (outcome.rows, outcome.duplicates, outcome.state.next_offset) == (7, 0, 3)
    assert held(warehouse) == expected(readings)
    names = warehouse.query("SELECT tenant_id, entity_id, external_id FROM entities ORDER BY 2").rows
    assert [tuple(row) for row in names] == [(1, 1, "device-1"), (1, 2, "device-2")]
    attributes = warehouse.query("SELECT attribute_id, name, type FROM attributes ORDER BY 1").rows
    assert [tuple(r) for r in attributes][:2] == [(1, "attribute-1", "double"), (2, "attribute-2", "bigint")]
    assert [tuple(r) for r in warehouse.query("SELECT tenant_id, name FROM tenants").rows] == [(1, "tenant-1")]
    union = warehouse.query("SELECT type, count(*) FROM entity_attributes GROUP BY type ORDER BY type")
    assert [tuple(row) for row in union.rows] == [("bigint", 2), ("boolean", 1), ("double", 2), ("text", 2)]


def test_nan_is_a_value(warehouse: Warehouse) -> None:
    opened(warehouse)
    load(warehouse, unit(0, 1, change_set([(1, 1, T0, math.nan)])))
    (value,) = held(warehouse).values()
    assert math.isnan(value)


def test_a_unit_loads_once(warehouse: Warehouse) -> None:
    opened(warehouse)
    first = unit(0, 5, change_set(doubles(10)))
    load(warehouse, first)
    (again,) = warehouse.load([first])
    assert not again.loaded
    assert again.state.next_offset == 5
    assert held(warehouse) == expected(doubles(10))


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"first": 1}, id="gap"),
        pytest.param({"topic_id": "another"}, id="topic"),
        pytest.param({"generation": 2}, id="generation"),
        pytest.param({"partition": 7}, id="unopened"),
    ],
)
def test_a_unit_that_does_not_fit_is_refused(warehouse: Warehouse, wrong: dict[str, object]) -> None:
    opened(warehouse)
    (outcome,) = warehouse.load([replace(unit(0, 5, change_set(doubles(3))), **wrong)])  # type: ignore[arg-type]
    assert not outcome.loaded
    assert held(warehouse) == {}


def test_units_of_one_load_are_judged_apart(warehouse: Warehouse) -> None:
    opened(warehouse, 0, 1)
    good = unit(0, 4, change_set(doubles(5)), partition=0)
    bad = unit(3, 9, change_set(doubles(5, entity=2)), partition=1)
    assert [outcome.loaded for outcome in warehouse.load([good, bad])] == [True, False]
    assert held(warehouse) == expected(doubles(5))
    states = warehouse.states()
    assert (states[0].next_offset, states[1].next_offset) == (4, 0)


def test_a_record_delivered_again_is_left_out(warehouse: Warehouse) -> None:
    opened(warehouse)
    repeated = change_set(doubles(4))
    load(warehouse, unit(0, 2, repeated, repeated))
    (outcome,) = load(warehouse, unit(2, 4, change_set(doubles(2, entity=2)), repeated))
    assert outcome.duplicates == 1
    assert held(warehouse) == expected(doubles(4), doubles(2, entity=2))


def test_parts_of_one_batch_are_different_records(warehouse: Warehouse) -> None:
    opened(warehouse)
    batch = b"b" * 16
    parts = [change_set(doubles(2, entity=e), batch_id=batch, part=e) for e in (0, 1)]
    other = change_set(doubles(2, entity=2), batch_id=batch, bucket=1)
    load(warehouse, unit(0, 3, *parts, other))
    assert len(held(warehouse)) == 6


BATCH = b"b" * 16


@pytest.mark.parametrize("at_once", [True, False], ids=["one load", "one after the other"])
def test_tenants_and_operations_of_one_batch_are_different_records(warehouse: Warehouse, at_once: bool) -> None:
    opened(warehouse)
    values, others = doubles(3), doubles(3, entity=2)
    records = [
        change_set(values, batch_id=BATCH, bucket=5),
        change_set(others, batch_id=BATCH, bucket=5, tenant=2),
        change_set([(*values[0][:3], None)], batch_id=BATCH, bucket=5, deletes=True),
        change_set([(*others[1][:3], None)], batch_id=BATCH, bucket=5, deletes=True, tenant=2),
    ]
    again = unit(4, 8, *records)
    if at_once:
        load(warehouse, unit(0, 4, *records))
    else:
        for offset, record in enumerate(records):
            (outcome,) = load(warehouse, unit(offset, offset + 1, record))
            assert outcome.duplicates == 0
    content = expected(values[1:]) | expected([others[0], others[2]], tenant=2)
    assert held(warehouse) == content
    (outcome,) = load(warehouse, again)
    assert (outcome.rows, outcome.duplicates) == (0, 4)
    assert held(warehouse) == content


def test_a_redriven_record_is_not_taken_for_another_tenants(warehouse: Warehouse) -> None:
    opened(warehouse)
    letter = DeadLetter(0, 1, "torn")
    load(warehouse, unit(0, 2, change_set(doubles(2), batch_id=BATCH), dead_letters=[letter]))
    assert warehouse.redrive(letter, change_set(doubles(2), batch_id=BATCH, tenant=2))
    assert held(warehouse) == expected(doubles(2)) | expected(doubles(2), tenant=2)


def test_two_loaders_load_once(warehouse: Warehouse) -> None:
    opened(warehouse)
    mine = unit(0, 5, change_set(doubles(50)))
    outcomes: list[Outcome] = []
    threads = [threading.Thread(target=lambda: outcomes.extend(warehouse.load([mine]))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcome.loaded for outcome in outcomes) == [False, True]
    assert held(warehouse) == expected(doubles(50))


FIRST = [(1, 1, T0, 1.0), (1, 1, T0 + 1, 2.0)]
ONE = [(1, 1, T0, 10.0)]
TWO = [(1, 1, T0, 20.0)]
GONE = [(1, 1, T0, None)]


@pytest.mark.parametrize("compacted", [False, True], ids=["plain", "compacted"])
@pytest.mark.parametrize(
    "order",
    [
        pytest.param("012", id="in-order"),
        pytest.param("021", id="corrections-swapped"),
        pytest.param("210", id="reversed"),
        pytest.param("102", id="correction-first"),
    ],
)
def test_the_highest_revision_wins(warehouse: Warehouse, order: str, compacted: bool) -> None:
    opened(warehouse)
    sets = [change_set(FIRST), change_set(ONE, revision=1), change_set(TWO, revision=2)]
    for place, number in enumerate(order):
        load(warehouse, unit(place, place + 1, sets[int(number)]))
        if compacted:
            warehouse.compact()
    assert held(warehouse) == expected(FIRST, TWO)
    answer = warehouse.query("SELECT revision FROM entity_attributes_double ORDER BY ts")
    assert [row[0] for row in answer.rows] == [2, 0]


@pytest.mark.parametrize("compacted", [False, True], ids=["plain", "compacted"])
@pytest.mark.parametrize("order", ["012", "021", "201", "210"])
def test_a_deletion_wins_over_what_it_deletes(warehouse: Warehouse, order: str, compacted: bool) -> None:
    opened(warehouse)
    sets = [change_set(FIRST), change_set(ONE, revision=1), change_set(GONE, revision=1, deletes=True)]
    for place, number in enumerate(order):
        load(warehouse, unit(place, place + 1, sets[int(number)]))
        if compacted:
            warehouse.compact()
    assert held(warehouse) == expected(FIRST, GONE)


def test_compaction_changes_no_answer_and_folds(warehouse: Warehouse) -> None:
    opened(warehouse)
    loaded: list[list[Reading]] = []
    for i in range(6):
        loaded.append(doubles(20, entity=i))
        load(warehouse, unit(i, i + 1, change_set(loaded[-1])))
    corrections: list[Reading] = [(e, 1, T0 + 3_000_000, -1.0) for e in range(6)]
    load(warehouse, unit(6, 7, change_set(corrections, revision=1)))
    before = held(warehouse)
    assert before == expected(*loaded, corrections)
    done = warehouse.compact()
    assert done.corrections_folded == 6
    assert held(warehouse) == before
    sizes = {size.kind: size for size in warehouse.status().sizes}
    assert sizes["delta_double"].rows == 0
    assert sizes["base_double"].rows == 120
    assert warehouse.compact().corrections_folded == 0
    assert held(warehouse) == before


def test_watermarks_make_the_as_of(warehouse: Warehouse) -> None:
    opened(warehouse, 0, 1)
    both = {"lanes": 2, "partitions": 2}
    assert warehouse.completeness().as_of_us is None
    load(warehouse, unit(0, 2, watermarks=[mark(100, **both), mark(110, lane=1, **both)]))
    assert warehouse.completeness().as_of_us is None
    assert warehouse.lanes_loaded() == {}
    load(warehouse, unit(0, 1, partition=1, watermarks=[mark(90, partition=1, **both)]))
    assert warehouse.lanes_loaded() == {0: 90}
    load(warehouse, unit(1, 2, partition=1, watermarks=[mark(95, lane=1, partition=1, **both)]))
    assert warehouse.completeness().as_of_us == 90
    assert warehouse.lanes_loaded() == {0: 90, 1: 95}
    assert warehouse.query("SELECT 1").completeness.as_of_us == 90


def test_a_watermark_goes_back_neither_in_time_nor_in_epoch(warehouse: Warehouse) -> None:
    opened(warehouse)
    load(warehouse, unit(0, 1, watermarks=[mark(100, epoch=5)]))
    load(warehouse, unit(1, 2, watermarks=[mark(500, epoch=4)]))
    assert warehouse.completeness().as_of_us == 100
    load(warehouse, unit(2, 3, watermarks=[mark(50, epoch=6)]))
    assert warehouse.completeness().as_of_us == 100
    load(warehouse, unit(3, 4, watermarks=[mark(200, epoch=6)]))
    assert warehouse.completeness().as_of_us == 200


def test_dead_letters_mark_the_answers_they_touch(warehouse: Warehouse) -> None:
    opened(warehouse)
    known = DeadLetter(0, 3, "torn", tenant_id=1, bucket=2, min_ts_us=T0, max_ts_us=T0 + HOUR_US)
    harmless = DeadLetter(0, 4, "a watermark", affects_readings=False)
    load(warehouse, unit(0, 5, dead_letters=[known, harmless]))
    assert warehouse.dead_letters() == [known, harmless]
    assert warehouse.completeness().incomplete == (known,)
    assert warehouse.completeness(Scope(tenant_id=1)).incomplete == (known,)
    assert warehouse.completeness(Scope(tenant_id=2)).incomplete == ()
    assert warehouse.completeness(Scope(1, T0 + 2 * HOUR_US, None)).incomplete == ()
    assert warehouse.completeness(Scope(1, None, T0)).incomplete == ()
    change = change_set(doubles(2))
    assert warehouse.redrive(known, change)
    assert not warehouse.redrive(known, change)
    assert warehouse.redrive(harmless, None)
    assert warehouse.completeness().incomplete == ()
    assert held(warehouse) == expected(doubles(2))


def test_redriving_what_came_again_meanwhile_loads_it_once(warehouse: Warehouse) -> None:
    opened(warehouse)
    letter = DeadLetter(0, 0, "torn")
    change = change_set(doubles(2))
    load(warehouse, unit(0, 1, dead_letters=[letter]))
    load(warehouse, unit(1, 2, change))
    assert warehouse.redrive(letter, change)
    assert held(warehouse) == expected(doubles(2))


def test_a_halt_refuses_loads_and_shows(warehouse: Warehouse) -> None:
    opened(warehouse, 0, 1)
    warehouse.halt(0, 1, "records are missing")
    warehouse.halt(1, 99, "of a generation that is not")
    states = warehouse.states()
    assert (states[0].halted, states[1].halted) == ("records are missing", "")
    assert warehouse.completeness().halted == ("records are missing",)
    (outcome,) = warehouse.load([unit(0, 1, change_set(doubles(1)))])
    assert not outcome.loaded
    assert outcome.state.halted == "records are missing"


def test_opening_keeps_what_is_there(warehouse: Warehouse) -> None:
    opened(warehouse)
    load(warehouse, unit(0, 9, change_set(doubles(1))))
    states = warehouse.open_partitions("another", {0: 3, 1: 0})
    assert (states[0].topic_id, states[0].next_offset) == (TOPIC, 9)
    assert (states[1].topic_id, states[1].next_offset) == ("another", 0)


def test_retention_removes_and_says_so(warehouse: Warehouse) -> None:
    opened(warehouse)
    old, new = doubles(5), doubles(5, start=T0 + 10 * HOUR_US)
    other = doubles(5, entity=9)
    load(warehouse, unit(0, 1, change_set(old + new)))
    load(warehouse, unit(1, 2, change_set(other, tenant=2)))
    cut = T0 + 5 * HOUR_US
    assert warehouse.expire(cut, tenant_id=1).rows_expired == 5
    assert held(warehouse) == expected(new) | expected(other, tenant=2)
    assert warehouse.completeness(Scope(tenant_id=1)).complete_from_us == cut
    assert warehouse.completeness(Scope(tenant_id=2)).complete_from_us is None
    assert warehouse.expire(cut).rows_expired == 5
    assert held(warehouse) == expected(new)
    assert warehouse.completeness(Scope(tenant_id=2)).complete_from_us == cut


def test_parameters_and_limits(warehouse: Warehouse) -> None:
    opened(warehouse)
    load(warehouse, unit(0, 1, change_set(doubles(10))))
    answer = warehouse.query(
        "SELECT count(*) AS n FROM entity_attributes_double WHERE value > %s AND tenant_id = %s AND 'a%%' LIKE 'a%%'",
        [4.0, 1],
    )
    assert (answer.columns, [tuple(row) for row in answer.rows]) == (("n",), [(6,)])
    scoped = warehouse.query("SELECT value FROM entity_attributes_double", scope=Scope(1, T0, T0 + 1), max_rows=10)
    assert 1.5 in [row[0] for row in scoped.rows] or len(scoped.rows) == 10
    with pytest.raises(QueryRefused):
        warehouse.query("SELECT value FROM entity_attributes_double", max_rows=9)
    with pytest.raises(QueryRefused):
        warehouse.query("SELECT nonsense FROM nowhere")
    assert len(warehouse.query("SELECT 1").rows) == 1


ENDLESS = (
    "SELECT count(*) FROM entity_attributes_double a, entity_attributes_double b, entity_attributes_double c, "
    "entity_attributes_double d, entity_attributes_double e "
    "WHERE abs(a.value * b.value - c.value * d.value - e.value) < %s"
)
"""What 300 readings keep busy for hours."""


def test_a_query_that_is_given_up_ends_in_the_warehouse(warehouse: Warehouse) -> None:
    opened(warehouse)
    load(warehouse, unit(0, 1, change_set(doubles(300))))
    began, cancellation = threading.Event(), Cancellation()

    def ask() -> None:
        began.set()
        warehouse.query(ENDLESS, [0.25], cancellation=cancellation)

    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(ask)
        assert began.wait(PATIENCE_S)
        # Wherever it is by now: waiting for a connection, between statements, or in the long one.
        cancellation.cancel()
        with pytest.raises(QueryCanceled):
            asked.result(PATIENCE_S)
        again = threads.submit(ask)
        with pytest.raises(QueryCanceled):
            again.result(PATIENCE_S)
    assert warehouse.query("SELECT count(*) FROM entity_attributes_double").rows == [(300,)]


def test_a_query_is_given_up_while_it_runs(warehouse: Warehouse) -> None:
    opened(warehouse)
    load(warehouse, unit(0, 1, change_set(doubles(300))))
    cancellation = Cancellation()
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(warehouse.query, ENDLESS, [0.25], cancellation=cancellation)
        wait_until(lambda: cancellation._stop is not None or asked.done(), "the statement is begun")
        # Long enough for it to be in the statement, which would take hours.
        assert not wait([asked], 0.5).done
        cancellation.cancel()
        with pytest.raises(QueryCanceled):
            asked.result(PATIENCE_S)
    assert warehouse.query("SELECT count(*) FROM entity_attributes_double").rows == [(300,)]


def names(warehouse: Warehouse) -> list[tuple[int, str]]:
    answer = warehouse.query("SELECT entity_id, external_id FROM entities ORDER BY entity_id")
    return [(entity, name) for entity, name in answer.rows]


NAMED = [*doubles(2), *doubles(2, entity=2)]
FAREWELL = [(entity, attribute, ts, None) for entity, attribute, ts, _ in doubles(2)]


@pytest.mark.parametrize("compacted", [False, True], ids=["plain", "compacted"])
@pytest.mark.parametrize("order", ["0123", "3210", "2031", "1302"])
def test_a_device_that_is_gone_has_no_name_whatever_comes_when(
    warehouse: Warehouse, order: str, compacted: bool
) -> None:
    opened(warehouse)
    sets = [
        change_set(NAMED),
        change_set([(1, 1, T0, 9.0)], revision=1),
        change_set(FAREWELL, revision=1, gone=[1]),
        # What is said of a device that never had a reading, and once more of one that had.
        change_set([], gone=[1, 3]),
    ]
    for place, number in enumerate(order):
        load(warehouse, unit(place, place + 1, sets[int(number)]))
        if compacted:
            warehouse.compact()
    # A write request that had looked the device up before the deletion, published after it.
    load(warehouse, unit(4, 5, change_set([(3, 1, T0, 1.0)])))
    assert names(warehouse) == [(2, "device-2")]
    assert gone(warehouse) == [(1, 1), (1, 3)]
    warehouse.compact()
    assert names(warehouse) == [(2, "device-2")]
    assert held(warehouse) == expected(doubles(2, entity=2))
    assert resolved(warehouse) == expected(doubles(2, entity=2), [(3, 1, T0, 1.0)]), "until its deletion comes too"
    stored = {size.kind: size.rows for size in warehouse.status().sizes}
    assert stored["entities"] == 1, "the name is not just hidden"
    assert names(warehouse) == [(2, "device-2")]


def gone(warehouse: Warehouse) -> list[tuple[int, int]]:
    rows = warehouse.query("SELECT tenant_id, entity_id FROM gone_entities ORDER BY 1, 2").rows
    return [(tenant, entity) for tenant, entity in rows]


def test_the_audit_is_told_which_devices_are_gone(warehouse: Warehouse) -> None:
    opened(warehouse)
    assert gone(warehouse) == []
    load(warehouse, unit(0, 1, change_set([*NAMED])))
    assert gone(warehouse) == []
    for place in (1, 2):
        load(warehouse, unit(place, place + 1, change_set([], gone=[1]), change_set([], gone=[2], tenant=2)))
        assert gone(warehouse) == [(1, 1), (2, 2)]
    some = warehouse.query("SELECT entity_id FROM gone_entities WHERE tenant_id = %s", [2], scope=Scope(2)).rows
    assert [tuple(row) for row in some] == [(2,)]


@pytest.mark.parametrize("compacted", [False, True], ids=["plain", "compacted"])
def test_a_device_is_gone_before_its_readings_are(warehouse: Warehouse, compacted: bool) -> None:
    """What is said first, and may be for long before the readings go."""
    opened(warehouse)
    texts: list[Reading] = [(1, 4, T0 + 9, "x")]
    load(warehouse, unit(0, 1, change_set([*NAMED, *texts])))
    load(warehouse, unit(1, 2, change_set([(1, 1, T0, 9.0)], revision=1)))
    load(warehouse, unit(2, 3, change_set(doubles(2), tenant=2)))
    stored = len(resolved(warehouse))
    # Twice: as it was ordered, and at its end.
    for place in (3, 4):
        load(warehouse, unit(place, place + 1, change_set([], gone=[1])))
        if compacted:
            warehouse.compact()
        here = {key: value for key, value in held(warehouse).items() if key[0] == 1}
        assert here == expected(doubles(2, entity=2))
        others = warehouse.query("SELECT count(*), min(tenant_id), max(tenant_id) FROM entity_attributes").rows
        assert [tuple(row) for row in others] == [(4, 1, 2)], "another tenant's device of the same id is there"
        assert len(resolved(warehouse)) == stored
    # What was committed before, and comes after.
    load(warehouse, unit(5, 6, change_set([(1, 1, T0 + HOUR_US, 3.0)])))
    assert {key[1] for key in held(warehouse) if key[0] == 1} == {2}
    load(warehouse, unit(6, 7, change_set([*FAREWELL, (1, 1, T0 + HOUR_US, None)], revision=1, gone=[1])))
    load(warehouse, unit(7, 8, change_set([(1, 4, T0 + 9, None)], of_type=str, gone=[1])))
    assert resolved(warehouse) == held(warehouse)


def test_a_load_of_a_device_and_its_deletion_leaves_no_name(warehouse: Warehouse) -> None:
    opened(warehouse)
    load(warehouse, unit(0, 3, change_set(doubles(2)), change_set(FAREWELL, gone=[1]), change_set([], gone=[1])))
    assert (names(warehouse), held(warehouse)) == ([], {})


def test_a_device_is_gone_from_its_tenant_only_and_its_name_can_be_anothers(warehouse: Warehouse) -> None:
    opened(warehouse)
    load(warehouse, unit(0, 2, change_set(doubles(1)), change_set(doubles(1), tenant=2)))
    load(warehouse, unit(2, 3, change_set(FAREWELL[:1], gone=[1])))
    again = change_set(doubles(1, entity=7))
    load(warehouse, unit(3, 4, replace(again, entities={7: "device-1"})))
    warehouse.compact()
    answer = warehouse.query("SELECT tenant_id, entity_id, external_id FROM entities ORDER BY 1")
    assert [tuple(row) for row in answer.rows] == [(1, 7, "device-1"), (2, 1, "device-1")]


def test_a_rebuild_keeps_what_is_gone(warehouse: Warehouse) -> None:
    opened(warehouse)
    load(warehouse, unit(0, 2, change_set([*NAMED, *doubles(2, entity=4)]), change_set([], gone=[1, 2, 3])))
    # PostgreSQL knows of one more deletion, has forgotten the first, and was restored to before the second.
    rebuild = warehouse.begin_rebuild()
    for kind, table in tables_of([change_set([], gone=[4]), change_set(doubles(2, entity=2))]).items():
        rebuild.add(kind, table)
    rebuild.finish(rebuilt(floors_us={1: T0 - HOUR_US}))
    assert names(warehouse) == [(2, "device-2")]
    here = {"topic_id": "topic-id-2", "generation": 2}
    late = [change_set(doubles(1, entity=entity, start=T0 + HOUR_US)) for entity in (1, 3, 4)]
    load(warehouse, unit(40, 43, *late, **here))
    assert names(warehouse) == [(2, "device-2")]
    stored = {size.kind: size.rows for size in warehouse.status().sizes}
    assert stored["gone_entities"] == 3


def rebuilt(**changes: object) -> RebuildResult:
    result = RebuildResult("topic-id-2", {0: 40, 1: 50}, 1, 1_000, 1_001, "200:210:205", {1: T0})
    return replace(result, **changes)  # type: ignore[arg-type]


def test_a_rebuild_replaces_what_postgres_holds_and_keeps_what_is_older(warehouse: Warehouse) -> None:
    opened(warehouse, 0, 1)
    older, wrong = doubles(3, start=T0 - HOUR_US), doubles(5)
    load(warehouse, unit(0, 1, change_set(older + wrong), change_set(doubles(2), tenant=2, bucket=1)))
    load(warehouse, unit(1, 2, change_set([(1, 1, T0, 9.0)], revision=1), dead_letters=[DeadLetter(0, 1, "torn")]))
    warehouse.halt(0, 1, "a gap")
    right = doubles(7, entity=3)
    rebuild = warehouse.begin_rebuild()
    assert rebuild.generation == 2
    (refused,) = warehouse.load([unit(0, 1, change_set(doubles(1)), partition=1)])
    assert not refused.loaded
    for kind, table in tables_of([change_set(right, revision=0), change_set([(3, 1, T0, 5.0)], revision=4)]).items():
        if kind != "delta_double":
            rebuild.add(kind, table)
    assert held(warehouse)[1, 1, 1, T0] == 9.0, "the old content serves until the end"
    rebuild.finish(rebuilt())
    assert held(warehouse) == expected(older, right)
    states = warehouse.states()
    assert {p: (s.topic_id, s.next_offset, s.generation, s.halted) for p, s in states.items()} == {
        0: ("topic-id-2", 40, 2, ""),
        1: ("topic-id-2", 50, 2, ""),
    }
    assert states[0].rebuild is not None
    assert (states[0].rebuild.snapshot, dict(states[0].rebuild.floors_us)) == ("200:210:205", {1: T0})
    assert warehouse.dead_letters() == []
    done = warehouse.completeness()
    assert (done.as_of_us, done.halted, done.complete_from_us) == (1_000, (), None)
    assert [tuple(row) for row in warehouse.query("SELECT entity_id FROM entities").rows] == [(3,)]


def test_after_a_rebuild_the_log_goes_on_and_the_snapshot_is_forgotten(warehouse: Warehouse) -> None:
    warehouse.begin_rebuild().finish(rebuilt())
    here = {"topic_id": "topic-id-2", "generation": 2}
    load(warehouse, unit(40, 41, change_set(doubles(2)), watermarks=[mark(1_001, partitions=2)], **here))
    assert warehouse.states()[0].rebuild is not None, "the watermark has to pass the snapshot"
    load(warehouse, unit(41, 42, watermarks=[mark(1_002, partitions=2)], **here))
    assert warehouse.states()[0].rebuild is None
    assert warehouse.states()[1].rebuild is not None
    assert held(warehouse) == expected(doubles(2))
    assert warehouse.completeness(Scope(tenant_id=1)).complete_from_us == T0, "there was nothing before"


def test_of_two_rebuilds_the_later_counts(warehouse: Warehouse) -> None:
    first, second = warehouse.begin_rebuild(), warehouse.begin_rebuild()
    with pytest.raises(RebuildRequired):
        first.finish(rebuilt())
    second.finish(rebuilt())
    assert warehouse.states()[0].generation == second.generation == 3


def test_init_is_repeatable_and_status_tells(warehouse: Warehouse) -> None:
    warehouse.init()
    opened(warehouse)
    load(warehouse, unit(0, 1, change_set(doubles(3))))
    status = warehouse.status()
    assert status.generation == 1
    assert [state.next_offset for state in status.states] == [1]
    assert {size.kind: size.rows for size in status.sizes}["base_double"] == 3
