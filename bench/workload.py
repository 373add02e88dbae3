"""What the devices say: equal devices with typed attributes, each reading with a key of its own.

Of twenty attributes fourteen are doubles, three integers, two booleans and one a short text. A message holds some
samples of all of them, 20 ms apart on the device's clock; a message of ten readings holds one sample of ten.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from device import Attribute, Column, Packed, ValueType
from device.packing import PackingLimits, pack_columns

TENANT = "bench"
ENTITY_TYPE = "machine"

# Readings of the whole fleet that may wait for their ack. Enough to fill every lane's next batch while one is being
# written; more would only wait longer.
READINGS_OUT = 100_000

_SAMPLE_US = 20_000
_MOST_ATTRIBUTES = 20
# The first half has every type too, in about the same proportion.
_TYPES = "ddddiddbds" + "ddiddiddbd"
_KINDS = {"d": ValueType.DOUBLE, "i": ValueType.INT64, "b": ValueType.BOOL, "s": ValueType.STRING}
_STATES = (b"running", b"idle", b"maintenance", b"fault: overheated")
# Messages made beforehand, with values that differ; a device sends them round and round, at new times.
_VARIANTS = 8


def device_name(index: int) -> str:
    """The name of device number `index`."""
    return f"machine-{index:06d}"


@dataclass(frozen=True, slots=True)
class Shape:
    """Messages of this many readings, 10 or a multiple of 20."""

    readings_per_message: int

    def __post_init__(self) -> None:
        if self.readings_per_message % self.attribute_count:
            raise ValueError(f"{self.readings_per_message} readings are not whole samples")

    @property
    def attribute_count(self) -> int:
        """Attributes of a device."""
        return min(_MOST_ATTRIBUTES, self.readings_per_message)

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """A device's attributes; their aliases are 1, 2, …"""
        return all_attributes()[: self.attribute_count]

    @property
    def samples(self) -> int:
        """Samples in a message."""
        return self.readings_per_message // self.attribute_count

    @property
    def devices(self) -> int:
        """So many that each has at least two messages out."""
        return min(200, READINGS_OUT // (2 * self.readings_per_message))

    @property
    def messages_out(self) -> int:
        """Messages that a device may have out when the fleet sends as fast as it can."""
        return max(2, READINGS_OUT // (self.devices * self.readings_per_message))


def all_attributes() -> tuple[Attribute, ...]:
    """The attributes of the widest device."""
    return tuple(Attribute(f"attribute-{number:02d}", _KINDS[kind]) for number, kind in enumerate(_TYPES))


class Messages:
    """One device's messages, without end."""

    def __init__(self, shape: Shape, index: int, start_us: int) -> None:
        rng = np.random.default_rng(index)
        self._samples = shape.samples
        self._at_us = start_us
        self._variants = [_columns(shape, rng) for _ in range(_VARIANTS)]
        self._turn = index

    def next_columns(self) -> dict[str, Any]:
        """The arguments of `send_columns` for the next message."""
        times = range(self._at_us, self._at_us + self._samples * _SAMPLE_US, _SAMPLE_US)
        self._at_us += self._samples * _SAMPLE_US
        self._turn += 1
        return {
            name: Column(aliases, [time for time in times for _ in range(width)], values)
            for name, width, aliases, values in self._variants[self._turn % _VARIANTS]
        }

    def packed(self) -> Iterator[Packed]:
        """The messages as they travel."""
        limits = PackingLimits()
        while True:
            [packed] = pack_columns(limits, **self.next_columns())
            yield packed


def _columns(shape: Shape, rng: np.random.Generator) -> list[tuple[str, int, list[int], list[Any]]]:
    """(wire column, its attributes, alias of each reading, value of each reading)"""
    found = []
    for name, kind in (("doubles", "d"), ("int64s", "i"), ("bools", "b"), ("strings", "s")):
        aliases = [number for number, each in enumerate(_TYPES[: shape.attribute_count], 1) if each == kind]
        count = len(aliases) * shape.samples
        values: list[Any]
        match kind:
            case "d":
                values = rng.normal(20.0, 5.0, count).tolist()
            case "i":
                values = rng.integers(0, 100_000, count).tolist()
            case "b":
                values = (rng.random(count) < 0.1).tolist()
            case _:
                values = [_STATES[choice] for choice in rng.integers(0, len(_STATES), count)]
        found.append((name, len(aliases), aliases * shape.samples, values))
    return found
