"""The sizing page says what its model computes, from figures that were measured."""

import re
import runpy
from dataclasses import replace
from typing import Any

import pytest

from gateway.config import GatewayConfig
from tests.k8s.manifests import K8S, REPOSITORY, Manifests
from tests.k8s.test_workloads import REDSHIFT_CONNECTIONS, REDSHIFT_SLOTS, lanes_of_a_new_database

PAGE = REPOSITORY / "docs" / "sizing.md"
MODEL: dict[str, Any] = runpy.run_path(str(REPOSITORY / "docs" / "sizing" / "model.py"))
SIZE = MODEL["size"]
MILLION, MANY, VISION = MODEL["FLEETS"]


@pytest.mark.parametrize("name", sorted(MODEL["TABLES"]))
def test_a_table_is_the_models(name: str) -> None:
    assert MODEL["TABLES"][name]() in PAGE.read_text(encoding="utf-8"), "run: python docs/sizing/model.py --write"


def test_writing_again_changes_nothing() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert MODEL["with_tables"](text) == text
    with pytest.raises(ValueError, match="needs one block"):
        MODEL["with_tables"]("nothing")


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ("gateway, CPU s per million", "gateway_cpu_s_per_million"),
        ("PostgreSQL, CPU s per million", "postgres_cpu_s_per_million"),
        ("ingest, acked readings/s", "ingest_readings_s"),
    ],
)
def test_figures_are_near_those_of_the_benchmark(row: str, field: str) -> None:
    """Within a half: the benchmark is repeated on other days; when it drifts further, the model is to be looked at."""
    text = (REPOSITORY / "bench" / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^\| {re.escape(row)} \| ([\d,.]+) \| ([\d,.]+) \| ([\d,.]+) \|", text, re.MULTILINE)
    assert found, row
    for given, measured in zip(found.groups(), getattr(MODEL["MEASURED"], field).values(), strict=True):
        value = float(given.replace(",", ""))
        assert value / 1.5 <= measured <= value * 1.5, row


def test_one_million_devices_fit_production(prod: Manifests) -> None:
    sizing, limits = SIZE(MILLION), MODEL["LIMITS"]
    assert sizing.writers == 1
    text = (REPOSITORY / "terraform" / "prod.tfvars").read_text(encoding="utf-8")

    def value(name: str) -> int:
        found = re.search(rf"^\s*{name}\s*= (\d+)", text, re.MULTILINE)
        assert found
        return int(found[1])

    stored = sizing.history_bytes + sizing.latest_bytes + sizing.outbox_bytes
    assert stored <= 0.75 * value("allocated_storage_gib") * 2**30
    assert sizing.connections < sizing.connections_after_failover <= 0.95 * value("max_connections")
    assert sizing.standby_connections <= 0.95 * value("max_connections")
    assert sizing.warehouse_connections <= 0.95 * limits.redshift_connections
    assert sizing.warehouse_queries <= limits.redshift_slots * (1 + value("concurrency_scaling_max"))
    assert sizing.partitions <= value("partitions")
    assert sizing.kafka_bytes <= 0.6 * 3 * value("storage_gib") * 2**30
    assert sum(MODEL["cost"](sizing).values()) <= value("monthly_budget_usd")
    assert sizing.gateways <= prod.get("HorizontalPodAutoscaler", "atlasco-gateway")["spec"]["maxReplicas"]
    metrics = (K8S / "components" / "autoscale-on-streams" / "autoscaler.yaml").read_text(encoding="utf-8")
    assert f'"{limits.gateway_streams}"' in metrics or f"{limits.gateway_streams // 1000}k" in metrics


def test_connections_of_a_gateway_are_its_settings() -> None:
    """The model multiplies what the configuration holds; the lanes are the database's."""
    limits, config = MODEL["LIMITS"], GatewayConfig(dsn="")
    own = config.registry_connections + config.unary_connections + config.query_connections
    assert limits.gateway_connections == lanes_of_a_new_database() + own + 2
    assert limits.replica_connections == config.replica_connections + 1
    assert limits.warehouse_queries == config.warehouse_queries
    assert limits.warehouse_connections == 2 * config.warehouse_queries + 1
    assert (limits.redshift_connections, limits.redshift_slots) == (REDSHIFT_CONNECTIONS, REDSHIFT_SLOTS)


def test_what_the_page_says_of_the_ends() -> None:
    limits, text = MODEL["LIMITS"], " ".join(PAGE.read_text(encoding="utf-8").split())
    found = re.search(r"\*\*At ([\d,]+) connections\*\*, that is (\d+) gateways", text)
    tfvars = (REPOSITORY / "terraform" / "prod.tfvars").read_text(encoding="utf-8")
    allowed = re.search(r"max_connections\s*= (\d+)", tfvars)
    assert found and allowed
    assert int(found[1].replace(",", "")) == int(allowed[1])
    assert int(found[2]) == (int(allowed[1]) - 48) // (limits.gateway_connections + limits.replica_connections)
    ends = re.search(r"\*\*Redshift ends at (\d+) gateways\*\*", text)
    assert ends and int(ends[1]) == (limits.redshift_connections - 18) // limits.warehouse_connections


def test_storage_decides_where_the_rate_is_small() -> None:
    slow = replace(MILLION, attributes=1_000, interval_s=86_400 * 7, history_days=3_650)
    sizing = SIZE(slow)
    assert sizing.writers == sizing.writers_by_storage > sizing.writers_by_rate == 1


@pytest.mark.parametrize("fleet", [MILLION, MANY, VISION], ids=lambda fleet: fleet.name)
def test_more_of_anything_never_costs_less(fleet: Any) -> None:
    def total(of: Any) -> float:
        return float(sum(MODEL["cost"](SIZE(of)).values()))

    base = total(fleet)
    assert total(replace(fleet, devices=fleet.devices * 2)) >= base
    assert total(replace(fleet, interval_s=fleet.interval_s / 2)) >= base
    assert total(replace(fleet, history_days=fleet.history_days * 2)) >= base
    assert total(replace(fleet, connected=fleet.connected / 10)) <= base


def test_leaves_stay_below_what_planning_takes() -> None:
    for fleet in MODEL["FLEETS"]:
        assert SIZE(fleet).leaves <= MODEL["LIMITS"].leaves


@pytest.mark.parametrize(
    ("value", "text"), [(0.0143, "0.0143"), (999.0, "999"), (11_111.1, "11,100"), (1_375_000.0, "1,380,000")]
)
def test_numbers_are_rounded_for_people(value: float, text: str) -> None:
    assert MODEL["number"](value) == text
