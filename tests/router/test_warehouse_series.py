"""Pages of series from the warehouse: the same answers from either adapter."""

from typing import Any

import numpy as np
import pytest

from storage.model import ValueType
from storage.reads.model import EntityReplaced, Position, SeriesQuestion
from storage.reads.warehouse import UnknownToWarehouse, WarehouseNames, read_warehouse_page
from storage.warehouse.port import LaneWatermark, Unit, Warehouse
from tests.router.router_support import DRIVER_WARNINGS, reader_of
from tests.warehouse_fixtures import HOUR_US, T0, change_set

pytestmark = DRIVER_WARNINGS

VALUES: dict[int, Any] = {1: 0.5, 2: 7, 3: True, 4: "käse"}
"""By attribute: one of each type."""


def load(warehouse: Warehouse) -> dict[tuple[str, str], dict[int, tuple[Any, int]]]:
    """Readings of three devices, every type, some corrected; what they are by series."""
    changes = []
    stored: dict[tuple[str, str], dict[int, tuple[Any, int]]] = {}
    for entity in (1, 2, 3):
        for attribute, value in VALUES.items():
            rows = [(entity, attribute, T0 + i * HOUR_US, value) for i in range(7)]
            changes.append(change_set(rows, of_type=type(value)))
            corrected = [(entity, attribute, T0 + 2 * HOUR_US, value)]
            changes.append(change_set(corrected, revision=1, of_type=type(value)))
            stored[f"device-{entity}", f"attribute-{attribute}"] = {
                ts: (value, int(ts == T0 + 2 * HOUR_US)) for _, _, ts, value in rows
            }
    state = warehouse.open_partitions("topic", {0: 0})[0]
    marks = [LaneWatermark(0, 0, 1, 1, T0 + 9 * HOUR_US, 1)]
    (outcome,) = warehouse.load([Unit(0, "topic", state.generation, 0, 1, changes, marks)])
    assert outcome.loaded
    return stored


def test_pages_of_random_questions_equal_what_was_loaded(warehouse: Warehouse) -> None:
    stored = load(warehouse)
    random = np.random.default_rng(5)
    for number in range(8):
        entities = [f"device-{n}" for n in random.permutation([1, 2, 3])[: random.integers(1, 4)]]
        attributes = [f"attribute-{n}" for n in random.permutation([1, 2, 3, 4])[: random.integers(1, 5)]]
        question = SeriesQuestion(
            entities,
            attributes,
            T0 + int(random.integers(0, 3)) * HOUR_US,
            T0 + int(random.integers(4, 8)) * HOUR_US,
            descending=bool(number % 2),
            limit_per_series=int(random.choice([0, 2])),
        )
        order = -1 if question.descending else 1
        expected = []
        for key in sorted((e, a) for e in entities for a in attributes)[::order]:
            times = [t for t in sorted(stored[key]) if question.start_us <= t < question.end_us][::order]
            expected += [(*key, t, *stored[key][t]) for t in times[: question.limit_per_series or None]]
        found, after = [], None
        size = int(random.integers(3, 40))
        while True:
            page, completeness = read_warehouse_page(reader_of(warehouse), "tenant-1", question, size, after)
            assert completeness.as_of_us == T0 + 9 * HOUR_US
            for part in page.parts:
                rows = zip(part.times_us.tolist(), part.values.tolist(), part.revisions.tolist(), strict=True)
                found += [(part.entity, part.attribute, *row) for row in rows]
            after = page.last
            if after is None:
                break
            assert sum(len(part.times_us) for part in page.parts) == size
        assert found == expected


@pytest.mark.parametrize(
    ("tenant", "entity", "attribute"),
    [
        ("nobody", "device-1", "attribute-1"),
        ("tenant-1", "ghost", "attribute-1"),
        ("tenant-1", "device-1", "nope"),
        ("tenant-1", "' OR 1 = 1 --", "attribute-1"),
    ],
)
def test_what_was_never_loaded_is_unknown(warehouse: Warehouse, tenant: str, entity: str, attribute: str) -> None:
    load(warehouse)
    question = SeriesQuestion([entity], [attribute], T0, T0 + HOUR_US)
    with pytest.raises(UnknownToWarehouse):
        read_warehouse_page(reader_of(warehouse), tenant, question, 10, None)


def test_a_page_begins_within_a_series(warehouse: Warehouse) -> None:
    load(warehouse)
    question = SeriesQuestion(["device-2", "device-1"], ["attribute-2"], T0, T0 + 9 * HOUR_US)
    page, _ = read_warehouse_page(reader_of(warehouse), "tenant-1", question, 2, Position(1, 0, T0 + 5 * HOUR_US, 1))
    found = [(part.entity, part.times_us.tolist()) for part in page.parts]
    assert found == [("device-1", [T0 + 6 * HOUR_US]), ("device-2", [T0])]
    assert page.last == Position(0, 0, T0, 2)


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_what_another_source_took_of_a_series_counts_towards_its_limit(warehouse: Warehouse, taken: int) -> None:
    load(warehouse)
    question = SeriesQuestion(
        ["device-1", "device-2"], ["attribute-2"], T0, T0 + 9 * HOUR_US, descending=True, limit_per_series=2
    )
    # Its last reading is newer than all that is loaded.
    after = Position(1, 0, T0 + 8 * HOUR_US, 2, taken)
    page, _ = read_warehouse_page(reader_of(warehouse), "tenant-1", question, 10, after)
    found = [(part.entity, part.times_us.tolist()) for part in page.parts]
    newest = [T0 + 6 * HOUR_US, T0 + 5 * HOUR_US]
    left = [("device-2", newest[: 2 - taken])] if taken < 2 else []
    assert found == [*left, ("device-1", newest)]


def test_a_position_of_another_device_by_that_name_is_for_a_database_to_judge(warehouse: Warehouse) -> None:
    load(warehouse)
    question = SeriesQuestion(["device-1"], ["attribute-2"], T0, T0 + 9 * HOUR_US)
    after = Position(0, 0, T0, 99)
    with pytest.raises(UnknownToWarehouse):
        read_warehouse_page(reader_of(warehouse), "tenant-1", question, 10, after)
    names = WarehouseNames(1, {1: "device-1"}, {2: ("attribute-2", ValueType.BIGINT)})
    with pytest.raises(EntityReplaced):
        read_warehouse_page(reader_of(warehouse), "tenant-1", question, 10, after, names=names)
