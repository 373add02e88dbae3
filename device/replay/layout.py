"""What the columns of a file mean, and the first pass over it, which finds their types."""

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from device.dictionary import ValueType
from device.replay.cells import Cell, ColumnSurvey, NullMarkers, as_number, converter
from device.replay.errors import ReplayError, RowError
from device.replay.table import Record, named_separator, read_at, records, sample_of, sniff_separator, split
from device.replay.times import TimeOf, parse_period, parse_time, time_from_columns, time_from_cycle

_MOST_NAME_BYTES = 128
# Half of what 64 bits hold, so that the difference of two times can be said as well.
_FARTHEST_US = 2**62


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """What the user says about a file; see `atlasco replay --help` for the meaning of each."""

    path: Path
    device_column: str | None = None
    device: str | None = None
    time_columns: Sequence[str] = ()
    time_format: str | None = None
    cycle_column: str | None = None
    period: str | None = None
    start: str | None = None
    columns: Sequence[str] = ()
    nulls: Sequence[str] = ()
    separator: str | None = None
    decimal: str = "."
    types: Mapping[str, ValueType] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ValueColumn:
    """A column that is sent: its position from 0, its name, which is the attribute's, and its type."""

    position: int
    name: str
    type: ValueType
    convert: Callable[[str], Cell]


@dataclass(slots=True)
class Row:
    """A row that can be sent: who, when, what. `problems` are its cells that cannot be."""

    line: int
    device: str
    time_us: int
    values: list[tuple[ValueColumn, Cell]]
    nulls: int = 0
    problems: list[RowError] = field(default_factory=list)


class Layout:
    """How a row of this file is read. Made from the options and the first rows; raises ReplayError."""

    def __init__(self, options: ReplayOptions) -> None:
        sample = sample_of(options.path)
        self.path = options.path
        self.separator = sniff_separator(sample) if options.separator is None else named_separator(options.separator)
        if options.decimal == self.separator:
            raise ReplayError("the decimal mark and the separator cannot be the same; give --separator")
        self.decimal = options.decimal
        self.has_header = not options.columns
        self.names = self._column_names(options, sample[0])
        self.nulls = NullMarkers(options.nulls, decimal=options.decimal)
        self.device = options.device
        self.device_position = self._device_position(options)
        self.time_positions: list[int] = []
        self.time_of = self._time_source(options)
        self.types = {self._position(name, "--type"): kind for name, kind in options.types.items()}
        used = {*self.time_positions, self.device_position}
        self.value_positions = [position for position, name in enumerate(self.names) if name and position not in used]
        if not self.value_positions:
            raise ReplayError("no column is left to send; if the columns were not told apart, give --separator")

    def _column_names(self, options: ReplayOptions, first: str) -> list[str]:
        try:
            fields = split(first, self.separator)
        except RowError as error:
            raise ReplayError(f"line 1: {error.text}") from None
        names = [name.strip() for name in (options.columns or fields)]
        if not options.columns and all(as_number(name, options.decimal) is not None for name in names):
            raise ReplayError("the first line holds numbers, not names: the file has no header; give --columns")
        if options.columns and len(fields) < len(names):
            raise ReplayError(f"--columns has {len(names)} names and the first line {len(fields)} fields")
        if options.columns and any(fields[len(names) :]):
            raise ReplayError(f"--columns has {len(names)} names and the first line {len(fields)} fields")
        for name in names:
            if names.count(name) > 1 and name:
                raise ReplayError(f"two columns are called {name!r}; name them with --columns")
            if len(name.encode("utf-8", "replace")) > _MOST_NAME_BYTES or not (name.isprintable()):
                raise ReplayError(f"{name[:40]!r} cannot be an attribute's name; name the columns with --columns")
        return names

    def _position(self, column: str, flag: str) -> int:
        if column in self.names and column:
            return self.names.index(column)
        if column.isascii() and column.isdigit() and 1 <= int(column) <= len(self.names):
            return int(column) - 1
        raise ReplayError(f"{flag} {column}: no such column; there are {', '.join(filter(None, self.names))}")

    def _device_position(self, options: ReplayOptions) -> int | None:
        if (options.device_column is None) == (options.device is None):
            raise ReplayError("give --device-column, or --device NAME for a file of one device")
        if options.device_column is None:
            check_device(options.device or "")
            return None
        return self._position(options.device_column, "--device-column")

    def _time_source(self, options: ReplayOptions) -> TimeOf:
        if bool(options.time_columns) == (options.cycle_column is not None):
            raise ReplayError("give --time-column, or --cycle-column with --period and --start")
        if options.cycle_column is None:
            self.time_positions = [self._position(name, "--time-column") for name in options.time_columns]
            return time_from_columns(self.time_positions, options.time_format)
        if options.period is None or options.start is None:
            raise ReplayError("--cycle-column needs --period and --start")
        position = self._position(options.cycle_column, "--cycle-column")
        self.time_positions = [position]
        try:
            start_us = parse_time(options.start)
        except RowError as error:
            raise ReplayError(f"--start: {error.text}") from None
        return time_from_cycle(position, start_us, parse_period(options.period))

    # -- rows ---------------------------------------------------------------------------------------------------

    def data_records(self) -> Iterator[Record]:
        """The file's rows without its header."""
        rows = records(self.path)
        if self.has_header:
            next(rows, None)
        return rows

    def fields(self, record: Record) -> list[str]:
        """The cells of a row, one for each column. Raises RowError."""
        if record.problem:
            raise RowError("ROW_QUOTES", record.problem)
        cells = split(record.text, self.separator)
        if len(cells) > len(self.names) and not any(cells[len(self.names) :]):
            # Separators at the end of a line are common, and stand for nothing.
            del cells[len(self.names) :]
        if len(cells) != len(self.names):
            raise RowError("ROW_FIELD_COUNT", f"{len(cells)} fields instead of {len(self.names)}")
        return cells

    def device_of(self, cells: Sequence[str]) -> str:
        """The device of a row. Raises RowError."""
        if self.device_position is None:
            return self.device or ""
        device = cells[self.device_position]
        try:
            check_device(device)
        except ReplayError as error:
            raise RowError("ROW_DEVICE", str(error)) from None
        return device


