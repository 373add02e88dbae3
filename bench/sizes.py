"""How long and how large a run is."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QuerySize:
    """What queries are measured on, and how long. Durations in seconds."""

    # Readings of the history; a tenth of them in the shorter one. `devices` are in both.
    readings: int
    devices: int
    # Devices that are searched.
    fleet: int
    # Turns of a gateway and of the bare statements, for each case: how many, how long, and questions of the latter.
    rounds: int
    span_s: float
    bare: int
    # Of each case, not measured.
    warm_up_s: float
    latest_per_s: float
    dashboard_per_s: float
    aggregate_per_s: float
    find_per_s: float
    # Of each filter.
    later_pages: int


@dataclass(frozen=True, slots=True)
class Size:
    """Durations in seconds."""

    # Rounds of (ingest, raw limit), by readings per message; the result is the median round.
    rounds: dict[int, int]
    warm_up_s: float
    measured_s: float
    # Devices and readings per second of the moderate load.
    latency_devices: int
    latency_readings_per_s: int
    latency_s: float
    idle_streams: int
    queries: int
    micro_repeats: int
    micro_messages: int
    # Readings per message of the backlogs that are drained, and of the loads that meet everything at work.
    drained_messages: tuple[int, ...]
    together_messages: tuple[int, ...]
    together_devices: int
    together_readings_per_s: int
    together_s: float
    query: QuerySize


FULL = Size(
    rounds={100: 3, 10: 2, 1000: 2},
    warm_up_s=3.0,
    measured_s=8.0,
    latency_devices=500,
    latency_readings_per_s=5_000,
    latency_s=20.0,
    idle_streams=1_000,
    queries=1_000,
    micro_repeats=50,
    micro_messages=200,
    drained_messages=(100, 1000),
    together_messages=(100, 10),
    together_devices=200,
    together_readings_per_s=20_000,
    together_s=30.0,
    query=QuerySize(
        readings=100_000_000,
        devices=10_000,
        fleet=1_000_000,
        rounds=8,
        span_s=3.0,
        bare=100,
        warm_up_s=1.5,
        latest_per_s=500,
        dashboard_per_s=50,
        aggregate_per_s=20,
        find_per_s=40,
        later_pages=8,
    ),
)

QUICK = Size(
    rounds={100: 1, 10: 1, 1000: 1},
    warm_up_s=2.0,
    measured_s=4.0,
    latency_devices=500,
    latency_readings_per_s=5_000,
    latency_s=6.0,
    idle_streams=300,
    queries=300,
    micro_repeats=20,
    micro_messages=200,
    drained_messages=(100,),
    together_messages=(100,),
    together_devices=200,
    together_readings_per_s=20_000,
    together_s=10.0,
    query=QuerySize(
        readings=4_000_000,
        devices=1_000,
        fleet=50_000,
        rounds=3,
        span_s=1.0,
        bare=50,
        warm_up_s=0.5,
        latest_per_s=500,
        dashboard_per_s=50,
        aggregate_per_s=20,
        find_per_s=40,
        later_pages=4,
    ),
)

# Not for figures: shows that every part works.
TINY = Size(
    rounds={100: 1},
    warm_up_s=0.5,
    measured_s=1.5,
    latency_devices=10,
    latency_readings_per_s=100,
    latency_s=1.5,
    idle_streams=20,
    queries=10,
    micro_repeats=2,
    micro_messages=10,
    drained_messages=(100,),
    together_messages=(100,),
    together_devices=20,
    together_readings_per_s=2_000,
    together_s=2.0,
    query=QuerySize(
        readings=60_000,
        devices=20,
        fleet=2_000,
        rounds=1,
        span_s=0.1,
        bare=5,
        warm_up_s=0.1,
        latest_per_s=50,
        dashboard_per_s=50,
        aggregate_per_s=50,
        find_per_s=50,
        later_pages=1,
    ),
)

SIZES = {"full": FULL, "quick": QUICK, "tiny": TINY}
