"""A small file of the turbofan form: engines that run until they fail, one row per cycle, blanks between columns.

26 columns without a header: unit, cycle, three settings, 21 sensors. As in the form's model, sensors 17 and 18 are
written as integers, everything else with a fraction, and a row ends in two blanks.
"""

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

COLUMNS = (
    "unit",
    "cycle",
    *(f"setting{number}" for number in range(1, 4)),
    *(f"s{number}" for number in range(1, 22)),
)
INTEGER_SENSORS = ("s17", "s18")
START = f"{datetime.now(UTC) - timedelta(days=50):%Y-%m-%d}T00:00:00Z"
"""When the first cycle was, for a replay: it must lie in the time in which a tenant's readings may."""

# Where a sensor starts, how far it drifts over an engine's life, and how many digits it is written with.
_SENSORS: dict[str, tuple[float, float, int]] = {
    "s1": (518.67, 0.0, 2),
    "s2": (642.2, 1.2, 2),
    "s3": (1588.0, 12.0, 2),
    "s4": (1402.0, 20.0, 2),
    "s5": (14.62, 0.0, 2),
    "s6": (21.61, 0.0, 2),
    "s7": (554.2, -2.0, 2),
    "s8": (2388.05, 0.15, 2),
    "s9": (9050.0, 20.0, 2),
    "s10": (1.30, 0.0, 2),
    "s11": (47.3, 0.8, 2),
    "s12": (522.0, -1.8, 2),
    "s13": (2388.04, 0.15, 2),
    "s14": (8135.0, 15.0, 2),
    "s15": (8.42, 0.09, 4),
    "s16": (0.03, 0.0, 2),
    "s17": (392.0, 5.0, 0),
    "s18": (2388.0, 0.0, 0),
    "s19": (100.0, 0.0, 2),
    "s20": (38.9, -0.5, 2),
    "s21": (23.35, -0.3, 4),
}


def rows(*, engines: int = 3, cycles: int = 40, seed: int = 1) -> list[list[str]]:
    """The cells of every row. Engines live a little longer or shorter than `cycles`."""
    rng = random.Random(seed)
    table = []
    for unit in range(1, engines + 1):
        life = max(1, cycles + rng.randint(-cycles // 4, cycles // 4))
        for cycle in range(1, life + 1):
            wear = (cycle / life) ** 3
            cells = [str(unit), str(cycle), f"{rng.gauss(0, 0.002):.4f}", f"{rng.gauss(0, 0.0003):.4f}", "100.0"]
            for start, drift, digits in _SENSORS.values():
                noise = rng.gauss(0, abs(drift) / 10)
                cells.append(f"{start + drift * wear + noise:.{digits}f}")
            table.append(cells)
    return table


def write(path: Path, table: list[list[str]]) -> Path:
    """Write rows as the form has them; returns the path."""
    path.write_text("".join(" ".join(cells) + "  \n" for cells in table))
    return path


def typed(table: list[list[str]], start_us: int, period_us: int) -> dict[str, dict[tuple[str, int], float | int]]:
    """What a replay of these rows must store: device -> (attribute, time) -> value."""
    stored: dict[str, dict[tuple[str, int], float | int]] = {}
    for cells in table:
        named = dict(zip(COLUMNS, cells, strict=True))
        time_us = start_us + int(named["cycle"]) * period_us
        device = stored.setdefault(named["unit"], {})
        for name in COLUMNS[2:]:
            text = named[name]
            device[name, time_us] = int(text) if name in INTEGER_SENSORS else float(text)
    return stored
