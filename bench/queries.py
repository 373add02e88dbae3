"""Queries on what was just ingested, one at a time, from outside: what a dashboard's small questions take."""

import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from atlasco.telemetry.v1 import query_pb2, query_pb2_grpc

from bench.errors import BenchmarkVoid
from bench.workload import TENANT, Shape, device_name

_METADATA = (("atlasco-tenant", TENANT), ("atlasco-service", "bench"))
# Not measured: connections, prepared statements, caches.
_WARM_UP = 20
_PAGE = 100


@dataclass(frozen=True, slots=True)
class QueryTimes:
    """How long one kind of query took."""

    measure: str
    queries: int
    readings_per_answer: float
    p50_ms: float
    p99_ms: float


async def measure_queries(target: str, shape: Shape, count: int) -> list[QueryTimes]:
    """All latest values of one device, and a page of 100 readings of one of its attributes."""
    rng = random.Random(1)
    now_us = time.time_ns() // 1000
    async with grpc.aio.insecure_channel(target) as channel:
        stub: Any = query_pb2_grpc.QueryServiceStub(channel)

        async def latest() -> int:
            request = query_pb2.GetLatestRequest(entity=device_name(rng.randrange(shape.devices)))
            answer = await stub.GetLatest(request, metadata=_METADATA)
            return len(answer.latest.values)

        async def series() -> int:
            request = query_pb2.ReadSeriesRequest(
                entities=[device_name(rng.randrange(shape.devices))],
                attributes=[rng.choice(shape.attributes).name],
                start_time_us=now_us - 86_400_000_000,
                end_time_us=now_us,
                page_size=_PAGE,
                descending=True,
            )
            answer = await stub.ReadSeries(request, metadata=_METADATA)
            return sum(len(each.times_us) for each in answer.series)

        return [await _timed("query_latest", latest, count), await _timed("query_series", series, count)]


async def _timed(measure: str, ask: Callable[[], Awaitable[int]], count: int) -> QueryTimes:
    times = []
    readings = 0
    for _ in range(_WARM_UP + count):
        started = time.perf_counter()
        found = await ask()
        times.append(time.perf_counter() - started)
        if not found:
            raise BenchmarkVoid(f"{measure}: an answer was empty")
        readings += found
    times = sorted(times[_WARM_UP:])
    return QueryTimes(
        measure,
        count,
        readings / (_WARM_UP + count),
        times[len(times) // 2] * 1000,
        times[min(len(times) - 1, len(times) * 99 // 100)] * 1000,
    )
