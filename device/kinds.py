"""Kinds of simulated devices: what they measure, and a small physical model of each.

A model is asked for the values at given times and keeps its state in between. Its numbers depend on nothing but its
generator and those times, so a fleet with the same seed and start says the same.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from device.dictionary import Attribute, ValueType

Floats = NDArray[np.float64]
Samples = dict[str, list[Any]]

_DAY_US = 86_400_000_000
DOUBLE, INT64, BOOL, STRING = ValueType.DOUBLE, ValueType.INT64, ValueType.BOOL, ValueType.STRING


class Model(Protocol):
    """The state of one device."""

    def sample(self, times_us: NDArray[np.int64]) -> Samples:
        """The values of every attribute at these increasing times, by attribute name."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of device."""

    name: str
    attributes: tuple[Attribute, ...]
    make: Callable[[np.random.Generator], Model]


class _Walk:
    """A random walk that is drawn back to zero: neighbouring values are alike, distant ones are not."""

    def __init__(self, rng: np.random.Generator, *, spread: float, memory_s: float) -> None:
        self._rng = rng
        self._spread = spread
        self._memory_s = memory_s
        self._value = float(rng.normal(0, spread))
        self._time_us: int | None = None

    def sample(self, times_us: NDArray[np.int64]) -> Floats:
        noise = self._rng.normal(0, self._spread, len(times_us)).tolist()
        values = []
        value, last = self._value, self._time_us
        for time_us, kick in zip(times_us.tolist(), noise, strict=True):
            elapsed_s = (time_us - last) / 1e6 if last is not None else self._memory_s
            keep = math.exp(-elapsed_s / self._memory_s)
            value = value * keep + kick * math.sqrt(1 - keep * keep)
            values.append(value)
            last = time_us
        self._value, self._time_us = value, last
        return np.asarray(values)


def _daily(times_us: NDArray[np.int64], peak_hour: float) -> Floats:
    """1 at the peak hour (UTC), -1 twelve hours later."""
    day = (times_us % _DAY_US) / _DAY_US
    result: Floats = np.cos(2 * math.pi * (day - peak_hour / 24))
    return result


def _rounded(values: Floats, digits: int) -> list[float]:
    # Sensors have few digits; and adding 0.0 turns -0.0 into 0.0.
    return [value + 0.0 for value in np.round(values, digits).tolist()]


class _Counter:
    """A meter that only goes up: the integral of a rate per second, as an integer."""

    def __init__(self, start: float) -> None:
        self._total = start
        self._time_us: int | None = None

    def sample(self, times_us: NDArray[np.int64], rate_per_s: Floats) -> list[int]:
        first = self._time_us if self._time_us is not None else int(times_us[0])
        steps = np.diff(times_us, prepend=first) / 1e6
        totals = self._total + np.cumsum(steps * np.maximum(rate_per_s, 0))
        self._total, self._time_us = float(totals[-1]), int(times_us[-1])
        return [int(total) for total in totals.tolist()]


def _firmware(rng: np.random.Generator) -> str:
    return str(rng.choice(["2.3.1", "2.4.0", "2.4.0", "2.5.0-rc1"]))


class _Freezer:
    """A cold-chain freezer: the compressor fights the room's warmth and an open door."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._firmware = _firmware(rng)
        self._room = _Walk(rng, spread=1.5, memory_s=1800)
        self._door = _Walk(rng, spread=1.0, memory_s=60)
        self._noise = _Walk(rng, spread=0.15, memory_s=20)
        self._energy = _Counter(float(rng.uniform(0, 5e6)))

    def sample(self, times_us: NDArray[np.int64]) -> Samples:
        door = self._door.sample(times_us) > 1.6
        room = 21 + 3 * _daily(times_us, 15) + self._room.sample(times_us)
        temperature = -18.5 + 0.12 * (room - 21) + 4.0 * door + self._noise.sample(times_us)
        load = np.clip(0.35 + 0.03 * (room - 21) + 0.5 * door, 0.0, 1.0)
        rpm = np.where(load > 0.3, 1500 + 2500 * load, 0)
        return {
            "temperature": _rounded(temperature, 2),
            "room_temperature": _rounded(room, 1),
            "compressor_rpm": rpm.astype(np.int64).tolist(),
            "energy_wh": self._energy.sample(times_us, load * 180 / 3600),
            "door_open": door.tolist(),
            "status": np.where(temperature > -15, "warm", "ok").tolist(),
            "firmware": [self._firmware] * len(times_us),
        }


class _Turbine:
    """A wind turbine: power goes with the cube of the wind, up to its rating, and stops in a storm."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._firmware = _firmware(rng)
        self._mean = float(rng.uniform(6, 11))
        self._wind = _Walk(rng, spread=3.0, memory_s=900)
        self._gust = _Walk(rng, spread=0.8, memory_s=5)
        self._direction = _Walk(rng, spread=40, memory_s=7200)
        self._energy = _Counter(float(rng.uniform(0, 2e7)))

    def sample(self, times_us: NDArray[np.int64]) -> Samples:
        wind = self._mean + self._wind.sample(times_us) + self._gust.sample(times_us)
        wind = np.maximum(wind + 1.2 * _daily(times_us, 14), 0)
        storm = wind > 25
        running = (wind > 3) & ~storm
        power = np.where(running, np.minimum(3200.0, 2.1 * wind**3), 0.0)
        return {
            "wind_speed": _rounded(wind, 2),
            "wind_direction": _rounded(self._direction.sample(times_us) % 360, 1),
            "power_kw": _rounded(power, 1),
            "rotor_rpm": _rounded(np.where(running, np.minimum(17.5, 1.6 * wind), 0.0), 2),
            "gearbox_temperature": _rounded(38 + power / 90, 1),
            "energy_kwh": self._energy.sample(times_us, power / 3600),
            "brake_on": (~running).tolist(),
            "state": np.where(storm, "storm", np.where(running, "running", "idle")).tolist(),
            "firmware": [self._firmware] * len(times_us),
        }


