"""Connections to Redshift: login, transactions, and the driver's errors in our terms."""

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Any
from urllib.parse import unquote, urlsplit

import redshift_connector
from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]
from redshift_connector.core import Connection
from redshift_connector.cursor import Cursor
from redshift_connector.error import Error, InterfaceError, OperationalError

from storage.errors import (
    QueryCanceled,
    StorageDefect,
    StorageError,
    StorageUnavailable,
    TransactionConflict,
)
from storage.model import ValueType
from storage.warehouse.cancellation import Act, Stop
from storage.warehouse.columns import resolved_relation
from storage.warehouse.port import QueryRefused, WarehouseMissing
from storage.warehouse.statements import statements

SQL = statements("redshift.sql")

_IDLE = 4
_CONNECT_S = 30
_QUICK_S = 30
# Attempts to cancel a statement before its session is ended.
_CANCELS = 10
# A server that has not even been asked to cancel within this time, in seconds, does not answer.
_SILENT_S = 10.0
# Relations of ours that releases before this one did not make.
_NEW_RELATIONS = re.compile(rf"\b({'|'.join(resolved_relation(value_type) for value_type in ValueType)})\b")


@dataclass(frozen=True, slots=True)
class RedshiftLogin:
    """Where, and who.

    With `cluster` (a cluster's identifier, or serverless:<workgroup>) the process's AWS identity gets a temporary
    password by IAM; else `password` counts. TLS is always on and the host name is verified.
    """

    host: str
    port: int
    database: str
    user: str
    password: str = field(repr=False, default="")
    cluster: str = ""
    region: str = ""

    @classmethod
    def parse(cls, dsn: str, *, cluster: str = "", region: str = "") -> "RedshiftLogin":
        """From redshift://user:password@host:port/database.

        Raises:
            ValueError: it does not have this form. The text does not repeat it.
        """
        parts = urlsplit(dsn)
        if parts.scheme != "redshift" or not parts.hostname or not parts.username or len(parts.path) < 2:
            raise ValueError("ATLASCO_REDSHIFT_DSN must be redshift://user:password@host:port/database")
        if not parts.password and not cluster:
            raise ValueError("ATLASCO_REDSHIFT_DSN needs a password, or ATLASCO_REDSHIFT_CLUSTER for IAM")
        return cls(
            parts.hostname,
            parts.port or 5439,
            unquote(parts.path[1:]),
            unquote(parts.username),
            unquote(parts.password or ""),
            cluster,
            region,
        )

    def arguments(self) -> dict[str, Any]:
        """What the driver's `connect` takes."""
        given: dict[str, Any] = {
            "host": self.host,
            "port": self.port,
            "database": self.database,
            "ssl": True,
            "sslmode": "verify-full",
            "timeout": _CONNECT_S,
            # A server that vanished while a statement runs is found by these, within two minutes.
            "tcp_keepalive_idle": 60,
            "tcp_keepalive_interval": 15,
            "tcp_keepalive_count": 4,
            # A named statement per text would pile up on the server: our texts differ in every manifest's name.
            "max_prepared_statements": 0,
            "application_name": "atlasco-warehouse",
        }
        if not self.cluster:
            return given | {"user": self.user, "password": self.password}
        given |= {"iam": True, "db_user": self.user}
        if self.region:
            given["region"] = self.region
        if self.cluster.startswith("serverless:"):
            return given | {"is_serverless": True, "serverless_work_group": self.cluster.partition(":")[2]}
        return given | {"cluster_identifier": self.cluster}


@contextmanager
def translated(*, query: bool = False) -> Iterator[None]:
    """Raise storage errors instead of the driver's from the block; `query`: the statement is a caller's.

    Raises:
        StorageError: what the driver's error stands for.
    """
    try:
        yield
    except Error as error:
        raise translate(error, query=query) from error
    except OSError as error:
        # The driver lets the socket's own errors through.
        raise StorageUnavailable(f"the connection to Redshift failed: {error}") from error
    except (BotoCoreError, ClientError) as error:
        # And those of a login by IAM.
        raise StorageUnavailable(f"AWS gives no login to Redshift: {error}") from error


