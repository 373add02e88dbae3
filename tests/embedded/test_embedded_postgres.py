import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import psycopg
import pytest

from embedded.errors import DataDirInUse, DataDirUnusable, PostgresStartFailed
from embedded.ports import LOOPBACK, is_free
from tests.embedded.embedded_support import sql
from tests.waiting import wait_until

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has to switch to another account")

OWNER = """
import sys
from pathlib import Path
from embedded.postgres import EmbeddedPostgres
server = EmbeddedPostgres(Path(sys.argv[1]))
server.start()
print(server.pid, flush=True)
sys.stdin.read()
"""


def start_in_other_process(data_dir: Path) -> "subprocess.Popen[str]":
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(data_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    assert owner.stdout.readline().strip().isdigit()
    return owner


def kill_process(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()


def write_row(server, value):
    sql(server, "DROP TABLE IF EXISTS kept")
    sql(server, "CREATE TABLE kept (value text)")
    sql(server, f"INSERT INTO kept VALUES ('{value}')")


def rows(server):
    return [value for (value,) in sql(server, "SELECT value FROM kept ORDER BY value")]


def test_a_new_server_is_durable_and_ready_for_replicas(new_postgres):
    with new_postgres() as server:
        names = (
            "fsync",
            "full_page_writes",
            "synchronous_commit",
            "wal_level",
            "hot_standby",
            "data_checksums",
            "listen_addresses",
            "timezone",
        )
        found = [sql(server, f"SHOW {name}")[0][0] for name in names]
        assert found == ["on", "on", "on", "replica", "on", "on", LOOPBACK, "UTC"]
        assert sql(server, "SELECT current_setting('server_version_num')::int / 10000") == [(18,)]
        assert is_free(server.port) is False
    assert not server.is_running
    assert is_free(server.port)


def test_nobody_gets_in_without_the_password(new_postgres):
    with new_postgres() as server:
        for host in (LOOPBACK, str(server.socket_dir)):
            with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
                psycopg.connect(f"host={host} port={server.port} user=postgres password=guess dbname=postgres")
        with psycopg.connect(server.dsn(), host=str(server.socket_dir)) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        assert stat.S_IMODE((server.data_dir / "password").stat().st_mode) == 0o600


def test_data_port_and_password_survive_a_restart(new_postgres):
    first = new_postgres()
    first.start()
    write_row(first, "before")
    dsn = first.dsn()
    first.stop()
    with new_postgres() as second:
        assert second.dsn() == dsn
        assert rows(second) == ["before"]


def test_settings_reach_the_server(new_postgres):
    odd = r"it's a \ test"
    with new_postgres(settings={"work_mem": "7MB", "cluster_name": odd, "fsync": "off"}) as server:
        assert sql(server, "SHOW work_mem") == [("7MB",)]
        assert sql(server, "SHOW cluster_name") == [(odd,)]
        assert sql(server, "SHOW fsync") == [("off",)]
        server.configure(work_mem="9MB")
        wait_until(lambda: sql(server, "SHOW work_mem") == [("9MB",)], "new setting taken")


@pytest.mark.parametrize("name", ["port", "listen_addresses", "x'; y", "", "a b"])
def test_settings_that_are_ours_or_no_names_are_refused(new_postgres, name):
    with pytest.raises(ValueError, match="not a setting"):
        new_postgres(settings={name: "1"})


def test_killed_completely_it_recovers_everything_committed(new_postgres):
    server = new_postgres()
    server.start()
    port = server.port
    write_row(server, "committed")
    server.kill()
    assert not server.is_running
    server.start()
    assert rows(server) == ["committed"]
    assert server.port == port


def is_gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_killed_postmaster_with_backends_alive_is_cleared_away(new_postgres):
    server = new_postgres()
    server.start()
    write_row(server, "committed")
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        backend = connection.info.backend_pid
        os.kill(backend, signal.SIGSTOP)  # it cannot notice that its postmaster is gone
        wait_until(lambda: psutil.Process(backend).status() == psutil.STATUS_STOPPED, "backend stopped")
        os.kill(server.pid, signal.SIGKILL)
        wait_until(lambda: not server.is_running, "postmaster gone")
        assert psutil.Process(backend).status() == psutil.STATUS_STOPPED
        new = new_postgres()
        server.stop()
        new.start()
        assert rows(new) == ["committed"]
        wait_until(lambda: is_gone(backend), "backend gone")


@pytest.mark.parametrize("content", ["{pid}\n{dir}\n1\n5432\n\n127.0.0.1\n\nready\n", "", "half a li"])
def test_a_stale_postmaster_pid_does_not_prevent_a_start(new_postgres, content):
    server = new_postgres()
    server.start()
    write_row(server, "kept")
    server.stop()
    stale = server.data_dir / "pgdata" / "postmaster.pid"
    stale.write_text(content.format(pid=os.getpid(), dir=server.data_dir / "pgdata"))
    assert not server.is_running
    server.start()
    assert rows(server) == ["kept"]


def test_a_creation_that_was_killed_is_begun_again(new_postgres, directory):
    server = new_postgres(directory / "pg")
    half = server.data_dir / "pgdata.new" / "base"
    half.mkdir(parents=True)
    (half / "part").write_text("")
    with server:
        assert sql(server, "SELECT 1") == [(1,)]
    assert not half.exists()


def test_a_failed_start_shows_the_log_and_leaves_nothing_running(new_postgres):
    server = new_postgres(settings={"shared_buffers": "plenty"})
    with pytest.raises(PostgresStartFailed) as failed:
        server.start()
    assert str(server.log_file) in str(failed.value)
    assert 'invalid value for parameter "shared_buffers": "plenty"' in str(failed.value)
    assert failed.value.log_tail
    assert not server.is_running
    assert not server.is_owner
    with new_postgres() as repaired:
        assert sql(repaired, "SELECT 1") == [(1,)]


def test_another_version_of_the_data_is_refused(new_postgres, directory):
    server = new_postgres(directory / "pg")
    (server.data_dir / "pgdata").mkdir(parents=True)
    (server.data_dir / "pgdata" / "PG_VERSION").write_text("16\n")
    with pytest.raises(DataDirUnusable, match="made by PostgreSQL 16"):
        server.start()


def test_a_file_in_place_of_the_directory_is_refused(new_postgres, directory):
    (directory / "file").write_text("")
    with pytest.raises(DataDirUnusable):
        new_postgres(directory / "file").start()


def test_a_fixed_port_that_is_taken_is_an_error(new_postgres):
    with socket.create_server((LOOPBACK, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(PostgresStartFailed, match="could not bind"):
            new_postgres(port=port).start()
    with new_postgres(port=port) as server:
        assert server.port == port


def test_a_kept_port_that_is_taken_is_replaced(new_postgres):
    server = new_postgres()
    with server:
        port = server.port
    with socket.create_server((LOOPBACK, port)), server:
        assert server.port != port
        assert sql(server, "SELECT 1") == [(1,)]


def test_a_second_user_of_the_directory_attaches(new_postgres):
    owner, guest = new_postgres(), new_postgres(settings={"work_mem": "9MB"})
    owner.start()
    guest.start()
    assert (owner.is_owner, guest.is_owner) == (True, False)
    assert guest.dsn() == owner.dsn()
    assert sql(guest, "SHOW work_mem") != [("9MB",)]
    guest.stop()
    assert owner.is_running
    with pytest.raises(DataDirInUse):
        guest.restart()
    with pytest.raises(DataDirInUse, match="stop that first"):
        new_postgres(port=1).start()
    owner.stop()
    guest.start()
    assert guest.is_owner


def test_the_server_outlives_a_killed_owner_and_is_taken_over(new_postgres, shared_cluster):
    owner = start_in_other_process(shared_cluster)
    server = new_postgres()
    server.start()
    assert not server.is_owner
    pid = server.pid
    kill_process(owner)
    assert sql(server, "SELECT 1") == [(1,)]
    server.start()
    assert server.is_owner
    assert server.pid == pid
    server.stop()
    assert not server.is_running


def test_taking_over_with_other_settings_restarts_it(new_postgres, shared_cluster):
    kill_process(start_in_other_process(shared_cluster))
    server = new_postgres(settings={"work_mem": "9MB"})
    assert server.is_running
    pid = server.pid
    server.start()
    assert server.pid != pid
    assert sql(server, "SHOW work_mem") == [("9MB",)]


def test_an_immediate_stop_loses_nothing_committed(new_postgres):
    server = new_postgres()
    server.start()
    write_row(server, "committed")
    server.stop("immediate")
    server.start()
    assert rows(server) == ["committed"]


def test_a_stop_that_waits_for_a_client_ends_at_its_deadline(new_postgres):
    server = new_postgres()
    server.start()
    with psycopg.connect(server.dsn()):
        server.stop("smart", timeout_s=0.1)
    assert not server.is_running


def test_roles_and_databases(new_postgres):
    with new_postgres() as server:
        server.ensure_database('odd "name')
        server.ensure_database('odd "name')
        sql(server, "CREATE ROLE query NOLOGIN")
        for role in ("ingest", "query", "query"):
            server.ensure_login(role)
            found = sql(server, "SELECT session_user, current_database()", user=role, dbname='odd "name')
            assert found == [(role, 'odd "name')]


@pytest.mark.parametrize("name", ["with space", 'it\'s $HOME "quoted" `x`', "温度", "back\\slash"])
def test_any_name_of_a_data_directory_will_do(new_postgres, directory, name):
    with (
        new_postgres(directory / name) as server,
        psycopg.connect(server.dsn(), host=str(server.socket_dir)) as connection,
    ):
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_long_path_has_no_socket_and_works(new_postgres, directory):
    with new_postgres(directory / ("d" * 90)) as server:
        assert server.socket_dir is None
        assert sql(server, "SELECT 1") == [(1,)]


def test_variables_of_the_caller_do_not_reach_the_server(new_postgres, monkeypatch):
    monkeypatch.setenv("PGDATA", "/nowhere")
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("LC_ALL", "xx_YY")
    with new_postgres() as server:
        assert sql(server, "SELECT 1") == [(1,)]


@as_root
def test_run_by_root_it_keeps_no_power_and_opens_nothing_to_others(new_postgres, directory):
    closed = directory / "closed"
    closed.mkdir(mode=0o700)
    with new_postgres(closed / "pg") as server:
        process = psutil.Process(server.pid)
        assert 0 not in process.uids()
        assert 0 not in process.gids()
        assert "CapEff:\t0000000000000000" in Path(f"/proc/{server.pid}/status").read_text()
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            sql(server, "SELECT pg_read_file('/etc/shadow')")
    for path in (closed, closed / "pg"):
        assert path.stat().st_mode & stat.S_IRWXO == 0


AS_USER = """
import os, sys
from pathlib import Path
import psycopg
from embedded.postgres import EmbeddedPostgres
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
with EmbeddedPostgres(Path(sys.argv[1])) as server, psycopg.connect(server.dsn()) as connection:
    print(connection.execute("SELECT 1").fetchone()[0], os.stat(f"/proc/{server.pid}").st_uid)
"""


@as_root
def test_a_normal_user_runs_it_under_its_own_account(directory):
    directory.chmod(0o755)
    (directory / "home").mkdir()
    os.chown(directory / "home", 65534, 65534)
    answer = subprocess.run(
        [sys.executable, "-c", AS_USER, str(directory / "home" / "pg")],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "HOME": str(directory / "home")},
    )
    assert answer.stdout.split() == ["1", "65534"]
