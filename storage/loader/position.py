"""Where to go on in a partition: decided from the warehouse's load state and what the log still has. Pure."""

from dataclasses import dataclass

from storage.warehouse.port import LoadState


@dataclass(frozen=True, slots=True)
class Begin:
    """A partition seen for the first time, with its first record still there: from offset 0."""


@dataclass(frozen=True, slots=True)
class Continue:
    """From the load state's next offset."""

    state: LoadState


@dataclass(frozen=True, slots=True)
class Halted:
    """Going on would skip records. `fresh`: found just now, not recorded in the warehouse yet."""

    reason: str
    fresh: bool


def decide(state: LoadState | None, topic_id: str, low: int, high: int) -> Begin | Continue | Halted:
    """What to do with a partition whose log holds the offsets [low, high)."""
    if state is None:
        if low == 0:
            return Begin()
        return Halted(f"the first {low} records were removed from the log before they were ever loaded", fresh=True)
    if state.halted:
        return Halted(state.halted, fresh=False)
    if state.topic_id != topic_id:
        return Halted(f"the topic was made anew: it was {state.topic_id} and is {topic_id} now", fresh=True)
    if state.next_offset < low:
        return Halted(
            f"records {state.next_offset} to {low - 1} were removed from the log before they were loaded", fresh=True
        )
    if state.next_offset > high:
        return Halted(
            f"the log ends at {high}, but records up to {state.next_offset - 1} were loaded: the brokers lost some",
            fresh=True,
        )
    return Continue(state)
