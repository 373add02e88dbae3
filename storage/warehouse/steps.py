"""The steps of a load, by name, for whoever has to stop at one of them.

Production does nothing at a step. Tests kill the process there, for the promise is that it may die anywhere.
"""

from collections.abc import Callable
from typing import Final, Literal, TypeAlias

Step: TypeAlias = Literal[
    "decoded", "parquet-written", "staged", "manifest-written", "copied", "committed", "offsets-committed"
]

STEPS: Final[tuple[Step, ...]] = (
    "decoded",  # a unit is complete in memory
    "parquet-written",  # its files are written (local) or encoded (Redshift)
    "staged",  # its files are in the staging bucket (Redshift)
    "manifest-written",  # and the manifest (Redshift)
    "copied",  # everything is in the open transaction
    "committed",  # and committed
    "offsets-committed",  # and Kafka knows
)

AtStep: TypeAlias = Callable[[Step], None]


def no_step(_: Step) -> None:
    """Go on."""
