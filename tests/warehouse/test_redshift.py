"""Redshift's adapter against the stand-in: what goes wrong on the way, and what is on the wire."""

import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import boto3
import psycopg
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

from storage.errors import StorageUnavailable
from storage.model import ValueType
from storage.verify.readings import WarehouseStore
from storage.warehouse.cancellation import Cancellation
from storage.warehouse.port import DeadLetter, QueryRefused, Unit, WarehouseMissing
from storage.warehouse.redshift import RedshiftWarehouse
from storage.warehouse.redshift_session import RedshiftLogin
from storage.warehouse.staging import Staging
from storage.warehouse.steps import Step
from tests.waiting import PATIENCE_S
from tests.warehouse.redshift_stand_in import CopyFailed, RedshiftStandIn
from tests.warehouse_fixtures import TestDatabase, change_set, doubles, expected, held

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:ssl\.:DeprecationWarning"),
    # A connection that fails while it is made, the driver leaves to the garbage collector.
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <(ssl.SSLS|socket.s)ocket:pytest.PytestUnraisableExceptionWarning"
    ),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

TOPIC = "topic-id-1"


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """Has the garbage collector find those connections here, and not in somebody else's test."""
    yield
    gc.collect()


class Died(BaseException):
    """Stands for the process's death: nothing catches it, and everything it held is gone."""


Opened = Callable[..., RedshiftWarehouse]