def check_device(name: str) -> None:
    """Raises ReplayError unless `name` can name a device: 1 to 128 bytes without control characters."""
    if not name or len(name.encode("utf-8", "replace")) > _MOST_NAME_BYTES or not name.isprintable():
        raise ReplayError(f"{name[:40]!r} cannot be a device's name")


@dataclass(slots=True)
class Survey:
    """What the first pass found. `due` and `places` are filled for a paced replay only."""

    columns: list[ValueColumn]
    warnings: list[str]
    rows: int
    due: "array[int]"
    lines: "array[int]"
    offsets: "array[int]"


def survey(layout: Layout, *, paced: bool, note_row: Callable[[int], None] = lambda _: None) -> Survey:
    """Read the whole file once: the type of every column, and for a paced replay when each row is due.

    Memory is bounded by the number of columns; a paced replay takes 24 bytes per row besides.
    """
    columns = {position: ColumnSurvey() for position in layout.value_positions}
    found = Survey([], [], 0, array("q"), array("q"), array("q"))
    latest: dict[str, int] = {}
    for record in layout.data_records():
        found.rows += 1
        note_row(found.rows)
        due = None
        try:
            cells = layout.fields(record)
            for position, column in columns.items():
                cell = cells[position]
                if cell in layout.nulls:
                    column.nulls += 1
                else:
                    column.note(cell, layout.decimal)
            if paced:
                device = layout.device_of(cells)
                # Rows of one device keep their order: one that steps back in time goes with the one before it.
                due = latest[device] = max(layout.time_of(cells), latest.get(device, -(2**63)))
        except RowError:
            # Told, with its line, by the second pass.
            pass
        if paced:
            found.due.append(_clamped(due if due is not None else (found.due[-1] if found.due else 0)))
            found.lines.append(record.line)
            found.offsets.append(record.offset)
    for position, column in columns.items():
        name = layout.names[position]
        kind = layout.types.get(position) or column.type()
        if kind is not None:
            found.columns.append(ValueColumn(position, name, kind, converter(kind, layout.decimal)))
        if position not in layout.types and (warning := column.warning()):
            found.warnings.append(f"column {name!r}: {warning}")
    return found


def _clamped(time_us: int) -> int:
    return max(-(2**63), min(2**63 - 1, time_us))


def due_records(layout: Layout, found: Survey) -> Iterator[tuple[int, Record]]:
    """The rows in the order they are due, each with its due time."""
    order = sorted(range(len(found.due)), key=found.due.__getitem__)
    places = ((found.lines[row], found.offsets[row]) for row in order)
    for row, record in zip(order, read_at(layout.path, places), strict=True):
        yield found.due[row], record


def read_row(layout: Layout, columns: Sequence[ValueColumn], record: Record) -> Row | None:
    """The row in this record; None for one without any value in it. Raises RowError."""
    cells = layout.fields(record)
    if not any(cells):
        return None
    row = Row(record.line, layout.device_of(cells), layout.time_of(cells), [])
    if not -_FARTHEST_US < row.time_us < _FARTHEST_US:
        raise RowError("ROW_TIME", "the time is further away than microseconds in 64 bits can say")
    for column in columns:
        cell = cells[column.position]
        if cell in layout.nulls:
            row.nulls += 1
            continue
        try:
            row.values.append((column, column.convert(cell)))
        except RowError as error:
            row.problems.append(RowError(error.reason, f"column {column.name!r}: {error.text}"))
    return row
