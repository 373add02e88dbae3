"""A gateway's way to Redshift: a login that may read what queries read, and nothing else."""

import gc
import re
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from embedded.postgres import EmbeddedPostgres
from storage.errors import StorageDefect, StorageUnavailable
from storage.model import ValueType
from storage.reads.warehouse import warehouse_names
from storage.warehouse.config import WarehouseConfig, WarehouseReadConfig, open_to_read
from storage.warehouse.port import QueryRefused, Warehouse
from storage.warehouse.reader import WarehouseReader
from storage.warehouse.redshift import RedshiftWarehouse
from storage.warehouse.redshift_reader import RedshiftReader
from storage.warehouse.redshift_session import RedshiftLogin
from storage.warehouse.statements import statements
from tests.warehouse.redshift_stand_in import RedshiftStandIn
from tests.warehouse_fixtures import TestDatabase

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:ssl\.:DeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <(ssl.SSLS|socket.s)ocket:pytest.PytestUnraisableExceptionWarning"
    ),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "deploy-aws.md"
READER = "atlasco_reader"


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    yield
    gc.collect()


def grants() -> list[str]:
    """What the guide has an operator grant the reader, in PostgreSQL's words: there a group is a role."""
    found = re.findall(r"^(GRANT [^;]+ TO GROUP atlasco_read);", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    return [statement.replace("TO GROUP atlasco_read", f"TO {READER}") for statement in found]


@pytest.fixture
def reading(
    postgres: EmbeddedPostgres,
    database: TestDatabase,
    redshift: RedshiftWarehouse,
    certificate: tuple[Path, Path],
) -> Iterator[RedshiftStandIn]:
    """The same warehouse, which `redshift` has set up, signed in to as the reader; without rights yet."""
    postgres.ensure_login(READER)
    server = RedshiftStandIn(psycopg.conninfo.make_conninfo(database.dsn, user=READER), certificate)
    server.start()
    yield server
    server.stop()
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        connection.execute(f"DROP OWNED BY {READER}")


def reader(stand_in: RedshiftStandIn) -> Warehouse:
    # As `atlasco serve` opens it: no bucket, no role, no region.
    return open_to_read(WarehouseReadConfig(kind="redshift", dsn="", redshift_dsn=stand_in.dsn))


def grant(database: TestDatabase) -> None:
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        for statement in grants():
            connection.execute(statement.encode())


def test_the_guides_grants_are_enough_to_read(reading: RedshiftStandIn, database: TestDatabase) -> None:
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        connection.execute("INSERT INTO atlasco.tenants VALUES (1, 'acme')")
        connection.execute("INSERT INTO atlasco.entities VALUES (1, 7, 'pump')")
        connection.execute("INSERT INTO atlasco.attributes VALUES (1, 3, 'level', 'double')")
    grant(database)
    warehouse = reader(reading)
    names, completeness = warehouse_names(WarehouseReader(warehouse), "acme", ["pump"], ["level"])
    assert names.entities == {7: "pump"}
    assert completeness == warehouse.completeness()
    for value_type in ValueType:
        # Through the view: its owner's rights reach what is beneath.
        assert warehouse.query(f"SELECT value FROM entity_attributes_{value_type}").rows == []
    warehouse.close()


def test_they_are_for_nothing_else(reading: RedshiftStandIn, database: TestDatabase) -> None:
    grant(database)
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        held = connection.execute(
            "SELECT c.relname, p.privilege FROM pg_class c, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', "
            "'TRUNCATE', 'REFERENCES', 'TRIGGER']) p(privilege) WHERE c.relnamespace = 'atlasco'::regnamespace "
            "AND c.relkind IN ('r', 'v') AND has_table_privilege(%s, c.oid, p.privilege)",
            [READER],
        ).fetchall()
        may_make = connection.execute("SELECT has_schema_privilege(%s, 'atlasco', 'CREATE')", [READER]).fetchone()
    assert {privilege for _, privilege in held} == {"SELECT"}
    state = {"load_state", "watermarks", "dead_letters", "complete_from"}
    names = {"tenants", "entities", "attributes"}
    assert {name for name, _ in held} == state | names | {f"entity_attributes_{value_type}" for value_type in ValueType}
    assert may_make == (False,)
    with pytest.raises(StorageDefect, match="permission denied"):
        reader(reading).halt(0, 1, "a reader must not be able to")


def test_they_name_every_relation_that_a_question_reads() -> None:
    """The statements of questions name no schema; those of the state are in the other file, and tried above."""
    texts = " ".join(statements("analytics.sql").values())
    read = set(re.findall(r"\b(?:FROM|JOIN)\s+([a-z_]+)", texts))
    granted = set(re.findall(r"atlasco\.([a-z_]+)", " ".join(grants())))
    assert read and read <= granted


def test_without_rights_it_is_away_until_they_are_granted(reading: RedshiftStandIn, database: TestDatabase) -> None:
    """A gateway that is up before the operator has granted anything goes on, and finds the warehouse later."""
    warehouse = reader(reading)
    with pytest.raises(StorageUnavailable, match="permission denied"):
        warehouse.completeness()
    grant(database)
    assert warehouse.completeness().as_of_us is None
    warehouse.close()


def test_what_was_measured_is_told_again_for_a_while(reading: RedshiftStandIn, database: TestDatabase) -> None:
    grant(database)
    asked: list[str] = []
    reading.on_statement = asked.append
    now = [100.0]
    warehouse = RedshiftReader(RedshiftLogin.parse(reading.dsn), measured_s=15, monotonic=lambda: now[0])
    first = warehouse.completeness()
    statements = len(asked)
    now[0] += 14
    assert warehouse.completeness() is first
    assert len(asked) == statements
    now[0] += 1
    warehouse.completeness()
    assert len(asked) > statements
    # A query that failed may mean that it is away: it is asked again.
    with pytest.raises(QueryRefused):
        warehouse.query("SELECT nothing FROM nowhere")
    statements = len(asked)
    warehouse.completeness()
    assert len(asked) > statements
    warehouse.close()


def test_whoever_loads_still_needs_a_bucket() -> None:
    with pytest.raises(ValueError, match="ATLASCO_REDSHIFT_STAGING"):
        WarehouseConfig(kind="redshift", dsn="", redshift_dsn="redshift://u:p@h/d")
    with pytest.raises(ValueError, match="ATLASCO_REDSHIFT_DSN"):
        WarehouseReadConfig(kind="redshift", dsn="")
