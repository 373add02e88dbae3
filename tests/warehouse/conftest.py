from collections.abc import Iterator
from pathlib import Path

import boto3
import psycopg
import pytest
from moto.server import ThreadedMotoServer

from embedded.postgres import EmbeddedPostgres
from storage.warehouse.local import LocalWarehouse
from storage.warehouse.local_limits import LocalLimits
from storage.warehouse.port import Warehouse
from storage.warehouse.redshift import RedshiftWarehouse
from storage.warehouse.redshift_session import RedshiftLogin
from storage.warehouse.staging import Staging
from tests.warehouse.redshift_stand_in import RedshiftStandIn, make_certificate
from tests.warehouse_fixtures import TestDatabase, database_server, fresh_database


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    with database_server() as server:
        yield server


@pytest.fixture(scope="session")
def catalog_database(postgres: EmbeddedPostgres) -> Iterator[TestDatabase]:
    with fresh_database(postgres, "template0") as made:
        yield made


@pytest.fixture
def database(catalog_database: TestDatabase) -> TestDatabase:
    """A database without anything of ours in it; a fresh one for each test would take most of the time."""
    with psycopg.connect(catalog_database.dsn, autocommit=True) as connection:
        connection.execute("DROP SCHEMA IF EXISTS warehouse, atlasco CASCADE")
    return catalog_database


@pytest.fixture
def local(database: TestDatabase, tmp_path: Path) -> Iterator[LocalWarehouse]:
    warehouse = LocalWarehouse(tmp_path / "warehouse", database.dsn, limits=LocalLimits(grace_s=0.0))
    warehouse.init()
    yield warehouse
    warehouse.close()


@pytest.fixture(params=["local", "redshift"])
def warehouse(request: pytest.FixtureRequest) -> Warehouse:
    """Every adapter in turn: the contract is one."""
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """An S3 of moto's on loopback; its endpoint."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def stand_in(
    database: TestDatabase, s3: str, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[RedshiftStandIn]:
    """A stand-in over an empty database, with an empty bucket "staging"."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        # The driver trusts the system's authorities besides its own: here, that of the test.
        "SSL_CERT_FILE": str(certificate[0]),
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="staging")
    for item in client.list_objects_v2(Bucket="staging").get("Contents", ()):
        client.delete_object(Bucket="staging", Key=item["Key"])
    server = RedshiftStandIn(database.dsn, certificate)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redshift(stand_in: RedshiftStandIn) -> Iterator[RedshiftWarehouse]:
    warehouse = RedshiftWarehouse(RedshiftLogin.parse(stand_in.dsn), Staging("staging", "tests", grace_s=0))
    warehouse.init()
    yield warehouse
    warehouse.close()
