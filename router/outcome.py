"""What comes of a question: an answer with how it came about, or the reason why there is none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from router.plan import Plan, SourceKind
from router.tiers import Proof
from storage.errors import StorageError

A = TypeVar("A")


class NoSource(StorageError):
    """No source is fresh enough; `reasons` says why by source."""

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
        self.reasons = reasons


class FallbackBusy(StorageError):
    """As many questions of other sources run on the primary as may; try again in a moment."""

    retriable = True

    def __init__(self, limit: int) -> None:
        super().__init__(f"the primary runs {limit} questions of other sources already, which is the limit")
        self.limit = limit


class RangeRetired(StorageError):
    """No source holds any of the range any more."""

    def __init__(self, complete_from_us: int) -> None:
        super().__init__(f"the range ends before {complete_from_us} microseconds, from where readings are kept")
        self.complete_from_us = complete_from_us


@dataclass(frozen=True, slots=True)
class Attempt:
    """A source that was asked. Microseconds."""

    kind: SourceKind
    name: str
    start_us: int | None
    end_us: int | None
    # Proven by the data's own snapshot; None when the attempt failed.
    as_of_us: int | None
    failure: str
    duration_us: int
    # What `failure` is an error of, for those who count; None when the attempt did not fail.
    cause: type[StorageError] | None = None


@dataclass(frozen=True, slots=True)
class Routed(Generic[A]):
    """An answer, what it is, and how it came about."""

    answer: A
    proof: Proof
    plan: Plan
    attempts: Sequence[Attempt]

    @property
    def staleness_us(self) -> int:
        """How old the answer may be: the question's arrival minus as_of, with the uncertainty between the clocks.

        0 for the primary: its snapshot was taken after the arrival.
        """
        arrival = self.plan.inquiry.arrival
        if arrival is None or self.proof.kind is SourceKind.PRIMARY:
            return 0
        return max(0, arrival.latest_us - self.proof.as_of_us)
