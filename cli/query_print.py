"""Rows on standard output, as a table or as JSON lines."""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

Row = dict[str, Any]


def print_rows(rows: Iterator[Row], limit: int, *, as_json: bool) -> None:
    """Print rows, at most `limit` of them; 0: all. Raises what the rows raise."""
    shown: Iterable[Row] = islice(rows, limit) if limit else rows
    if as_json:
        for row in shown:
            sys.stdout.write(json.dumps({key: _json_value(v) for key, v in row.items()}, ensure_ascii=False) + "\n")
        sys.stdout.flush()
    else:
        _print_table(shown)
        if limit and next(rows, None) is not None:
            print(f"the first {limit} rows; --limit N shows more, --limit 0 all of them", file=sys.stderr)


def _print_table(rows: Iterable[Row]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    count = 0
    try:
        for count, row in enumerate(rows, 1):
            if count == 1:
                for name in row:
                    table.add_column(name, no_wrap=name != "labels", justify="right" if name == "age_s" else "left")
            # Text, because values are data: markup in them must not style the terminal.
            table.add_row(*(Text(cell_text(value)) for value in row.values()))
    finally:
        # Also when an error ends the rows: what came before it is an answer.
        if count:
            # No terminal, no width to fit into: cut values would be of no use to a script.
            Console(width=None if sys.stdout.isatty() else 10_000, highlight=False).print(table)
    if not count:
        print("nothing found", file=sys.stderr)


def cell_text(value: Any) -> str:
    """A value in a table."""
    match value:
        case bool():
            return "true" if value else "false"
        case float():
            return repr(value)
        case Mapping():
            return " ".join(f"{key}={v}" for key, v in value.items())
        case _:
            # Control characters would move the cursor.
            return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        # JSON has no such numbers; protobuf's JSON writes them so.
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
