"""Aggregates in the warehouse equal a brute-force computation on random questions, on either adapter."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from router.questions import Aggregates
from storage.aggregate.buckets import Bucket, BucketUnit, TooManyPoints
from storage.aggregate.model import AggregateAnswer, AggregateQuestion, AggregateTypeMismatch, Function, Selection
from storage.aggregate.series import joined, part_functions
from storage.aggregate.text_bound import TooMuchText, check_text
from storage.aggregate.warehouse import Resolved, aggregate_in_warehouse
from storage.filter.evaluate import Device
from storage.model import Attribute, ValueType
from storage.reads.warehouse import UnknownToWarehouse, WarehouseNames
from storage.warehouse.port import LaneWatermark, Unit, Warehouse
from tests.router.router_support import DRIVER_WARNINGS, reader_of
from tests.search.aggregates import ALL, DAY_US, check, random_question, text_bytes, texts_of
from tests.search.fleet import HOUR_US, Fleet, random_value
from tests.warehouse_fixtures import T0, change_set

pytestmark = DRIVER_WARNINGS

NOW_US = T0 + 5 * DAY_US
TYPES = (ValueType.DOUBLE, ValueType.DOUBLE, ValueType.BIGINT, ValueType.BOOLEAN, ValueType.TEXT)


def fleet_of_readings() -> Fleet:
    random = np.random.default_rng(11)
    attributes = {f"attribute-{n}": Attribute(n, f"attribute-{n}", kind, True) for n, kind in enumerate(TYPES, 1)}
    fleet = Fleet(1, NOW_US, attributes)
    for number in (1, 2, 3, 4):
        name = f"device-{number}"
        fleet.entity_ids[name] = number
        fleet.devices[name] = Device(name, "pump" if number % 2 else "fan", {"site": f"s{number % 3}"}, {})
        for attribute in attributes.values():
            times = NOW_US - random.integers(0, 5 * DAY_US, 120)
            # Some at one instant on several devices, and some dense.
            times[:20] = NOW_US - 3 * HOUR_US - np.arange(20) * 7_000_000
            values = {int(t): random_value(random, attribute.type) for t in times}
            if attribute.name == "attribute-1":
                values = {t: v if abs(v) < 1e6 else 1.5 for t, v in values.items()}
            if attribute.type is ValueType.BIGINT:
                values = {t: v if abs(v) < 1e9 else 7 for t, v in values.items()}
            fleet.readings[name, attribute.name] = values
    return fleet


def load(warehouse: Warehouse, fleet: Fleet) -> None:
    """All readings; some first with another value and then corrected, some others deleted."""
    changes = []
    for (device, name), readings in fleet.readings.items():
        entity, attribute = fleet.entity_ids[device], fleet.attributes[name].attribute_id
        rows = [(entity, attribute, time_us, value) for time_us, value in readings.items()]
        corrected, gone = rows[::5], [(entity, attribute, rows[0][2] + 1, rows[0][3])]
        of_type = type(rows[0][3])
        wrong = [(*key, rows[-1][3]) for *key, _ in corrected]
        changes.append(change_set([*wrong, *(row for row in rows if row not in corrected), *gone]))  # type: ignore[list-item]
        changes.append(change_set(corrected, revision=1, of_type=of_type))
        changes.append(change_set(gone, deletes=True, of_type=of_type))
    state = warehouse.open_partitions("topic", {0: 0})[0]
    (outcome,) = warehouse.load(
        [Unit(0, "topic", state.generation, 0, 1, changes, [LaneWatermark(0, 0, 1, 1, NOW_US, 1)])]
    )
    assert outcome.loaded


@pytest.fixture
def loaded(warehouse: Warehouse) -> Iterator[tuple[Warehouse, Fleet]]:
    fleet = fleet_of_readings()
    load(warehouse, fleet)
    yield warehouse, fleet


def resolved(question: AggregateQuestion, devices: list[str], fleet: Fleet) -> Resolved | None:
    """What a database would tell the warehouse; None: the names in the selection will do."""
    return of_devices(question, devices, fleet) if question.selection.by_condition else None


def of_devices(question: AggregateQuestion, devices: list[str], fleet: Fleet) -> Resolved:
    attributes = [fleet.attributes[name] for name in question.attributes]
    names = WarehouseNames(
        1, {fleet.entity_ids[d]: d for d in devices}, {a.attribute_id: (a.name, a.type) for a in attributes}
    )
    return Resolved(names, everything=False)


def test_random_questions(loaded: tuple[Warehouse, Fleet]) -> None:
    warehouse, fleet = loaded
    for seed in range(40):
        question, devices = random_question(np.random.default_rng(seed), fleet, rolled=False)
        answer, completeness = aggregate_in_warehouse(
            reader_of(warehouse), "tenant-1", question, resolved=resolved(question, devices, fleet)
        )
        assert answer.as_of_us == completeness.as_of_us == NOW_US
        check(fleet, question, devices, answer)


@pytest.mark.parametrize("values", [(5e-324, 0.0), (1e-310, 3e-310), (1e-170, 3e-170)], ids=str)
def test_tiny_values_are_summed_up(warehouse: Warehouse, values: tuple[float, float]) -> None:
    fleet = fleet_of_readings()
    fleet.readings = {("device-1", "attribute-1"): {T0 + 10 * place: value for place, value in enumerate(values)}}
    load(warehouse, fleet)
    functions = [Function.SUM, Function.MEAN, Function.STDDEV]
    question = AggregateQuestion(Selection(["device-1"]), ["attribute-1"], T0, NOW_US, functions)
    answer, _ = aggregate_in_warehouse(reader_of(warehouse), "tenant-1", question)
    assert [column.values[0] for column in answer.series[0].columns] == [sum(values), sum(values) / 2, 0.0]


def test_everything_is_selected_without_a_name(loaded: tuple[Warehouse, Fleet]) -> None:
    warehouse, fleet = loaded
    question = AggregateQuestion(
        Selection(), ["attribute-1", "attribute-3"], T0, NOW_US, ALL, Bucket(BucketUnit.DAY), [50.0], by_entity=True
    )
    answer, _ = aggregate_in_warehouse(reader_of(warehouse), "tenant-1", question)
    check(fleet, question, list(fleet.entity_ids), answer)
    only, _ = aggregate_in_warehouse(reader_of(warehouse), "tenant-1", question, only="device-2")
    check(fleet, question, ["device-2"], only)
    nobody, _ = aggregate_in_warehouse(
        reader_of(warehouse), "tenant-1", question, resolved=of_devices(question, [], fleet)
    )
    assert not nobody.series
    names = of_devices(question, [], fleet).names
    deleted = Resolved(names, everything=True, deleted=[2, 3])
    rest, _ = aggregate_in_warehouse(reader_of(warehouse), "tenant-1", question, resolved=deleted)
    check(fleet, question, ["device-1", "device-4"], rest)


def test_what_another_tenant_expires_is_no_concern(loaded: tuple[Warehouse, Fleet]) -> None:
    warehouse, fleet = loaded
    question = AggregateQuestion(Selection(), ["attribute-1"], T0, NOW_US, [Function.COUNT])
    warehouse.expire(NOW_US - DAY_US, 2)
    answer, completeness = aggregate_in_warehouse(reader_of(warehouse), "tenant-1", question)
    check(fleet, question, list(fleet.entity_ids), answer)
    assert completeness.complete_from_us is None
    warehouse.expire(NOW_US - 2 * DAY_US, 1)
    answer, completeness = aggregate_in_warehouse(reader_of(warehouse), "tenant-1", question)
    assert completeness.complete_from_us == NOW_US - 2 * DAY_US
    check(fleet, replace(question, start_us=NOW_US - 2 * DAY_US), list(fleet.entity_ids), replaced_start(answer))


def replaced_start(answer: AggregateAnswer) -> AggregateAnswer:
    """As if the range had begun where readings do."""
    (series,) = answer.series
    return replace(answer, series=[replace(series, bucket_times_us=[NOW_US - 2 * DAY_US])])


def test_a_range_of_all_times_has_the_buckets_of_its_readings(loaded: tuple[Warehouse, Fleet]) -> None:
    warehouse, fleet = loaded
    question = AggregateQuestion(
        Selection(["device-1"]), ["attribute-1"], 1, 2**62, [Function.COUNT], Bucket(BucketUnit.HOUR)
    )
    answer, _ = aggregate_in_warehouse(reader_of(warehouse), "tenant-1", question)
    check(fleet, replace(question, start_us=T0 - DAY_US, end_us=NOW_US + DAY_US), ["device-1"], answer)
    long_ago = replace(question, end_us=T0 - 500 * DAY_US)
    assert not aggregate_in_warehouse(reader_of(warehouse), "tenant-1", long_ago)[0].series


def test_refusals(loaded: tuple[Warehouse, Fleet]) -> None:
    warehouse, _ = loaded

    def ask(**changes: Any) -> AggregateQuestion:
        given = {"selection": Selection(), "attributes": ["attribute-1"], "start_us": T0, "end_us": NOW_US,
                 "functions": [Function.MEAN], **changes}  # fmt: skip
        return AggregateQuestion(**given)

    for question, error in (
        (ask(attributes=["none"]), UnknownToWarehouse),
        (ask(selection=Selection(["none"])), UnknownToWarehouse),
        (ask(attributes=["attribute-5"]), AggregateTypeMismatch),
        (ask(attributes=["attribute-5", "attribute-3"], functions=[Function.COUNT]), AggregateTypeMismatch),
        (ask(bucket=Bucket(BucketUnit.SECOND)), TooManyPoints),
    ):
        with pytest.raises(error):
            aggregate_in_warehouse(reader_of(warehouse), "tenant-1", question)
    with pytest.raises(UnknownToWarehouse):
        aggregate_in_warehouse(reader_of(warehouse), "nobody", ask())


def test_two_parts_are_the_whole(loaded: tuple[Warehouse, Fleet]) -> None:
    warehouse, fleet = loaded
    cut_within = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        question, devices = random_question(random, fleet, rolled=False)
        whole = Aggregates(question, None)
        cut_us = whole.seam(int(random.integers(question.start_us + 1, question.end_us)))
        if cut_us <= question.start_us:
            assert Function.PERCENTILE in question.functions
            continue
        functions = part_functions(question.functions)
        parts = []
        for start_us, end_us in ((question.start_us, cut_us), (cut_us, question.end_us)):
            part = replace(question, start_us=start_us, end_us=end_us, functions=functions)
            found, _ = aggregate_in_warehouse(
                reader_of(warehouse), "tenant-1", part, resolved=resolved(question, devices, fleet)
            )
            parts.append(found)
        answer = joined(question, *parts, cut_us)
        check(fleet, question, devices, answer)
        times = [set(s.bucket_times_us) for s in answer.series]
        cut_within += sum(map(len, times)) < sum(len(s.bucket_times_us) for part in parts for s in part.series)
    assert cut_within > 10


def test_texts_are_bounded(loaded: tuple[Warehouse, Fleet], monkeypatch: pytest.MonkeyPatch) -> None:
    warehouse, fleet = loaded
    question = AggregateQuestion(
        Selection(), ["attribute-5"], T0, NOW_US, [Function.FIRST, Function.COUNT, Function.LAST],
        Bucket(BucketUnit.HOUR), by_entity=True,
    )  # fmt: skip
    whole, _ = aggregate_in_warehouse(reader_of(warehouse), "tenant-1", question)
    check(fleet, question, list(fleet.entity_ids), whole)
    size = text_bytes(whole)
    monkeypatch.setattr("storage.aggregate.text_bound.MAX_AGGREGATE_TEXT_BYTES", size)
    again, _ = aggregate_in_warehouse(reader_of(warehouse), "tenant-1", question)
    assert again.series == whole.series
    held: list[Any] = []

    def counted(values: Iterable[Any]) -> None:
        held.extend(values)
        check_text(held)

    monkeypatch.setattr("storage.aggregate.text_bound.check_text", counted)
    for limit in (size - 1, 40):
        held.clear()
        monkeypatch.setattr("storage.aggregate.text_bound.MAX_AGGREGATE_TEXT_BYTES", limit)
        with pytest.raises(TooMuchText):
            aggregate_in_warehouse(reader_of(warehouse), "tenant-1", question)
    # Counted in characters there, and two texts more at most.
    texts = [v for v in held if isinstance(v, str)]
    assert 0 < sum(map(len, texts)) <= 40 + 2 * max(map(len, texts_of(whole)))


def test_texts_of_two_parts_are_bounded_together(
    loaded: tuple[Warehouse, Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    warehouse, _ = loaded
    question = AggregateQuestion(
        Selection(), ["attribute-5"], T0, NOW_US, [Function.LAST], Bucket(BucketUnit.HOUR), by_entity=True
    )
    cut_us = NOW_US - 2 * DAY_US
    older, newer = (
        aggregate_in_warehouse(reader_of(warehouse), "tenant-1", replace(question, start_us=start, end_us=end))[0]
        for start, end in ((T0, cut_us), (cut_us, NOW_US))
    )
    size = text_bytes(joined(question, older, newer, cut_us))
    monkeypatch.setattr("storage.aggregate.text_bound.MAX_AGGREGATE_TEXT_BYTES", size - 1)
    assert max(text_bytes(older), text_bytes(newer)) < size
    with pytest.raises(TooMuchText):
        joined(question, older, newer, cut_us)
