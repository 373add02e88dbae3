"""The sources behind one protocol, and what a question has to offer them.

A source answers a `Question` and returns, with the answer, what it can prove about it. Every kind of answer is made by
the question itself, because only it knows its statements; the source brings the connection, the deadline and the
proof.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import Generic, Protocol, Self, TypeVar

from router.plan import Need, Shape, SourceKind, Standing
from storage.errors import StorageError
from storage.reads.session import ReadSession
from storage.warehouse.port import Completeness
from storage.warehouse.reader import WarehouseReader

A = TypeVar("A")


class DegradedReason(Enum):
    """In which way an answer is worse than asked; see Degradation in query.proto."""

    STALE = "stale"
    READ_TOKEN_UNPROVEN = "read token unproven"  # noqa: S105 - no password
    INCOMPLETE = "incomplete"
    RANGE_CUT = "range cut"
    NO_WAREHOUSE = "no warehouse"


@dataclass(frozen=True, slots=True)
class Degradation:
    """One way, with a text for people."""

    reason: DegradedReason
    text: str


@dataclass(frozen=True, slots=True)
class Proof:
    """What an answer is, proven by the snapshot that it was read from. Microseconds since 1970."""

    kind: SourceKind
    name: str
    as_of_us: int
    # Nothing before this reading time is kept; None: no such time is known.
    complete_from_us: int | None = None
    degraded: tuple[Degradation, ...] = ()


@dataclass(frozen=True, slots=True)
class Requirement:
    """What an answer has to prove to be used."""

    need: Need
    # Complete up to here; None: any read that begins now will do, for the source is the primary.
    as_of_us: int | None
    # Take it all the same, and say so.
    stale: bool = False
    # Refuse a range that begins before what the source keeps: another source may hold it.
    whole_range: bool = False
    # Of materializations, in whatever source: their watermark must not be before this; None: use none.
    materialized_as_of_us: int | None = None
    # Nothing but rollups will do.
    materialized_only: bool = False


class Unproven(StorageError):
    """The source's snapshot does not prove what is required; nothing was read but the proof."""

    def __init__(self, text: str, as_of_us: int | None = None) -> None:
        super().__init__(text)
        self.as_of_us = as_of_us


class TokenUnknown(StorageError):
    """The primary has never heard of the token's transaction: it is another database's, or was lost in a failover."""


class NotLoaded(Unproven):
    """The warehouse has never heard of a device or attribute of the question: it does not exist, or is too new."""


class RangeNotHeld(Unproven):
    """The source does not hold the beginning of the range any more."""

    def __init__(self, text: str, complete_from_us: int) -> None:
        super().__init__(text)
        self.complete_from_us = complete_from_us


class Question(ABC, Generic[A]):
    """Something asked, and how each kind of source answers it.

    The answers of different sources mean the same. Errors that are about the question (an unknown device, …) are
    raised as they are and end the request; StorageUnavailable and Unproven make the router try the next source.
    """

    shape: Shape
    # The range of reading time [start, end), microseconds; None for questions without one.
    start_us: int | None = None
    end_us: int | None = None
    able: frozenset[SourceKind] = frozenset({SourceKind.PRIMARY, SourceKind.REPLICA})

    @abstractmethod
    async def from_database(self, session: ReadSession, needed_as_of_us: int | None) -> A:
        """The answer from a snapshot of the primary or of a replica.

        Materializations (rollups, projections) lie in the same database, with a watermark of their own in the same
        snapshot. They may be used when that is at or after `needed_as_of_us`; None: not at all.
        """

    async def from_materialization(self, session: ReadSession, needed_as_of_us: int | None) -> A:
        """As `from_database`, from rollups alone. Only where `able` has ROLLUP.

        Raises:
            Unproven: they do not answer the question, or are not complete up to `needed_as_of_us`.
        """
        raise NotImplementedError(type(self).__name__)

    def proven(self, answer: A, proof: Proof) -> Proof:
        """What an answer of `from_database` claims: the snapshot's proof, or that of a materialization."""
        return proof

    @property
    def asks_database_first(self) -> bool:
        """Whether the warehouse needs to be told something that only a database knows; see `resolved`."""
        return False

    async def resolved(self, session: ReadSession) -> Self:
        """The question with what the warehouse may not know, looked up in a database: it then never says NotLoaded.

        Raises:
            Unproven: it is more than the warehouse can be told.
            StorageError: what is wrong with the question.
        """
        return self

    def from_warehouse(self, reader: WarehouseReader, tenant: str) -> tuple[A, Completeness]:
        """The answer from the warehouse, with the completeness that holds for it. Blocks; runs in a thread."""
        raise NotImplementedError(type(self).__name__)

    def part(self, start_us: int, end_us: int) -> Self:
        """The same question for a part of its range. Only where `able` has SPLIT."""
        raise NotImplementedError(type(self).__name__)

    def seam(self, latest_us: int) -> int:
        """Where to cut the range so that two parts' answers can be joined: at `latest_us` or, if need be, before."""
        return latest_us

    def join(self, older: A, newer: A, cut_us: int) -> A:
        """One answer of two parts, the older from the warehouse, the newer, from `cut_us` on, from a database."""
        raise NotImplementedError(type(self).__name__)


class Source(Protocol):
    """Something that answers questions. Safe to share between tasks."""

    @property
    def standing(self) -> Standing:
        """What is known of the source now; never blocks."""
        ...

    async def answer(
        self, tenant: str, question: Question[A], requirement: Requirement, timeout_s: float
    ) -> tuple[A, Proof]:
        """Answer within `timeout_s` seconds, and prove it.

        Returning promises that the proof meets the requirement. When the caller is cancelled, so is the work in the
        database, before its connection is used again.

        Raises:
            Unproven: the snapshot does not prove the requirement.
            StorageUnavailable: the source cannot answer at present.
            QueryCanceled: the time is over.
            StorageError: what else the question or the source raise.
        """
        ...
