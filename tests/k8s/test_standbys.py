"""The connection strings that the manifests give gateways for standbys, against a real primary and its replica."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from embedded.postgres import EmbeddedPostgres
from embedded.replica import StreamingReplica
from gateway.config import GatewayConfig
from k8s.values_from_terraform import replica_dsns
from storage.database import PoolSettings, Role, make_pool


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[EmbeddedPostgres, StreamingReplica]]:
    # Not in pytest's own directory: as root the server runs under another account, which cannot enter there.
    with (
        TemporaryDirectory(prefix="atlasco-standbys-") as directory,
        EmbeddedPostgres(Path(directory) / "data") as primary,
    ):
        replica = StreamingReplica(primary, Path(directory) / "replica")
        replica.start()
        yield primary, replica
        replica.stop()


def login_of(given: dict[str, Any]) -> str:
    """The secret's part: no host and no port."""
    return make_conninfo("", **{name: given[name] for name in ("user", "password", "dbname") if name in given})


def where(dsn: str) -> bool:
    """Whether a gateway's pool, with this connection string, ends up on a standby."""

    async def ask() -> bool:
        async with make_pool(PoolSettings(dsn, Role.QUERY, max_size=1)) as pool, pool.connection(20) as connection:
            cursor = await connection.execute("SELECT pg_is_in_recovery()")
            row = await cursor.fetchone()
            assert row is not None
            return bool(row[0])

    return asyncio.run(ask())


def test_both_orders_find_the_standby(pair: tuple[EmbeddedPostgres, StreamingReplica]) -> None:
    given = [conninfo_to_dict(server.dsn()) for server in pair]
    hosts = [str(each["host"]) for each in given]
    # Members of a cluster share the port; these share a machine, so ports tell them apart here.
    names = ["first.example", "second.example", "third.example"]
    places = dict(zip(names, [0, 1, 0], strict=True))
    text = replica_dsns(names).replace("$(ATLASCO_QUERY_DSN)", login_of(given[0]))
    config = GatewayConfig(dsn="", replica_dsns=text)
    assert len(config.replicas) == 2
    for dsn in config.replicas:
        order = str(conninfo_to_dict(dsn)["host"]).split(",")
        here = make_conninfo(
            dsn,
            host=",".join(hosts[places[name]] for name in order),
            port=",".join(str(given[places[name]]["port"]) for name in order),
        )
        assert where(here)


def test_without_a_standby_there_is_no_connection(pair: tuple[EmbeddedPostgres, StreamingReplica]) -> None:
    """The router then asks the primary by its own connections, under its own limits."""
    primary, _ = pair
    given = conninfo_to_dict(primary.dsn())
    (dsn,) = replica_dsns(["a", "b"]).replace("$(ATLASCO_QUERY_DSN)", login_of(given)).split(";")
    both = {"host": f"{given['host']},{given['host']}", "port": f"{given['port']},{given['port']}"}
    with pytest.raises(psycopg.OperationalError, match="standby"):
        psycopg.connect(make_conninfo(dsn, **both))
