"""What one tenant's data breaks goes out of service by itself, and everything else goes on."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Final

from runtime.metrics import Metrics
from storage.database import Connection
from storage.errors import PROBLEM_LENGTH, DataRefused, DuplicateKey, QueryCanceled, StorageDefect, translated
from storage.rollup.rests import Rests
from storage.statements import statements

log = logging.getLogger(__name__)

_ROLLUP = statements("rollup.sql")
_PROJECTION = statements("projections.sql")

_PART_RESTS_S: Final = 600.0
# What a part's own work can be at fault for: what its readings come to, a statement of it that takes too long, a table
# of it that is missing. What is the moment's fault, or the lease's, concerns all, and ends the transaction.
_OF_A_PART: Final = (DataRefused, DuplicateKey, QueryCanceled, StorageDefect)


class Kind(StrEnum):
    """What can be out of service by itself."""

    # Of a tenant, all of them: they share their buckets.
    ROLLUPS = "rollups"
    PROJECTION = "projection"


@dataclass(frozen=True, slots=True)
class Part:
    """The rollups of a tenant, `number` being its id, or the projection of that id."""

    kind: Kind
    number: int


class Isolation:
    """Work that the database refuses costs the tenant whose it is its rollups, or the projection, and nobody else.

    They go out of service: back to the state in which no query uses them and from which they are filled anew, once
    they have rested; their owner is told why. Until then what changes in them is not computed, so a part that is
    passed over goes out of service again, in the transaction that moves the cursors past the changes.
    """

    def __init__(self, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._rests = Rests(clock, _PART_RESTS_S, _PART_RESTS_S)
        # Of each part that ever failed, what it was last.
        self._problems: dict[Part, str] = {}

    def resting(self, kind: Kind) -> list[int]:
        """The numbers of the parts of a kind that rest."""
        return [part.number for part in self._rests.resting if isinstance(part, Part) and part.kind is kind]

    async def attempt(self, connection: Connection, part: Part, work: Callable[[], Awaitable[None]]) -> bool:
        """Do work that concerns only `part`; False: it was undone, because the database did not do it."""
        try:
            async with _undone_alone(connection):
                await work()
        except _OF_A_PART as error:
            self._rests.failed(part)
            self._problems[part] = str(error)[:PROBLEM_LENGTH]
            await self._suspend(connection, part)
            self._metrics.count("atlasco_rollup_failures", source="data")
            log.error(
                "out of service: the database refused its work; it is filled anew after a rest",
                extra={part.kind: part.number, "rest_s": _PART_RESTS_S, "error": f"{type(error).__name__}: {error}"},
            )
            return False
        return True

    async def attempt_all(
        self, connection: Connection, works: Mapping[Part, Sequence[Callable[[], Awaitable[None]]]]
    ) -> None:
        """Do the work of many parts; as `attempt` for each whose work fails. Those that rest are passed over."""
        due: list[tuple[Part, Callable[[], Awaitable[None]]]] = []
        for part, of_part in works.items():
            if not self._rests.is_due(part):
                await self._suspend(connection, part)
            else:
                due.append((part, partial(_in_turn, of_part)))
        if not due:
            return
        try:
            # Together at first: a subtransaction for each would overflow what the server keeps of them in memory, and
            # slow down every snapshot, those of the replicas too.
            async with _undone_alone(connection):
                await _in_turn([work for _, work in due])
        except _OF_A_PART:
            for part, work in due:
                await self.attempt(connection, part, work)

    async def _suspend(self, connection: Connection, part: Part) -> None:
        """Take a part that failed out of service, as far as it is not."""
        problem = self._problems[part]
        if part.kind is Kind.ROLLUPS:
            await connection.execute(_ROLLUP["suspend_rollups"], {"tenant": part.number, "problem": problem})
        else:
            parameters = {"projection": part.number, "problem": problem}
            await connection.execute(_PROJECTION["suspend_projection"], parameters)


async def _in_turn(works: Sequence[Callable[[], Awaitable[None]]]) -> None:
    for work in works:
        await work()


@asynccontextmanager
async def _undone_alone(connection: Connection) -> AsyncIterator[None]:
    """A part of a transaction that an error undoes by itself. Raises StorageError."""
    with translated():
        async with connection.transaction():
            yield
