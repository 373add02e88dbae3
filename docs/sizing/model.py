"""The sizing and cost model of docs/sizing.md.

    python docs/sizing/model.py            prints the tables of docs/sizing.md
    python docs/sizing/model.py --write    puts them into the page

Change the inputs here (a fleet, a measured figure, a price), run it with --write, and read what became of the result.
Everything is arithmetic: nothing here was learnt from a deployment of the size it computes.
"""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path

DAY_S = 86_400
MONTH_H = 730
GB = 1e9
TYPES = ("double", "bigint", "boolean", "text")


@dataclass(frozen=True)
class Fleet:
    """What is to be carried. `interval_s`: between two readings of one attribute of one device, on average."""

    name: str
    devices: int
    attributes: int
    interval_s: float
    # Readings in one message, and the share of devices that hold a stream open at the busiest moment.
    per_message: int
    connected: float = 1.0
    # The busiest minute over the average.
    peak: float = 2.0
    history_days: int = 30
    warehouse_days: int = 400
    kafka_days: int = 7

    @property
    def readings_s(self) -> float:
        """On average."""
        return self.devices * self.attributes / self.interval_s

    @property
    def peak_s(self) -> float:
        """In the busiest minute."""
        return self.readings_s * self.peak


FLEETS = (
    Fleet("1 million", 1_000_000, 10, 900, per_message=10),
    Fleet("200 million", 200_000_000, 10, 900, per_message=10),
    Fleet("200 million x 10,000", 200_000_000, 10_000, DAY_S, per_message=1_000),
)
"""The last one: every attribute of every device changes once a day."""


@dataclass(frozen=True)
class Measured:
    """Bytes and CPU for each reading; where each comes from is in docs/sizing.md."""

    # docs/sizing/measure.py, simulated fleet of four kinds of device.
    mix: Mapping[str, float]
    heap: Mapping[str, float]
    index: Mapping[str, float]
    parquet: Mapping[str, float]
    latest: float
    outbox: float
    wal: float
    kafka: float
    # bench/README.md, by readings per message.
    gateway_cpu_s_per_million: Mapping[int, float]
    postgres_cpu_s_per_million: Mapping[int, float]
    ingest_readings_s: Mapping[int, float]
    stream_bytes: float

    def mean(self, of: Mapping[str, float]) -> float:
        """The mean over the mix of types."""
        return sum(self.mix[kind] * of[kind] for kind in TYPES) / sum(self.mix.values())

    @property
    def history(self) -> float:
        """Heap and index."""
        return self.mean(self.heap) + self.mean(self.index)


MEASURED = Measured(
    mix={"double": 0.49, "bigint": 0.16, "boolean": 0.12, "text": 0.23},
    heap={"double": 60.3, "bigint": 60.4, "boolean": 60.3, "text": 61.6},
    index={"double": 85.0, "bigint": 86.4, "boolean": 87.1, "text": 87.3},
    parquet={"double": 2.1, "bigint": 1.06, "boolean": 0.57, "text": 0.64},
    latest=347,
    outbox=17.4,
    wal=430,
    kafka=7.2,
    gateway_cpu_s_per_million={10: 16.7, 100: 2.7, 1_000: 1.2},
    postgres_cpu_s_per_million={10: 4.5, 100: 3.0, 1_000: 2.7},
    ingest_readings_s={10: 31_200, 100: 231_000, 1_000: 340_000},
    stream_bytes=43 * 1024,
)


