"""What is asked: each case makes random questions, as a request for a gateway and as a read for its bare statements."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from atlasco.telemetry.v1 import query_pb2, query_pb2_grpc

from bench.bare_sql import Ask
from bench.errors import BenchmarkVoid
from bench.history import ROLLED, SAMPLE_US
from bench.kept import Kept
from bench.query_load import METADATA
from bench.workload import all_attributes, device_name
from storage.filter.search import FindQuestion, find_entities
from storage.reads.devices import read_latest
from storage.reads.model import SeriesQuestion
from storage.reads.series import read_page

HOUR_US = 3_600_000_000
_PAGE = 1_000
_FOUND_PAGE = 100
# How many pages before the later one are read.
_PAGES_BEFORE = range(3, 12)
_REPORT = query_pb2.Freshness(tier=query_pb2.TIER_REPORT)


@dataclass(frozen=True, slots=True)
class Question:
    """One question, twice; `ask` is None where the bare statements are not of interest."""

    request: bytes
    ask: Ask | None


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of question, and what is promised of it."""

    measure: str
    case: str
    method: str
    # Requests per second.
    rate: float
    # p99 at most, milliseconds; None: nothing is promised.
    limit_ms: float | None
    make: Callable[[random.Random], Question]
    # Raises BenchmarkVoid for an answer that is not what the case is about.
    check: Callable[[bytes], None]
    facts: dict[str, Any] = field(default_factory=dict)


# -- on a history -----------------------------------------------------------------------------------------------------


