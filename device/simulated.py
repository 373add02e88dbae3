"""One simulated device: its model, and what goes wrong with it. Turns times into messages; sends nothing."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device.dictionary import Dictionary, ValueType
from device.kinds import KINDS, Samples
from device.packing import Column, Packed, PackingLimits, pack_columns

_YEAR_US = 365 * 86_400_000_000
UNKNOWN_ALIAS = 16_000


@dataclass(frozen=True, slots=True)
class FaultRates:
    """How often things go wrong, as probabilities; all 0 is a perfect world.

    Per device: `skewed_clock`. Per message: the others. `rejected` adds a reading that the server must refuse.
    `corrected` repeats the last time of the message before with other values.
    """

    skewed_clock: float = 0.05
    stuck: float = 0.01
    dropout: float = 0.02
    spike: float = 0.02
    rejected: float = 0.02
    corrected: float = 0.0


class SimulatedDevice:
    """Device number `index` of the fleet with this seed; equal arguments say equal things."""

    def __init__(self, index: int, *, seed: int, faults: FaultRates) -> None:
        self._rng = np.random.default_rng([seed, index])
        self._faults = faults
        self.kind = KINDS[index % len(KINDS)]
        self.device_id = f"{self.kind.name}-{index:06d}"
        self.labels = {
            "site": f"site-{index % 12:02d}",
            "generation": str(self._rng.choice(["a", "b"])),
        }
        self._model = self.kind.make(self._rng)
        self.dictionary = Dictionary(self.kind.attributes)
        # Half a minute at most: inside any clock window, and wrong enough to be seen.
        skewed = self._rng.random() < faults.skewed_clock
        self._skew_us = int(self._rng.integers(-30_000_000, 30_000_000)) if skewed else 0
        self._stuck: dict[str, Any] = {}
        self._last_time_us: int | None = None

    def messages(self, times_us: NDArray[np.int64], limits: PackingLimits) -> list[Packed]:
        """The messages with everything measured at these increasing times."""
        samples = self._model.sample(times_us)
        stamps = (times_us + self._skew_us).tolist()
        if self._happens(self._faults.spike):
            self._spike(samples)
        self._stick(samples)
        dropped = self._pick() if self._happens(self._faults.dropout) else ""
        columns: dict[ValueType, tuple[list[int], list[int], list[Any]]] = {kind: ([], [], []) for kind in ValueType}
        for alias, attribute in self.dictionary:
            if attribute.name != dropped:
                aliases, times, values = columns[attribute.type]
                aliases.extend([alias] * len(stamps))
                times.extend(stamps)
                values.extend(samples[attribute.name])
        if self._happens(self._faults.rejected):
            self._add_bad_reading(columns, stamps[-1])
        packed = self._pack(columns, limits)
        if self._last_time_us is not None and self._happens(self._faults.corrected):
            packed = self._correction(samples, self._last_time_us, limits) + packed
        self._last_time_us = stamps[-1]
        return packed

    def _happens(self, probability: float) -> bool:
        return probability > 0 and self._rng.random() < probability

    def _pick(self, kind: ValueType | None = None) -> str:
        names = [one.name for one in self.kind.attributes if kind is None or one.type is kind]
        return names[int(self._rng.integers(len(names)))]

    def _spike(self, samples: Samples) -> None:
        name = self._pick(ValueType.DOUBLE)
        position = int(self._rng.integers(len(samples[name])))
        samples[name][position] = float(self._rng.choice([1e6, -1e6, np.nan, np.inf]))

    def _stick(self, samples: Samples) -> None:
        for name, value in self._stuck.items():
            samples[name] = [value] * len(samples[name])
        if self._stuck:
            if self._happens(0.2):
                self._stuck.clear()
        elif self._happens(self._faults.stuck):
            name = self._pick(ValueType.DOUBLE)
            self._stuck[name] = samples[name][-1]

    def _add_bad_reading(self, columns: dict[ValueType, tuple[list[int], list[int], list[Any]]], stamp: int) -> None:
        """One of the mistakes that real firmware makes."""
        number = self.dictionary.alias(self._pick(ValueType.DOUBLE))
        text = self.dictionary.alias(self._pick(ValueType.STRING))
        mistakes: tuple[tuple[ValueType, int, int, Any], ...] = (
            # The clock was never set.
            (ValueType.DOUBLE, number, 0, 1.0),
            # The clock is years ahead.
            (ValueType.DOUBLE, number, stamp + 5 * _YEAR_US, 1.0),
            # The alias was never defined.
            (ValueType.INT64, UNKNOWN_ALIAS, stamp, 1),
            # A flag sent for a number.
            (ValueType.BOOL, number, stamp + 1, True),
            # Uninitialised memory sent as text.
            (ValueType.STRING, text, stamp + 1, b"\xff\x00\xfe"),
        )
        kind, alias, time_us, value = mistakes[int(self._rng.integers(len(mistakes)))]
        for part, extra in zip(columns[kind], (alias, time_us, value), strict=True):
            part.append(extra)

    def _correction(self, samples: Samples, time_us: int, limits: PackingLimits) -> list[Packed]:
        name = self._pick(ValueType.DOUBLE)
        column = Column([self.dictionary.alias(name)], time_us, [samples[name][0] + 0.5])
        return pack_columns(limits, doubles=column)

    def _pack(
        self, columns: dict[ValueType, tuple[list[int], list[int], list[Any]]], limits: PackingLimits
    ) -> list[Packed]:
        return pack_columns(
            limits,
            doubles=Column(*columns[ValueType.DOUBLE]),
            int64s=Column(*columns[ValueType.INT64]),
            bools=Column(*columns[ValueType.BOOL]),
            strings=Column(*columns[ValueType.STRING]),
        )
