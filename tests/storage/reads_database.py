"""A database with readings of every type, known by heart, for the tests of reads, of queries and of the command.

Several test directories share it; each test module makes a database of its own.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from psycopg import sql

from embedded.postgres import EmbeddedPostgres

TYPES = ("double", "bigint", "boolean", "text")
HOUR_US = 3_600_000_000
DAY_US = 24 * HOUR_US


@dataclass
class Known:
    """What is stored, as the tests know it. Times in microseconds."""

    postgres: EmbeddedPostgres
    name: str
    now_us: int = 0
    tenants: dict[str, int] = field(default_factory=dict)
    # (tenant, entity, attribute) -> time -> (value, revision)
    readings: dict[tuple[str, str, str], dict[int, tuple[Any, int]]] = field(default_factory=dict)
    # (tenant, attribute) -> type, in the order registered
    attributes: dict[tuple[str, str], str] = field(default_factory=dict)
    # (tenant, entity) -> (type, labels), in the order registered
    entities: dict[tuple[str, str], tuple[str, dict[str, str]]] = field(default_factory=dict)

    def dsn(self, user: str = "postgres") -> str:
        return self.postgres.dsn(self.name, user)

    def names(self, tenant: str, of: str = "entities") -> list[str]:
        """The tenant's devices or attributes in the order registered."""
        return [name for owner, name in getattr(self, of) if owner == tenant]


@contextmanager
def known_database(data_dir: Path) -> Iterator[Known]:
    """A server with logins "reader" (query) and "writer" (ingest), and two tenants' readings: acme and rival."""
    with EmbeddedPostgres(data_dir) as postgres:
        postgres.ensure_database("known")
        known = Known(postgres, "known")
        with psycopg.connect(known.dsn(), autocommit=True) as connection:
            connection.execute(resources.files("storage").joinpath("sql", "schema.sql").read_bytes())
            for login, group in (("reader", "atlasco_query"), ("writer", "atlasco_ingest")):
                postgres.ensure_login(login)
                connection.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(group), sql.Identifier(login)))
            _fill(connection, known)
        yield known


def _fill(connection: psycopg.Connection[Any], known: Known) -> None:
    random = np.random.default_rng(7)
    row = connection.execute("SELECT (extract(epoch FROM now()) * 1000000)::bigint").fetchone()
    assert row is not None
    known.now_us = row[0]
    for tenant in ("acme", "rival"):
        row = connection.execute("SELECT register_tenant(%s)", [tenant]).fetchone()
        assert row is not None
        known.tenants[tenant] = row[0]
        connection.execute(
            "UPDATE tenants SET window_past = '10 days', retention = '10 days' WHERE name = %s", [tenant]
        )
        connection.execute(
            "SELECT ensure_history(%s, now() - interval '10 days', now() + interval '2 hours')", [row[0]]
        )
        for number in range(8):
            labels = {"site": f"s{number % 3}", "line": "north" if number % 2 else "south"}
            register_entity(connection, known, tenant, f"device-{7 - number}", "pump" if number % 2 else "fan", labels)
        for number in range(8):
            register_attribute(connection, known, tenant, f"attribute-{number}", TYPES[number % 4])
        for entity in known.names(tenant):
            for attribute in known.names(tenant, "attributes"):
                if random.random() < 0.8:
                    store(
                        connection, known, tenant, entity, attribute, _some_readings(random, known, tenant, attribute)
                    )
    connection.execute("UPDATE tenants SET retention = '8 days', window_past = '7 days'")


def register_entity(
    connection: psycopg.Connection[Any],
    known: Known,
    tenant: str,
    name: str,
    kind: str = "",
    labels: dict[str, str] | None = None,
) -> None:
    connection.execute(
        "SELECT register_entity(%s, %s, %s, %s)",
        [known.tenants[tenant], name, kind, psycopg.types.json.Jsonb(labels or {})],
    )
    known.entities[tenant, name] = (kind, labels or {})


def register_attribute(
    connection: psycopg.Connection[Any], known: Known, tenant: str, name: str, kind: str, *, keeps_latest: bool = True
) -> None:
    connection.execute(
        "INSERT INTO attributes (tenant_id, name, type, unit, keeps_latest) VALUES (%s, %s, %s, 'u', %s)",
        [known.tenants[tenant], name, kind, keeps_latest],
    )
    known.attributes[tenant, name] = kind


def store(
    connection: psycopg.Connection[Any],
    known: Known,
    tenant: str,
    entity: str,
    attribute: str,
    readings: dict[int, tuple[Any, int]],
) -> None:
    """Write history and the latest value the way ingest leaves them."""
    kind = known.attributes[tenant, attribute]
    keys = connection.execute(
        "SELECT e.tenant_id, e.entity_id, a.attribute_id FROM entities e JOIN attributes a USING (tenant_id) "
        "WHERE e.tenant_id = %s AND e.external_id = %s AND a.name = %s",
        [known.tenants[tenant], entity, attribute],
    ).fetchone()
    assert keys is not None
    with connection.cursor() as cursor:
        with cursor.copy(
            sql.SQL("COPY {} (tenant_id, entity_id, attribute_id, ts, value, revision) FROM STDIN").format(
                sql.Identifier(f"entity_attributes_{kind}")
            )
        ) as copy:
            for time_us, (value, revision) in readings.items():
                copy.write_row([*keys, _iso(time_us), value, revision or None])
        newest = max(readings)
        cursor.execute(
            sql.SQL(
                "INSERT INTO latest_values (tenant_id, entity_id, attribute_id, ts, {}) VALUES (%s, %s, %s, %s, %s)"
            ).format(sql.Identifier(f"{kind}_value")),
            [*keys, _iso(newest), readings[newest][0]],
        )
    known.readings[tenant, entity, attribute] = readings


def _iso(time_us: int) -> str:
    return str(np.datetime64(time_us, "us")) + "+00"


def _some_readings(
    random: np.random.Generator, known: Known, tenant: str, attribute: str
) -> dict[int, tuple[Any, int]]:
    times = known.now_us - random.integers(0, int(9.9 * DAY_US), int(random.integers(1, 60)))
    return {
        int(time_us): (_some_value(random, known.attributes[tenant, attribute]), int(random.random() < 0.1))
        for time_us in times
    }


def _some_value(random: np.random.Generator, kind: str) -> Any:
    match kind:
        case "double":
            return float(random.choice([random.normal(), math.nan, math.inf, -math.inf, -0.0]))
        case "bigint":
            return int(random.choice(np.array([random.integers(-1000, 1000), 2**63 - 1, -(2**63)], dtype=np.int64)))
        case "boolean":
            return bool(random.random() < 0.5)
        case _:
            return str(random.choice(["", "idle", "käse", "x" * 300, "NULL", "{a,b}"]))