@pytest.fixture
def opened(stand_in: RedshiftStandIn, redshift: RedshiftWarehouse) -> Iterator[Opened]:
    """More adapters of the same warehouse, each as a process of its own would have it."""
    made: list[RedshiftWarehouse] = []
    redshift.open_partitions(TOPIC, {0: 0})

    def make(**options: object) -> RedshiftWarehouse:
        staging = Staging("staging", "tests", grace_s=0)
        made.append(RedshiftWarehouse(RedshiftLogin.parse(stand_in.dsn), staging, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for warehouse in made:
        warehouse.close()


UNIT = Unit(0, TOPIC, 1, 0, 3, (change_set(doubles(30)), change_set([(1, 1, doubles(1)[0][2], -1.0)], revision=1)))
CONTENT = expected(doubles(30), [(1, 1, doubles(1)[0][2], -1.0)])


@pytest.mark.parametrize("step", ["decoded", "parquet-written", "staged", "manifest-written", "copied", "committed"])
def test_dying_at_a_step_loads_once(redshift: RedshiftWarehouse, opened: Opened, step: Step) -> None:
    def at(reached: Step) -> None:
        if reached == step:
            raise Died

    with pytest.raises(Died):
        opened(at=at).load([UNIT])
    (outcome,) = opened().load([UNIT])
    assert outcome.loaded == (step != "committed")
    assert outcome.state.next_offset == 3
    assert held(redshift) == CONTENT


def test_a_connection_cut_during_the_load_is_tried_again(
    redshift: RedshiftWarehouse, opened: Opened, stand_in: RedshiftStandIn
) -> None:
    cuts = iter([True])

    def on_copy(_: str) -> None:
        if next(cuts, False):
            stand_in.cut()
            raise ConnectionError

    stand_in.on_copy = on_copy
    assert opened().load([UNIT])[0].loaded
    assert held(redshift) == CONTENT


@pytest.mark.parametrize(
    "error",
    [
        NoCredentialsError(),
        EndpointConnectionError(endpoint_url="https://redshift"),
        ClientError({"Error": {"Code": "ExpiredToken", "Message": "it has expired"}}, "GetClusterCredentials"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_login_by_iam_that_fails_is_an_outage(
    redshift: RedshiftWarehouse, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The driver lets AWS's own errors through."""

    def connect(**_: object) -> None:
        raise error

    monkeypatch.setattr("redshift_connector.connect", connect)
    warehouse = RedshiftWarehouse(RedshiftLogin("h", 1, "d", "u", cluster="c"), Staging("staging", "tests"))
    try:
        with pytest.raises(StorageUnavailable, match="AWS gives no login"):
            warehouse.completeness()
    finally:
        warehouse.close()


def test_a_question_to_a_server_that_says_nothing_is_cut(
    redshift: RedshiftWarehouse, opened: Opened, stand_in: RedshiftStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert opened().load([UNIT])[0].loaded
    asking, cancellation = opened(), Cancellation()
    began, goes_on = threading.Event(), threading.Event()

    def on_statement(text: str) -> None:
        if "pg_sleep" in text:
            began.set()
            goes_on.wait(PATIENCE_S)

    stand_in.on_statement = on_statement
    # So that neither attempts, nor the driver's patience with each, come into it.
    monkeypatch.setattr("storage.warehouse.redshift_session._CANCELS", 1_000_000)
    monkeypatch.setattr("storage.warehouse.redshift_session._CONNECT_S", 1)
    monkeypatch.setattr("storage.warehouse.redshift_session._SILENT_S", 0.5)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(asking.query, "SELECT pg_sleep(0)", cancellation=cancellation)
        try:
            assert began.wait(PATIENCE_S)
            stand_in.speaks.clear()
            cancellation.cancel()
            with pytest.raises(StorageUnavailable, match="socket closed"):
                asked.result(PATIENCE_S)
        finally:
            stand_in.speaks.set()
            goes_on.set()


def test_a_connection_cut_after_the_commit_is_settled_by_the_state(
    redshift: RedshiftWarehouse, opened: Opened, stand_in: RedshiftStandIn
) -> None:
    loader = opened()
    commits = 0

    def on_statement(text: str) -> None:
        nonlocal commits
        # The commit of the load itself: it is carried out, and its answer is lost.
        if text.strip().upper() == "COMMIT" and stand_in.copies.count("atlasco.base_double") == 1 and commits == 0:
            commits += 1
            stand_in.after_next_commit = True

    stand_in.on_statement = on_statement
    (outcome,) = loader.load([UNIT])
    assert commits == 1
    assert outcome.loaded
    assert held(redshift) == CONTENT


def test_a_serializable_isolation_violation_is_tried_again(
    redshift: RedshiftWarehouse, opened: Opened, stand_in: RedshiftStandIn
) -> None:
    refusals = iter(["1023", "1023"])

    def on_copy(_: str) -> None:
        if (number := next(refusals, None)) is not None:
            raise CopyFailed(number)

    stand_in.on_copy = on_copy
    assert opened().load([UNIT])[0].loaded
    assert held(redshift) == CONTENT


def test_a_staging_bucket_that_refuses_is_no_loss(redshift: RedshiftWarehouse, opened: Opened) -> None:
    login = redshift._sessions._login
    broken = RedshiftWarehouse(login, Staging("no-such-bucket", "tests"))
    with pytest.raises(StorageUnavailable):
        broken.load([UNIT])
    broken.close()
    assert held(redshift) == {}
    assert opened().load([UNIT])[0].loaded
    assert held(redshift) == CONTENT


def test_a_file_that_vanished_fails_the_load_as_a_whole(redshift: RedshiftWarehouse, opened: Opened) -> None:
    def at(step: Step) -> None:
        if step == "manifest-written":
            client = boto3.client("s3")
            for item in client.list_objects_v2(Bucket="staging", Prefix="tests/delta_double")["Contents"]:
                client.delete_object(Bucket="staging", Key=item["Key"])

    with pytest.raises(Exception, match="does not exist"):
        opened(at=at).load([UNIT])
    assert held(redshift) == {}
    assert redshift.states()[0].next_offset == 0


def test_staged_files_are_encrypted_and_tidied(redshift: RedshiftWarehouse, stand_in: RedshiftStandIn) -> None:
    redshift.open_partitions(TOPIC, {0: 0})
    key = boto3.client("kms").create_key()["KeyMetadata"]["KeyId"]
    staging = Staging("staging", "tests", kms_key=key, grace_s=0)
    warehouse = RedshiftWarehouse(RedshiftLogin.parse(stand_in.dsn), staging)
    assert warehouse.load([UNIT])[0].loaded
    client = boto3.client("s3")
    objects = client.list_objects_v2(Bucket="staging", Prefix="tests/")["Contents"]
    assert {client.head_object(Bucket="staging", Key=o["Key"])["ServerSideEncryption"] for o in objects} == {"aws:kms"}
    assert warehouse.compact().files_deleted == len(objects)
    assert "Contents" not in client.list_objects_v2(Bucket="staging", Prefix="tests/")
    assert held(redshift) == CONTENT
    warehouse.close()


def test_a_large_file_goes_up_in_parts(stand_in: RedshiftStandIn) -> None:
    content = os.urandom(20 * 1024 * 1024)
    staged = Staging("staging", "tests").put("large", content)
    found = boto3.client("s3").head_object(Bucket="staging", Key="tests/large")
    assert (staged.bytes, found["ContentLength"]) == (len(content), len(content))
    # A multi-part object's tag says how many parts it has.
    assert found["ETag"].strip('"').endswith("-2")


def test_a_warehouse_that_was_not_set_up_says_so(stand_in: RedshiftStandIn) -> None:
    warehouse = RedshiftWarehouse(RedshiftLogin.parse(stand_in.dsn), Staging("staging", "tests"))
    with pytest.raises(WarehouseMissing):
        warehouse.states()
    with pytest.raises(WarehouseMissing):
        warehouse.query("SELECT 1")
    warehouse.close()


def test_a_warehouse_of_an_older_release_says_so_until_it_is_set_up_again(
    redshift: RedshiftWarehouse, database: TestDatabase
) -> None:
    """The audit asks for relations that it does not have yet; they are no mistake of the question."""
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        for value_type in ValueType:
            connection.execute(f"DROP VIEW atlasco.resolved_{value_type} CASCADE".encode())
    audit = WarehouseStore(redshift)
    with pytest.raises(WarehouseMissing, match="older release: run `atlasco warehouse init`"):
        list(audit.readings(1, 0, 2**40))
    with pytest.raises(WarehouseMissing, match="older release: run `atlasco warehouse init`"):
        list(audit.remains(1, [1]))
    with pytest.raises(QueryRefused):
        redshift.query("SELECT * FROM resolved_nothing")
    redshift.init()
    assert list(audit.readings(1, 0, 2**40)) == []


def test_a_certificate_of_nobody_is_refused(stand_in: RedshiftStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    warehouse = RedshiftWarehouse(RedshiftLogin.parse(stand_in.dsn), Staging("staging", "tests"))
    with pytest.raises(StorageUnavailable):
        warehouse.init()
    warehouse.close()


def test_a_wrong_password_is_refused(stand_in: RedshiftStandIn) -> None:
    login = replace(RedshiftLogin.parse(stand_in.dsn), password="wrong")
    warehouse = RedshiftWarehouse(login, Staging("staging", "tests"))
    with pytest.raises(StorageUnavailable):
        warehouse.init()
    warehouse.close()


def test_login_with_iam_takes_no_password() -> None:
    dsn = "redshift://loader@host.example/telemetry"
    login = RedshiftLogin.parse(dsn, cluster="serverless:main", region="eu-west-1")
    given = login.arguments()
    assert (given["iam"], given["serverless_work_group"], given["ssl"], given["sslmode"]) == (
        True,
        "main",
        True,
        "verify-full",
    )
    assert "password" not in given
    assert "secret" not in repr(RedshiftLogin.parse("redshift://u:secret@h/d"))
    with pytest.raises(ValueError, match="ATLASCO_REDSHIFT_CLUSTER"):
        RedshiftLogin.parse(dsn)


@pytest.mark.skipif(
    not (os.environ.get("ATLASCO_REDSHIFT_DSN") and os.environ.get("ATLASCO_REDSHIFT_STAGING")),
    reason="NOT RUN: needs a live cluster, ATLASCO_REDSHIFT_DSN and ATLASCO_REDSHIFT_STAGING",
)
def test_smoke_on_a_live_cluster(tmp_path: Path) -> None:
    """Opt-in. Makes the schema atlasco if it is missing, loads one unit into a partition of its own, and reads it."""
    cluster = os.environ.get("ATLASCO_REDSHIFT_CLUSTER", "")
    login = RedshiftLogin.parse(os.environ["ATLASCO_REDSHIFT_DSN"], cluster=cluster)
    role = os.environ.get("ATLASCO_REDSHIFT_COPY_ROLE", "default")
    warehouse = RedshiftWarehouse(login, Staging.parse(os.environ["ATLASCO_REDSHIFT_STAGING"]), copy_role=role)
    warehouse.init()
    partition = 1_000_000
    state = warehouse.open_partitions(TOPIC, {partition: 0})[partition]
    first = state.next_offset
    letter = DeadLetter(partition, first, "smoke")
    changes = (change_set(doubles(10), tenant=2**31 - 1),)
    unit = Unit(partition, state.topic_id, state.generation, first, first + 1, changes, (), (letter,))
    assert warehouse.load([unit])[0].loaded
    assert not warehouse.load([unit])[0].loaded
    count = "SELECT count(*) FROM entity_attributes_double WHERE tenant_id = %s"
    assert warehouse.query(count, [2**31 - 1]).rows[0][0] == 10
    assert warehouse.redrive(letter, None)
    warehouse.expire(doubles(10)[-1][2] + 1, 2**31 - 1)
    with pytest.raises(QueryRefused):
        warehouse.query("SELECT nonsense FROM nowhere")
    warehouse.close()