def history_cases(kept: Kept, rate: float, dashboard_rate: float) -> list[Case]:
    """Latest values, and dashboards: 20 series for an hour, of one device and of twenty."""
    devices: int = kept.content.devices  # type: ignore[attr-defined]
    names = [attribute.name for attribute in all_attributes()]
    doubles = [a.name for a in all_attributes() if a.type.name == "DOUBLE"]

    def latest(attributes: int) -> Callable[[random.Random], Question]:
        def make(rng: random.Random) -> Question:
            device = device_name(rng.randrange(devices))
            chosen = rng.sample(names, attributes)
            request = query_pb2.GetLatestRequest(entity=device, attributes=chosen)
            return Question(request.SerializeToString(), lambda session: read_latest(session, [device], chosen))

        return make

    def check_latest(answer: bytes) -> None:
        if len(query_pb2.GetLatestResponse.FromString(answer).latest.values) not in (2, len(names)):
            raise BenchmarkVoid("a device has not the latest values that it should")

    def dashboard(entities: int, chosen: Sequence[str]) -> Callable[[random.Random], Question]:
        def make(rng: random.Random) -> Question:
            start_us, end_us = _hour(kept, rng)
            series = SeriesQuestion(
                [device_name(number) for number in rng.sample(range(devices), entities)],
                rng.sample(chosen, 20 // entities),
                start_us,
                end_us,
            )
            request = query_pb2.ReadSeriesRequest(
                entities=series.entities,
                attributes=series.attributes,
                start_time_us=start_us,
                end_time_us=end_us,
                page_size=_PAGE,
            )
            return Question(request.SerializeToString(), lambda session: read_page(session, series, _PAGE, None))

        return make

    def check_dashboard(answer: bytes) -> None:
        found = query_pb2.ReadSeriesResponse.FromString(answer)
        readings = sum(len(series.times_us) for series in found.series)
        if found.next_page_token or readings != 20 * (HOUR_US // SAMPLE_US):
            raise BenchmarkVoid(f"a dashboard has {readings} readings")

    wide = min(20, devices)
    return [
        Case("get_latest", "20 values", "GetLatest", rate, 10.0, latest(0), check_latest),
        Case("get_latest", "2 attributes", "GetLatest", rate, 10.0, latest(2), check_latest),
        Case("dashboard", "1 device", "ReadSeries", dashboard_rate, 50.0, dashboard(1, names), check_dashboard),
        Case("dashboard", "20 devices", "ReadSeries", dashboard_rate, 50.0, dashboard(wide, doubles), check_dashboard),
    ]


def aggregate_cases(kept: Kept, rate: float) -> list[Case]:
    """A day of one device by hour, from rollups and from the readings."""
    devices: int = kept.content.devices  # type: ignore[attr-defined]

    def case(name: str, freshness: query_pb2.Freshness, source: "query_pb2.Provenance.Source.ValueType") -> Case:
        def make(rng: random.Random) -> Question:
            end_us = kept.facts["end_us"]
            request = query_pb2.AggregateRequest(
                selection=query_pb2.Selection(entities=[device_name(rng.randrange(devices))]),
                attributes=[ROLLED],
                start_time_us=end_us - 24 * HOUR_US,
                end_time_us=end_us,
                bucket=query_pb2.Bucket(unit=query_pb2.BUCKET_UNIT_HOUR),
                functions=[query_pb2.AGGREGATE_FUNCTION_MEAN, query_pb2.AGGREGATE_FUNCTION_MAX],
                freshness=freshness,
            )
            return Question(request.SerializeToString(), None)

        def check(answer: bytes) -> None:
            found = query_pb2.AggregateResponse.FromString(answer)
            _check_source(found.provenance, source)
            if not found.series[0].bucket_times_us:
                raise BenchmarkVoid("an aggregate is empty")

        return Case("aggregate_day", name, "Aggregate", rate, None, make, check)

    return [
        case("rollup", _REPORT, query_pb2.Provenance.SOURCE_ROLLUP),
        case("readings", query_pb2.Freshness(), query_pb2.Provenance.SOURCE_PRIMARY),
    ]


def _hour(kept: Kept, rng: random.Random) -> tuple[int, int]:
    """A random hour within the history, that begins and ends with a sample."""
    start_us: int = kept.facts["start_us"]
    samples = (kept.facts["end_us"] - start_us - HOUR_US) // SAMPLE_US
    if samples < 0:
        raise BenchmarkVoid("the history is shorter than an hour")
    begin_us = start_us + rng.randint(0, samples) * SAMPLE_US
    return begin_us, begin_us + HOUR_US


# -- on a fleet -------------------------------------------------------------------------------------------------------

# A filter with a threshold drawn from a range, so that no two are the same; and how many of a million it finds.
_FILTERS = {
    "2 conditions": ('temperature > {:.3f} and status = "active"', (79.5, 80.5)),
    "2 conditions, selective": ('temperature > {:.3f} and status = "fault"', (94.5, 95.5)),
    "2 conditions, unselective": ('temperature > {:.3f} and status = "active"', (19.5, 20.5)),
    "3 conditions": ('temperature > {:.3f} and status = "active" and firmware starts with "2."', (79.5, 80.5)),
    "3 conditions, selective": (
        'temperature > {:.3f} and status = "fault" and firmware starts with "2."', (94.5, 95.5),
    ),
    "3 conditions, unselective": (
        'temperature > {:.3f} and status = "active" and firmware starts with "2."', (19.5, 20.5),
    ),
}  # fmt: skip


def find_cases(target: str, rate: float, tokens: int) -> list[Case]:
    """Finding devices by two conditions and by three, the first page and, where there are more, a later one.

    `tokens`: how many later pages to choose from; the pages before them are read here, through the gateway.
    """
    found = []
    with grpc.insecure_channel(target) as channel:
        stub: Any = query_pb2_grpc.QueryServiceStub(channel)
        for name, (text, thresholds) in _FILTERS.items():
            found.append(_find_case(name, rate, _first_page(text, thresholds)))
            later = _later_pages(stub, text, thresholds, tokens)
            if later:
                found.append(_find_case(f"{name}, a later page", rate, later.__getitem__, len(later)))
    return found


def _find_case(name: str, rate: float, make: Callable[[Any], Question], choices: int | None = None) -> Case:
    return Case(
        "find_entities",
        name,
        "FindEntities",
        rate,
        50.0,
        make if choices is None else lambda rng: make(rng.randrange(choices)),
        _check_found,
    )


def _first_page(text: str, thresholds: tuple[float, float]) -> Callable[[random.Random], Question]:
    def make(rng: random.Random) -> Question:
        return _find(text.format(rng.uniform(*thresholds)), "", "")

    return make


def _later_pages(stub: Any, text: str, thresholds: tuple[float, float], count: int) -> list[Question]:
    rng = random.Random(3)
    pages: list[Question] = []
    for _ in range(count):
        asked = text.format(rng.uniform(*thresholds))
        token, after = "", ""
        for _ in range(rng.choice(_PAGES_BEFORE)):
            answer = stub.FindEntities(_find_request(asked, token), metadata=METADATA)
            if not answer.next_page_token:
                return pages
            token, after = answer.next_page_token, answer.entities[-1].entity.name
        pages.append(_find(asked, token, after))
    return pages


def _find(text: str, token: str, after: str) -> Question:
    request = _find_request(text, token)
    return Question(
        request.SerializeToString(),
        lambda session: find_entities(
            session, FindQuestion(text), page_size=_FOUND_PAGE, after=after, needed_as_of_us=0
        ),
    )


def _find_request(text: str, token: str) -> query_pb2.FindEntitiesRequest:
    return query_pb2.FindEntitiesRequest(filter=text, page_size=_FOUND_PAGE, page_token=token, freshness=_REPORT)


def _check_found(answer: bytes) -> None:
    _check_source(query_pb2.FindEntitiesResponse.FromString(answer).provenance, query_pb2.Provenance.SOURCE_PROJECTION)


def _check_source(provenance: query_pb2.Provenance, source: "query_pb2.Provenance.Source.ValueType") -> None:
    if provenance.source != source:
        name = query_pb2.Provenance.Source.Name(provenance.source)
        raise BenchmarkVoid(f"an answer came from {name}, not {query_pb2.Provenance.Source.Name(source)}")