@dataclass(frozen=True)
class Limits:
    """What one of each may carry before another is needed."""

    # One writer: half of what a gateway and PostgreSQL did together on two shared cores with messages of 100, the most
    # that was ever measured with headroom. A larger machine should do more; nobody has shown it.
    writer_readings_s: float = 115_000
    # 64 TiB is the most that RDS attaches; a quarter stays free.
    writer_bytes: float = 0.75 * 64 * 2**40
    gateway_streams: int = 20_000
    gateway_cores: float = 0.6
    gateway_connections: int = 14
    # To each standby: ATLASCO_REPLICA_CONNECTIONS and the probe's one.
    replica_connections: int = 5
    # Of the two standbys of a Multi-AZ DB cluster the other carries both pools while one is away.
    standbys: int = 2
    # To Redshift: ATLASCO_WAREHOUSE_QUERIES, as many again to cancel them, and the measurement. AWS documents 500
    # connections of a cluster and 50 slots of all its queues together.
    warehouse_queries: int = 2
    warehouse_connections: int = 5
    redshift_connections: int = 500
    redshift_slots: int = 50
    # 4 slots shared by small tenants; leaves of a typed table at which planning slows down.
    customer_slots: int = 4
    days_ahead: int = 5
    leaves: int = 2_000
    # Compressed, into one partition, without waiting for it: far below what a broker takes.
    partition_bytes_s: float = 250_000
    broker_bytes_s: float = 20e6
    gateways_per_node: int = 6


LIMITS = Limits()


@dataclass(frozen=True)
class Prices:
    """US dollars, on demand, class of us-east-1. Assumptions to be replaced by a quotation; noted 2026-11."""

    noted: str = "2026-11"
    writer_hour: float = 3 * 1.07  # db.r6gd.2xlarge, three of them in a Multi-AZ DB cluster
    database_gb_month: float = 3 * 0.125  # io2, three copies
    iops_month: float = 3 * 0.10
    backup_gb_month: float = 0.095
    broker_hour: float = 0.204  # kafka.m7g.large
    broker_gb_month: float = 0.10
    node_hour: float = 0.357  # c7i.2xlarge
    general_node_hour: float = 0.202  # m7i.xlarge
    cluster_hour: float = 0.10
    warehouse_node_hour: float = 1.086  # ra3.xlplus
    warehouse_gb_month: float = 0.024
    s3_gb_month: float = 0.023
    nat_hour: float = 0.045
    endpoint_hour: float = 0.01
    load_balancer_unit_hour: float = 0.006
    zone_gb: float = 0.02  # both directions
    fixed_month: float = 400.0  # keys, logs, alarms, secrets, registry


PRICES = Prices()
IOPS_PER_WRITER = 12_000
# Bytes that Redshift keeps for a reading: not measured; ids, time and value, encoded.
WAREHOUSE_BYTES = 12.0
# Readings a second that one ra3.xlplus is taken to load and answer for: not measured.
WAREHOUSE_NODE_READINGS_S = 25_000


@dataclass(frozen=True)
class Sizing:
    """What a fleet needs."""

    fleet: Fleet
    history_bytes: float
    latest_bytes: float
    outbox_bytes: float
    writers_by_rate: int
    writers_by_storage: int
    gateways_by_streams: int
    gateways_by_cpu: int
    leaves: int
    partitions: int
    brokers: int
    kafka_bytes: float
    parquet_bytes: float
    warehouse_bytes: float
    warehouse_nodes: int

    @property
    def writers(self) -> int:
        """Databases that take writes, each a Multi-AZ cluster of three instances."""
        return max(self.writers_by_rate, self.writers_by_storage)

    @property
    def gateways(self) -> int:
        """Pods."""
        return max(self.gateways_by_streams, self.gateways_by_cpu, 3)

    @property
    def connections(self) -> int:
        """To one writer, if each gateway belongs to one writer; with relays, loaders and jobs."""
        return self.gateways_of_a_writer * LIMITS.gateway_connections + 48

    @property
    def gateways_of_a_writer(self) -> int:
        """If each gateway belongs to one."""
        return ceil(self.gateways / self.writers)

    @property
    def standby_connections(self) -> int:
        """To a standby that stands alone."""
        return self.gateways_of_a_writer * LIMITS.replica_connections * LIMITS.standbys

    @property
    def connections_after_failover(self) -> int:
        """To a writer that was a standby: what reads from it stays until the pools replace their connections."""
        return self.connections + self.gateways_of_a_writer * LIMITS.replica_connections

    @property
    def warehouse_connections(self) -> int:
        """To one Redshift, if all gateways ask it; with loaders and operators."""
        return self.gateways * LIMITS.warehouse_connections + 18

    @property
    def warehouse_queries(self) -> int:
        """At once, if every gateway asks as much as it may."""
        return self.gateways * LIMITS.warehouse_queries