def translate(error: Error, *, query: bool = False) -> StorageError:
    """The storage error that a driver's error stands for: by type and SQLSTATE."""
    fields = error.args[0] if error.args and isinstance(error.args[0], dict) else {}
    state, text = fields.get("C"), str(fields.get("M", error))
    if state is None:
        # The driver's own: a lost or refused connection, TLS, IAM.
        lost = isinstance(error, InterfaceError | OperationalError)
        return StorageUnavailable(text) if lost else StorageDefect(text)
    # A serializable isolation violation has no SQLSTATE of its own: Redshift says XX000 and begins with its number.
    isolation = state == "XX000" and text.removeprefix("ERROR:").strip().startswith("1023")
    if isolation or state in {"40001", "40P01", "55P03"}:
        return TransactionConflict(text, state)
    if state == "57014":
        return QueryCanceled(text, state)
    if state[:2] in {"08", "53", "57", "58"} or state == "28000":
        return StorageUnavailable(text, state)
    if state == "42P01" and _NEW_RELATIONS.search(text):
        # Also in a caller's statement: it is right, and would be told that it is wrong.
        return WarehouseMissing("the warehouse has the schema of an older release: run `atlasco warehouse init`", state)
    if query:
        return QueryRefused(text, state)
    if state in {"42P01", "3F000"}:
        return WarehouseMissing("the warehouse was not set up: run `atlasco warehouse init`", state)
    return StorageDefect(text, state)


class RedshiftSessions:
    """Connections, each used by one thread at a time (the driver allows no more), kept for the next transaction.

    A transaction that failed costs its connection: what state it is in is nothing to guess about.
    """

    def __init__(self, login: RedshiftLogin) -> None:
        self._login = login
        self._idle: list[Connection] = []
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """End the idle connections."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            _discard(connection)

    @contextmanager
    def transaction(self, *, query: bool = False, quick: bool = False) -> Iterator[Cursor]:
        """A cursor in a fresh transaction, committed at the end of the block. Its first statement takes the snapshot:
        a connection's earlier transaction would show what was then.

        `query`: the statements are a caller's. `quick`: each is answered soon, or the server hangs and counts as lost.
        The others, such as a COPY, may take as long as they take.

        Raises:
            StorageError: the database cannot be reached, or what the block's statements ran into.
        """
        with translated(query=query):
            connection = self._take()
            try:
                _wait_at_most(connection, _QUICK_S if quick else None)
                cursor = connection.cursor()
                cursor.paramstyle = "format"
                yield cursor
                connection.commit()
                cursor.close()
            except BaseException:
                _discard(connection)
                raise
        with self._lock:
            if len(self._idle) < _IDLE and not self._closed:
                self._idle.append(connection)
                return
        _discard(connection)

    def stopper(self, cursor: Cursor) -> Stop:
        """What ends the statement under way on a cursor.

        The driver cannot cancel, so another connection asks the server to. Where that does not help, for Redshift may
        leave a query in a transaction alone, the whole session is ended; and where the server does not answer at all,
        the connection is cut, so that at least nobody waits for it here.
        """
        connection = cursor._c
        assert connection is not None
        _wait_at_most(connection, _QUICK_S)
        cursor.execute(SQL["own_process"])
        ((process,),) = cursor.fetchall()
        _wait_at_most(connection, None)

        first_s: float | None = None

        def stop(attempt: int, act: Act) -> None:
            nonlocal first_s
            first_s = monotonic() if first_s is None else first_s
            ask = SQL["cancel" if attempt < _CANCELS else "terminate"]
            asked = False
            # What is wrong with one attempt the next one settles, or the end of the statement itself: whatever it is,
            # for a login by IAM has errors of its own.
            with suppress(Exception), self.transaction(quick=True) as other:
                act(lambda: other.execute(ask, [process]))
                asked = True
            # A server that hangs takes an attempt's connection and says nothing: few attempts last long then.
            silent = not asked and (attempt >= _CANCELS or monotonic() - first_s >= _SILENT_S)
            if silent or attempt >= 2 * _CANCELS:
                with suppress(OSError):
                    act(lambda: connection._usock.shutdown(socket.SHUT_RDWR))

        return stop

    def _take(self) -> Connection:
        while True:
            with self._lock:
                if self._closed:
                    raise StorageUnavailable("the warehouse is closed")
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return self._connect()
            try:
                # One round trip, to learn that an idle connection was lost before work is entrusted to it.
                _wait_at_most(connection, _QUICK_S)
                cursor = connection.cursor()
                cursor.execute("SELECT 1")
                cursor.fetchall()
                connection.rollback()
            except (Error, OSError):
                _discard(connection)
                continue
            return connection

    def _connect(self) -> Connection:
        connection = redshift_connector.connect(**self._login.arguments())
        try:
            connection.autocommit = False
            cursor = connection.cursor()
            cursor.execute("SET search_path TO atlasco")
            connection.commit()
        except BaseException:
            _discard(connection)
            raise
        return connection


def _wait_at_most(connection: Connection, seconds: float | None) -> None:
    """How long the driver waits for what the server sends next; None: as long as it takes.

    The driver's own timeout is one of the socket too and holds for every answer: a COPY of minutes would fail on our
    side alone, and a query go on in the warehouse with nobody left to end it.
    """
    connection._usock.settimeout(seconds)


def _discard(connection: Connection) -> None:
    with suppress(Error, OSError, AttributeError):
        connection.close()
