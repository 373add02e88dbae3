"""What can go wrong in storage, as one tree.

Driver errors are translated here and nowhere else, by SQLSTATE and type, never by text. `retriable` says whether the
same work, tried again unchanged, can succeed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Final

import psycopg
from psycopg_pool import PoolClosed, PoolTimeout, TooManyRequests

PROBLEM_LENGTH: Final = 500
"""Of what the database says, in characters, so much is kept for people: the beginning tells it."""


class StorageError(Exception):
    """The root: something in storage failed. `sqlstate` is the database's code, or None."""

    retriable: ClassVar[bool] = False

    def __init__(self, text: str, sqlstate: str | None = None) -> None:
        super().__init__(text)
        self.sqlstate = sqlstate


class StorageUnavailable(StorageError):
    """The database cannot be reached, is starting or stopping, or is out of a resource."""

    retriable = True


class StorageBusy(StorageUnavailable):
    """No pooled connection became free in time."""


class TransactionConflict(StorageError):
    """A deadlock, a serialization failure or a lock timeout: the transaction was rolled back, nothing else."""

    retriable = True


class QueryCanceled(StorageError):
    """The statement ran into a timeout or was cancelled."""


class DuplicateKey(StorageError):
    """A unique constraint: some row is already there."""


class DataRefused(StorageError):
    """The database refused a value or a row (SQLSTATE class 22 or 23): the data, not the moment, is at fault."""


class NoPartition(DataRefused):
    """A row lies in a time range, or a customer range, that has no partition."""


class StorageDefect(StorageError):
    """Anything else: a wrong schema, a missing privilege, a bug of ours. An operator has to look."""


def translate(error: psycopg.Error) -> StorageError:
    """The storage error that a driver error stands for."""
    state = error.sqlstate
    text = error.diag.message_primary or str(error)
    kind: type[StorageError] = StorageDefect
    match state:
        case None:
            # The driver's own: a lost connection, a pool that is closed or empty.
            if isinstance(error, PoolTimeout | TooManyRequests):
                kind = StorageBusy
            elif isinstance(error, psycopg.OperationalError | PoolClosed):
                kind = StorageUnavailable
        case "23505":
            kind = DuplicateKey
        case "23514" if error.diag.constraint_name is None and error.diag.column_name is None:
            # check_violation without a constraint is how the server reports a row that no partition takes.
            kind = NoPartition
        case "57014":
            kind = QueryCanceled
        case "40001" | "40P01" | "55P03":
            kind = TransactionConflict
        case _ if state[:2] in {"22", "23"}:
            kind = DataRefused
        case _ if state[:2] in {"08", "53", "57", "58"} or state in {"25006", "25P03", "25P04"}:
            # 25006: the writer became a standby under us; a new connection finds the new writer.
            kind = StorageUnavailable
    return kind(text, state)


@contextmanager
def translated() -> Iterator[None]:
    """Raise storage errors instead of driver errors from the block.

    Raises:
        StorageError: what the driver error stands for, with the driver error as its cause.
    """
    try:
        yield
    except psycopg.Error as error:
        raise translate(error) from error