def nearest(figures: Mapping[int, float], per_message: int) -> float:
    """The measured figure of the largest message not above this one."""
    return figures[max(size for size in figures if size <= per_message)]


def size(fleet: Fleet, measured: Measured = MEASURED, limits: Limits = LIMITS) -> Sizing:
    """The formulas of docs/sizing.md."""
    rate, peak = fleet.readings_s, fleet.peak_s
    history = rate * DAY_S * fleet.history_days * measured.history
    latest = fleet.devices * fleet.attributes * measured.latest
    # Dropped by the hour, once loaded and a margin older: two to three hours of it are there.
    outbox = peak * 3 * 3_600 * measured.outbox
    gateway_cpu = nearest(measured.gateway_cpu_s_per_million, fleet.per_message)
    log = rate * DAY_S * fleet.kafka_days * measured.kafka * 3
    return Sizing(
        fleet=fleet,
        history_bytes=history,
        latest_bytes=latest,
        outbox_bytes=outbox,
        writers_by_rate=ceil(peak / limits.writer_readings_s),
        writers_by_storage=ceil((history + latest + outbox) / limits.writer_bytes),
        gateways_by_streams=ceil(fleet.devices * fleet.connected / limits.gateway_streams),
        gateways_by_cpu=ceil(peak / 1e6 * gateway_cpu / limits.gateway_cores),
        leaves=limits.customer_slots * (fleet.history_days + limits.days_ahead),
        partitions=max(12, 12 * ceil(peak * measured.kafka / limits.partition_bytes_s / 12)),
        brokers=max(3, 3 * ceil(peak * measured.kafka * 3 / limits.broker_bytes_s / 3)),
        kafka_bytes=log,
        parquet_bytes=rate * DAY_S * fleet.warehouse_days * measured.mean(measured.parquet),
        warehouse_bytes=rate * DAY_S * fleet.warehouse_days * WAREHOUSE_BYTES,
        warehouse_nodes=max(2, ceil(peak / WAREHOUSE_NODE_READINGS_S)),
    )


def cost(sizing: Sizing, prices: Prices = PRICES) -> dict[str, float]:
    """US dollars a month, by what they are paid for."""
    stored = (sizing.history_bytes + sizing.latest_bytes + sizing.outbox_bytes) / 0.75 / GB
    nodes = max(3, ceil(sizing.gateways / LIMITS.gateways_per_node))
    # Every reading crosses a zone to its database, to its standbys and to Kafka's replicas, more or less.
    crossing = sizing.fleet.readings_s * DAY_S * 30 * (2 * MEASURED.wal + 4 * MEASURED.kafka) / GB
    return {
        "PostgreSQL, instances": sizing.writers * prices.writer_hour * MONTH_H,
        "PostgreSQL, storage, IOPS, backup": sizing.writers * IOPS_PER_WRITER * prices.iops_month
        + stored * (prices.database_gb_month + prices.backup_gb_month),
        "Kafka": sizing.brokers * prices.broker_hour * MONTH_H + sizing.kafka_bytes / 0.6 / GB * prices.broker_gb_month,
        "Kubernetes": (prices.cluster_hour + nodes * prices.node_hour + 3 * prices.general_node_hour) * MONTH_H,
        "Redshift": sizing.warehouse_nodes * prices.warehouse_node_hour * MONTH_H
        + sizing.warehouse_bytes / GB * prices.warehouse_gb_month,
        "S3": sizing.parquet_bytes / GB * prices.s3_gb_month,
        "network": (3 * prices.nat_hour + 15 * prices.endpoint_hour) * MONTH_H
        + ceil(sizing.fleet.devices * sizing.fleet.connected / 100_000) * prices.load_balancer_unit_hour * MONTH_H
        + crossing * prices.zone_gb,
        "the rest": prices.fixed_month,
    }


def number(value: float) -> str:
    """Three significant digits, with thousands separated."""
    if value >= 1000:
        digits = 10 ** (len(str(int(value))) - 3)
        return f"{round(value / digits) * digits:,}"
    return f"{value:.3g}"


