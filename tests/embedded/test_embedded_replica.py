import psycopg
import pytest

from embedded.errors import ReplicaLagging
from embedded.replica import StreamingReplica
from tests.embedded.embedded_support import sql
from tests.waiting import PATIENCE_S, wait_until


@pytest.fixture
def primary(new_postgres):
    server = new_postgres()
    server.start()
    sql(server, "DROP TABLE IF EXISTS kept")
    sql(server, "CREATE TABLE kept (value int)")
    return server


@pytest.fixture
def replica(primary, directory):
    server = StreamingReplica(primary, directory / "replica")
    server.start()
    yield server
    server.kill()
    server.stop()
    primary.start()
    sql(primary, "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")


def insert(server, value):
    sql(server, f"INSERT INTO kept VALUES ({value})")


def values(server):
    return [value for (value,) in sql(server, "SELECT value FROM kept ORDER BY value")]


def test_it_follows_the_primary_and_takes_no_writes(primary, replica):
    assert sql(replica, "SELECT pg_is_in_recovery()") == [(True,)]
    for value in range(20):
        insert(primary, value)
        replica.wait_caught_up()
        assert values(replica) == list(range(value + 1))
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        insert(replica, 0)
    assert sql(primary, "SELECT state FROM pg_stat_replication") == [("streaming",)]


def test_commits_not_yet_flushed_count_as_committed(primary, replica):
    with psycopg.connect(primary.dsn(), autocommit=True) as connection:
        connection.execute("SET synchronous_commit = off")
        connection.execute("INSERT INTO kept VALUES (1)")
        replica.wait_caught_up()
    assert values(replica) == [1]


def test_paused_it_shows_the_past_until_resumed(primary, replica):
    insert(primary, 1)
    replica.wait_caught_up()
    replica.pause_replay()
    insert(primary, 2)
    with pytest.raises(ReplicaLagging, match="still replaying up to"):
        replica.wait_caught_up(timeout_s=0.2)
    assert values(replica) == [1]
    replica.resume_replay()
    replica.wait_caught_up()
    assert values(replica) == [1, 2]


def test_delayed_it_lags_by_what_was_set(primary, replica):
    replica.set_apply_delay(60_000)
    insert(primary, 1)
    with pytest.raises(ReplicaLagging):
        replica.wait_caught_up(timeout_s=0.3)
    with pytest.raises(ReplicaLagging, match="pausing"):
        replica.pause_replay(timeout_s=0.1)
    replica.resume_replay()
    assert values(replica) == []
    replica.set_apply_delay(0)
    replica.wait_caught_up()
    assert values(replica) == [1]


def test_roles_of_the_primary_work_on_it(primary, replica):
    primary.ensure_login("query")
    replica.wait_caught_up()
    assert sql(replica, "SELECT session_user", user="query") == [("query",)]


def test_it_catches_up_after_a_restart_and_after_a_crash(primary, replica):
    replica.stop()
    insert(primary, 1)
    replica.start()
    replica.wait_caught_up()
    replica.kill()
    insert(primary, 2)
    replica.start()
    replica.wait_caught_up()
    assert values(replica) == [1, 2]


def test_it_serves_without_its_primary_and_finds_it_again(primary, replica):
    insert(primary, 1)
    replica.wait_caught_up()
    primary.kill()
    assert values(replica) == [1]
    replica.restart()
    assert values(replica) == [1]
    primary.start()
    insert(primary, 2)
    replica.wait_caught_up(timeout_s=PATIENCE_S)
    assert values(replica) == [1, 2]


def test_it_follows_a_primary_that_moved_to_another_port(primary, replica, new_postgres):
    replica.stop()
    primary.stop()
    (primary.data_dir / "port").unlink()
    moved = new_postgres()
    moved.start()
    insert(moved, 1)
    follower = StreamingReplica(moved, replica.data_dir)
    with follower:
        follower.wait_caught_up()
        assert values(follower) == [1]


def test_dropped_it_leaves_no_slot_and_can_be_made_again(primary, replica):
    assert sql(primary, "SELECT count(*) FROM pg_replication_slots") == [(1,)]
    replica.drop()
    assert sql(primary, "SELECT count(*) FROM pg_replication_slots") == [(0,)]
    assert not (replica.data_dir / "pgdata").exists()
    insert(primary, 1)
    replica.start()
    replica.wait_caught_up()
    assert values(replica) == [1]


def test_a_lost_copy_is_made_again_over_its_old_slot(primary, replica):
    replica.kill()
    (replica.data_dir / "pgdata").rename(replica.data_dir / "lost")
    replica.start()
    wait_until(lambda: values(replica) == [], "new copy answers")
    assert sql(primary, "SELECT count(*) FROM pg_replication_slots") == [(1,)]


def lose_slot(primary, replica):
    sql(primary, "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")


def break_data(primary, replica):
    (replica.data_dir / "pgdata" / "global" / "pg_control").write_bytes(b"")


def lose_part(primary, replica):
    (replica.data_dir / "pgdata" / "PG_VERSION").unlink()


@pytest.mark.parametrize("harm", [lose_slot, break_data, lose_part])
def test_a_copy_that_cannot_follow_is_made_again_and_says_why(primary, replica, harm):
    replica.stop()
    insert(primary, 1)
    harm(primary, replica)
    said = []
    follower = StreamingReplica(primary, replica.data_dir, progress=said.append)
    try:
        follower.start_following()
        assert values(follower) == [1]
        assert any("made again" in line for line in said)
        assert sql(primary, "SELECT count(*) FROM pg_replication_slots WHERE active") == [(1,)]
    finally:
        follower.stop()


def test_a_copy_that_can_follow_is_kept(primary, replica):
    replica.stop()
    insert(primary, 1)
    said = []
    follower = StreamingReplica(primary, replica.data_dir, progress=said.append)
    follower.start_following()
    assert values(follower) == [1]
    follower.stop()
    assert said == []