class _Meter:
    """An electricity meter of a household: low at night, high in the evening."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._firmware = _firmware(rng)
        self._base = float(rng.uniform(200, 600))
        self._use = _Walk(rng, spread=0.4, memory_s=600)
        self._grid = _Walk(rng, spread=1.2, memory_s=120)
        self._energy = _Counter(float(rng.uniform(0, 3e7)))

    def sample(self, times_us: NDArray[np.int64]) -> Samples:
        power = self._base * np.exp(0.8 * _daily(times_us, 19) + self._use.sample(times_us))
        voltage = 230 + self._grid.sample(times_us) - power / 2000
        hour = (times_us % _DAY_US) // 3_600_000_000
        return {
            "voltage": _rounded(voltage, 1),
            "current": _rounded(power / voltage, 3),
            "power_w": _rounded(power, 1),
            "energy_wh": self._energy.sample(times_us, power / 3600),
            "relay_closed": [True] * len(times_us),
            "tariff": np.where((hour >= 6) & (hour < 22), "day", "night").tolist(),
            "firmware": [self._firmware] * len(times_us),
        }


class _Van:
    """A delivery van: drives and stops, and its position follows its speed."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._firmware = _firmware(rng)
        self._latitude = float(rng.uniform(47.5, 53.5))
        self._longitude = float(rng.uniform(7.0, 13.5))
        self._pace = _Walk(rng, spread=1.0, memory_s=120)
        self._heading = _Walk(rng, spread=2.0, memory_s=300)
        self._odometer = _Counter(float(rng.uniform(1e6, 2e8)))
        self._time_us: int | None = None

    def sample(self, times_us: NDArray[np.int64]) -> Samples:
        speed = np.maximum(0, 25 + 40 * self._pace.sample(times_us))
        heading = self._heading.sample(times_us)
        first = self._time_us if self._time_us is not None else int(times_us[0])
        metres = speed / 3.6 * np.diff(times_us, prepend=first) / 1e6
        latitude = self._latitude + np.cumsum(metres * np.cos(heading)) / 111_320
        scale = 111_320 * math.cos(math.radians(self._latitude))
        longitude = self._longitude + np.cumsum(metres * np.sin(heading)) / scale
        self._latitude, self._longitude = float(latitude[-1]), float(longitude[-1])
        self._time_us = int(times_us[-1])
        moving = speed > 1
        return {
            "latitude": _rounded(latitude, 6),
            "longitude": _rounded(longitude, 6),
            "speed_kmh": _rounded(speed, 1),
            "engine_temperature": _rounded(70 + speed / 6, 1),
            "odometer_m": self._odometer.sample(times_us, speed / 3.6),
            "ignition_on": moving.tolist(),
            "activity": np.where(moving, "driving", "delivering").tolist(),
            "firmware": [self._firmware] * len(times_us),
        }


def _attributes(*parts: tuple[str, ValueType] | tuple[str, ValueType, str]) -> tuple[Attribute, ...]:
    return tuple(Attribute(*part) for part in parts)


KINDS: Sequence[Kind] = (
    Kind(
        "cold-chain-freezer",
        _attributes(
            ("temperature", DOUBLE, "Cel"),
            ("room_temperature", DOUBLE, "Cel"),
            ("compressor_rpm", INT64, "/min"),
            ("energy_wh", INT64, "W.h"),
            ("door_open", BOOL),
            ("status", STRING),
            ("firmware", STRING),
        ),
        _Freezer,
    ),
    Kind(
        "wind-turbine",
        _attributes(
            ("wind_speed", DOUBLE, "m/s"),
            ("wind_direction", DOUBLE, "deg"),
            ("power_kw", DOUBLE, "kW"),
            ("rotor_rpm", DOUBLE, "/min"),
            ("gearbox_temperature", DOUBLE, "Cel"),
            ("energy_kwh", INT64, "kW.h"),
            ("brake_on", BOOL),
            ("state", STRING),
            ("firmware", STRING),
        ),
        _Turbine,
    ),
    Kind(
        "electricity-meter",
        _attributes(
            ("voltage", DOUBLE, "V"),
            ("current", DOUBLE, "A"),
            ("power_w", DOUBLE, "W"),
            ("energy_wh", INT64, "W.h"),
            ("relay_closed", BOOL),
            ("tariff", STRING),
            ("firmware", STRING),
        ),
        _Meter,
    ),
    Kind(
        "delivery-van",
        _attributes(
            ("latitude", DOUBLE, "deg"),
            ("longitude", DOUBLE, "deg"),
            ("speed_kmh", DOUBLE, "km/h"),
            ("engine_temperature", DOUBLE, "Cel"),
            ("odometer_m", INT64, "m"),
            ("ignition_on", BOOL),
            ("activity", STRING),
            ("firmware", STRING),
        ),
        _Van,
    ),
)
