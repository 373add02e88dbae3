"""Writes the reference pages that come from code: `python docs/generate.py [DIR]`. A test compares them."""

import sys
from pathlib import Path
from typing import Any

from cli.load import CONFIGS as LOAD
from cli.relay import CONFIGS as RELAY
from cli.rollup import CONFIGS as ROLLUP
from cli.serve import CONFIGS as SERVE
from runtime.config import describe_settings
from runtime.metric_definitions import describe_metrics

HERE = Path(__file__).resolve().parent

PROCESSES: dict[str, tuple[type[Any], ...]] = {
    "atlasco serve": SERVE,
    "atlasco relay": RELAY,
    "atlasco load": LOAD,
    "atlasco rollup": ROLLUP,
}


def pages() -> dict[str, str]:
    """The text of each generated page, by file name."""
    configuration = ["# Configuration\n", f"{_INTRODUCTION}\n"]
    for process, configs in PROCESSES.items():
        configuration.append(f"## {process}\n\n{describe_settings(configs)}")
    metrics = f"# Metrics\n\n{_METRICS}\n\n{describe_metrics()}"
    return {"configuration.md": "\n".join(configuration), "metrics.md": metrics}


_INTRODUCTION = """\
Flags win over environment variables, those over defaults. A variable that is set but empty counts as not set.
Durations take a unit (`250ms`, `30s`, `5m`, `7d`), sizes too (`64KiB`, `4MiB`). A process that finds a setting wrong
says which one, and ends with exit code 2. This page is generated from the code (`make docs`).
"""

_METRICS = """\
Every process serves these on its admin port at `/metrics`, in Prometheus form. No label ever holds a device's or a
tenant's name. This page is generated from the code (`make docs`). How to read those of queries:
[operations.md](operations.md#where-do-my-queries-go).
"""

if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    for name, text in pages().items():
        (target / name).write_text(text)