def amount(value: float) -> str:
    """Bytes, in decimal units."""
    for unit, scale in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g} B"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measured_table() -> str:
    """What a reading costs to keep."""
    rows = [
        [kind, number(MEASURED.heap[kind]), number(MEASURED.index[kind]), number(MEASURED.parquet[kind])]
        for kind in TYPES
    ]
    mean = [MEASURED.mean(each) for each in (MEASURED.heap, MEASURED.index, MEASURED.parquet)]
    return table(
        ["bytes per reading", "PostgreSQL, rows", "PostgreSQL, key index", "Parquet"],
        [*rows, ["mean of the mix", *map(number, mean)]],
    )


def sizes_table() -> str:
    """What the fleets need."""
    sizings = [size(fleet) for fleet in FLEETS]
    lines: list[tuple[str, Callable[[Sizing], str]]] = [
        ("devices", lambda s: number(s.fleet.devices)),
        ("attributes of each", lambda s: number(s.fleet.attributes)),
        ("seconds between readings of one", lambda s: number(s.fleet.interval_s)),
        ("readings in a message", lambda s: number(s.fleet.per_message)),
        ("readings/s, average", lambda s: number(s.fleet.readings_s)),
        ("readings/s, peak", lambda s: number(s.fleet.peak_s)),
        ("history in PostgreSQL, 30 days", lambda s: amount(s.history_bytes)),
        ("latest values", lambda s: amount(s.latest_bytes)),
        ("outbox", lambda s: amount(s.outbox_bytes)),
        ("leaves of a typed table (of 2,000)", lambda s: number(s.leaves)),
        ("writers, by rate", lambda s: number(s.writers_by_rate)),
        ("writers, by storage", lambda s: number(s.writers_by_storage)),
        ("gateways, by open streams", lambda s: number(s.gateways_by_streams)),
        ("gateways, by CPU", lambda s: number(s.gateways_by_cpu)),
        ("connections of each writer", lambda s: number(s.connections)),
        ("connections of a writer after a failover", lambda s: number(s.connections_after_failover)),
        ("connections of a standby that is alone", lambda s: number(s.standby_connections)),
        ("Redshift: connections (of 500)", lambda s: number(s.warehouse_connections)),
        ("Redshift: queries at once", lambda s: number(s.warehouse_queries)),
        ("Kafka: partitions", lambda s: number(s.partitions)),
        ("Kafka: brokers", lambda s: number(s.brokers)),
        ("Kafka: 7 days, 3 replicas", lambda s: amount(s.kafka_bytes)),
        ("staged Parquet, 400 days", lambda s: amount(s.parquet_bytes)),
        ("Redshift: 400 days", lambda s: amount(s.warehouse_bytes)),
        ("Redshift: ra3.xlplus or as much", lambda s: number(s.warehouse_nodes)),
    ]
    return table(["", *(fleet.name for fleet in FLEETS)], [[label, *(say(s) for s in sizings)] for label, say in lines])


def cost_table() -> str:
    """What they cost."""
    costs = [cost(size(fleet)) for fleet in FLEETS]
    rows = [[what, *(number(each[what]) for each in costs)] for what in costs[0]]
    total = ["**sum**", *(f"**{number(sum(each.values()))}**" for each in costs)]
    device = ["a device", *(number(sum(each.values()) / f.devices) for each, f in zip(costs, FLEETS, strict=True))]
    return table(["US$ a month", *(fleet.name for fleet in FLEETS)], [*rows, total, device])


TABLES: Mapping[str, Callable[[], str]] = {"measured": measured_table, "sizes": sizes_table, "cost": cost_table}


def with_tables(page: str) -> str:
    """The page with its tables made anew; each stands between two comments."""
    for name, make in TABLES.items():
        parts = re.split(rf"(<!-- {name} -->\n).*?(<!-- end -->)", page, flags=re.DOTALL)
        if len(parts) != 4:
            raise ValueError(f"the page needs one block <!-- {name} --> … <!-- end -->")
        before, opening, closing, after = parts
        page = f"{before}{opening}{make()}\n{closing}{after}"
    return page


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        target = Path(__file__).resolve().parents[1] / "sizing.md"
        target.write_text(with_tables(target.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        sys.stdout.write("\n\n".join(make() for make in TABLES.values()) + "\n")
