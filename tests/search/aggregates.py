"""Random aggregates, and what they come to by brute force."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from storage.aggregate.buckets import Bucket, BucketUnit, bucket_edges
from storage.aggregate.model import NUMERIC, AggregateAnswer, AggregateQuestion, Function, Selection
from storage.model import ValueType
from tests.search.fleet import HOUR_US, Fleet, readings_of

DAY_US = 24 * HOUR_US
ALL = list(Function)


def devices_of(fleet: Fleet) -> list[str]:
    """The devices with a history."""
    return sorted({device for device, _ in fleet.readings})


def brute(function: Function, values: list[Any], percentile: float = 0.0) -> Any:
    match function:
        case Function.COUNT:
            return len(values)
        case Function.FIRST:
            return values[0]
        case Function.LAST:
            return values[-1]
        case Function.MIN:
            numbers = [v for v in values if not math.isnan(v)]
            return min(numbers) if numbers else math.nan
        case Function.MAX:
            return math.nan if any(math.isnan(v) for v in values) else max(values)
    numbers = np.array(values, np.float64)
    huge = bool(np.any((np.abs(numbers) >= 1e140) & np.isfinite(numbers)))
    with np.errstate(all="ignore"):
        if function is Function.PERCENTILE:
            ordered = np.sort(numbers)
            at = percentile / 100 * (len(ordered) - 1)
            low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
            return float(low) if math.floor(at) == math.ceil(at) else float(low + (at - math.floor(at)) * (high - low))
        if huge:
            return math.nan
        if function is Function.SUM:
            return float(np.sum(numbers))
        if function is Function.MEAN:
            return float(np.mean(numbers))
        return math.nan if len(numbers) < 2 else float(np.std(numbers, ddof=1))


def close(got: Any, want: Any) -> bool:
    if isinstance(want, float) and isinstance(got, float):
        if math.isnan(want) or math.isnan(got):
            return math.isnan(want) and math.isnan(got)
        return got == want or math.isclose(got, want, rel_tol=1e-9, abs_tol=1e-9)
    return type(got) is type(want) and bool(got == want)


def check(fleet: Fleet, question: AggregateQuestion, devices: Sequence[str], answer: Any) -> None:
    edges = (
        bucket_edges(question.bucket, question.start_us, question.end_us) if question.bucket else [question.start_us]
    )
    types = {fleet.attributes[a].type for a in question.attributes}
    widened = not question.by_attribute and len(types) > 1
    want: dict[tuple[str, str], dict[int, list[Any]]] = {}
    for time_us, _, _, device, name, value in readings_of(
        fleet, devices, question.attributes, question.start_us, question.end_us
    ):
        key = (device if question.by_entity else "", name if question.by_attribute else "")
        edge = max(e for e in edges if e <= time_us)
        want.setdefault(key, {}).setdefault(edge, []).append(float(value) if widened else value)
    assert [(s.entity, s.attribute) for s in answer.series] == sorted(want)
    for series in answer.series:
        buckets = want[series.entity, series.attribute]
        assert list(series.bucket_times_us) == sorted(buckets)
        for column in series.columns:
            for edge, got in zip(series.bucket_times_us, column.values, strict=True):
                expected = brute(column.function, buckets[edge], column.percentile)
                if column.function is Function.PERCENTILE and not math.isfinite(expected):
                    # Next to an infinity databases interpolate differently.
                    assert not math.isfinite(got), (got, expected, buckets[edge])
                    continue
                assert close(got, expected), (column.function, column.percentile, got, expected, buckets[edge])


def random_question(random: np.random.Generator, fleet: Fleet, *, rolled: bool) -> tuple[AggregateQuestion, list[str]]:
    kept = [a for a in fleet.attributes.values() if a.keeps_latest]
    numeric = [a.name for a in kept if a.type in (ValueType.DOUBLE, ValueType.BIGINT)]
    others = [a.name for a in kept if a.name not in numeric]
    by_attribute = bool(random.random() < 0.5)
    if rolled or random.random() < 0.6:
        attributes = [str(a) for a in random.permutation(numeric)[: random.integers(1, 4)]]
        functions = [f for f in ALL if not rolled or f is not Function.PERCENTILE]
    else:
        attributes = [str(random.choice(others))]
        functions = [f for f in ALL if f not in NUMERIC]
    chosen = [f for f in functions if random.random() < 0.6] or [Function.COUNT]
    buckets: list[Bucket | None] = [None, Bucket(BucketUnit.HOUR, 1, "Asia/Kolkata"), Bucket(BucketUnit.DAY)]
    if rolled:
        buckets += [Bucket(BucketUnit.MINUTE, 15), Bucket(BucketUnit.HOUR, 6, "Europe/Berlin")]
    else:
        buckets += [Bucket(BucketUnit.MINUTE, 10), Bucket(BucketUnit.DAY, 1, "Europe/Berlin"), Bucket(BucketUnit.MONTH)]
    bucket = buckets[int(random.integers(len(buckets)))]
    start = fleet.now_us - int(random.integers(1, 5 * DAY_US))
    devices = [str(d) for d in random.permutation(devices_of(fleet))[: random.integers(1, 5)]]
    selection = Selection(entities=devices)
    if random.random() < 0.4:
        selection = Selection(entity_type="pump", labels={"site": "s1"} if random.random() < 0.5 else {})
        devices = [
            d for d in devices_of(fleet)
            if fleet.devices[d].entity_type == "pump" and selection.labels.items() <= fleet.devices[d].labels.items()
        ]  # fmt: skip
    question = AggregateQuestion(
        selection=selection,
        attributes=attributes,
        start_us=start,
        end_us=min(fleet.now_us, start + int(random.integers(1, 4 * DAY_US))),
        functions=chosen,
        bucket=bucket,
        percentiles=[0.0, 50.0, 99.5] if Function.PERCENTILE in chosen else [],
        by_entity=bool(random.random() < 0.5),
        by_attribute=by_attribute,
    )
    return question, devices


def texts_of(answer: AggregateAnswer) -> list[str]:
    """All texts of an answer."""
    return [v for series in answer.series for column in series.columns for v in column.values if isinstance(v, str)]


def text_bytes(answer: AggregateAnswer) -> int:
    """How many bytes they are."""
    return sum(len(text.encode()) for text in texts_of(answer))
