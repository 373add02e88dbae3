"""Sends a surveyed file: one client and one new session per device, rows of a device in the order of the file."""

import asyncio
import random
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from device.buffer import Buffer
from device.client import DeviceClient
from device.connection import ChannelPool, DevelopmentIdentity, TlsFiles
from device.dictionary import Attribute, ValueType
from device.outcomes import Rejected
from device.packing import Column
from device.replay.cells import Cell
from device.replay.errors import RowError, StalledError
from device.replay.layout import Layout, Row, Survey, due_records, read_row
from device.replay.table import Record
from device.settings import ClientSettings


@dataclass(frozen=True, slots=True)
class ReplaySettings:
    """How a file is sent; durations in seconds.

    `speed` None sends as fast as acks come; N sends N seconds of the file per second. A device whose client has
    been idle longest is flushed and closed when more than `open_devices` are open.
    """

    target: str
    tenant: str
    service: str = "replay"
    tls: TlsFiles | None = None
    connections: int = 1
    speed: float | None = None
    historical: bool = False
    entity_type: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    readings_per_message: int = 500
    open_devices: int = 1000
    give_up_s: float = 60.0
    client: ClientSettings = field(default_factory=lambda: ClientSettings(backoff_cap_s=5.0))


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What became of the file. Rows are counted in `rows`; everything else that is not said otherwise is readings.

    `rejected` counts by reason: readings that the server refused or that could not be read from their cell, and
    (ROW_…) rows that could not be read at all. `unacked` readings were read and have no answer.
    """

    rows: int
    blank_rows: int
    devices: int
    sent: int
    acked: int
    rejected: dict[str, int]
    nulls: int
    resent: int
    unacked: int
    seconds: float


class _Sender:
    """One device: its client and the readings gathered for its next message."""

    def __init__(self, client: DeviceClient, aliases: dict[str, int]) -> None:
        self.client = client
        self._aliases = aliases
        self._clear()

    def _clear(self) -> None:
        self.pending = 0
        self._times: set[int] = set()
        self._columns: dict[ValueType, tuple[list[int], list[int], list[Cell]]] = {}

    def holds(self, time_us: int) -> bool:
        return time_us in self._times

    def add(self, row: Row) -> None:
        self._times.add(row.time_us)
        for column, value in row.values:
            aliases, times, values = self._columns.setdefault(column.type, ([], [], []))
            aliases.append(self._aliases[column.name])
            times.append(row.time_us)
            values.append(value)
        self.pending += len(row.values)

    async def flush(self, *, historical: bool) -> None:
        if not self.pending:
            return
        columns = {kind: Column(*lists) for kind, lists in self._columns.items()}
        self._clear()
        await self.client.send_columns(
            doubles=columns.get(ValueType.DOUBLE),
            int64s=columns.get(ValueType.INT64),
            bools=columns.get(ValueType.BOOL),
            strings=columns.get(ValueType.STRING),
            historical=historical,
        )


class Replay:
    """One run over one file.

    `on_problem(line, reason, text)` is told of every row and cell that could not be read, `on_rejected(device,
    rejections)` of what the server refused.
    """

    def __init__(
        self,
        layout: Layout,
        survey: Survey,
        settings: ReplaySettings,
        *,
        on_problem: Callable[[int, str, str], None] = lambda *_: None,
        on_rejected: Callable[[str, Sequence[Rejected]], None] = lambda *_: None,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._layout = layout
        self._survey = survey
        self._settings = settings
        self._on_problem = on_problem
        self._on_rejected = on_rejected
        self._clock = clock
        self._rng = rng or random.Random()
        self._attributes = [Attribute(column.name, column.type) for column in survey.columns]
        self._open: OrderedDict[str, _Sender] = OrderedDict()
        self._devices: set[str] = set()
        self._rejected: Counter[str] = Counter()
        self._closed: Counter[str] = Counter()
        self._rows = self._blank_rows = self._nulls = self._read = 0
        self._started = self._clock()

    # -- running ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Send the file and wait until everything is acked or rejected.

        Raises StalledError when nothing is acked for `give_up_s`, the client's permanent errors, and OSError when
        the file cannot be read. What was reached by then is in `result`.
        """
        self._started = self._clock()
        failure: BaseException | None = None
        async with ChannelPool(
            self._settings.target, connections=self._settings.connections, tls=self._settings.tls
        ) as pool:
            try:
                async with asyncio.TaskGroup() as tasks:
                    watch = tasks.create_task(self._watch())
                    await self._pump(pool)
                    await self._drain()
                    watch.cancel()
            except* Exception as group:
                failure = _first(group)
            finally:
                for sender in list(self._open.values()):
                    await sender.client.close()
        if failure is not None:
            raise failure

    async def _pump(self, pool: ChannelPool) -> None:
        first_due: int | None = None
        for due, record in self._records():
            if self._settings.speed is not None:
                first_due = due if first_due is None else first_due
                await self._wait_until((due - first_due) / 1e6 / self._settings.speed)
            self._rows += 1
            try:
                row = read_row(self._layout, self._survey.columns, record)
            except RowError as error:
                self._report(record.line, error)
                continue
            if row is None:
                self._blank_rows += 1
                continue
            for problem in row.problems:
                self._report(record.line, problem)
            self._nulls += row.nulls
            self._read += len(row.values)
            if row.values:
                await self._take(row, pool)

    def _records(self) -> Iterator[tuple[int, Record]]:
        if self._settings.speed is not None:
            return due_records(self._layout, self._survey)
        return ((0, record) for record in self._layout.data_records())

    async def _wait_until(self, elapsed_s: float) -> None:
        delay = self._started + elapsed_s - self._clock()
        if delay > 0:
            # A reading waits for the next message only as long as the next row is due already.
            for sender in self._open.values():
                await sender.flush(historical=self._settings.historical)
            await asyncio.sleep(delay)

    async def _take(self, row: Row, pool: ChannelPool) -> None:
        sender = self._open.get(row.device)
        if sender is None:
            sender = await self._open_device(row.device, pool)
        self._open.move_to_end(row.device)
        # Two rows of one device and time go in two messages: the second corrects the first. Within one message the
        # first would be rejected, and which of the two happens must not depend on where messages happen to end.
        if sender.holds(row.time_us):
            await sender.flush(historical=self._settings.historical)
        sender.add(row)
        if sender.pending >= self._settings.readings_per_message:
            await sender.flush(historical=self._settings.historical)

    async def _open_device(self, device: str, pool: ChannelPool) -> _Sender:
        if len(self._open) >= self._settings.open_devices:
            await self._close_device(next(iter(self._open)))
        settings = self._settings
        client = DeviceClient(
            device_id=device,
            channel=pool.channel(device),
            identity=None if settings.tls else DevelopmentIdentity(settings.tenant, service=settings.service),
            entity_type=settings.entity_type,
            labels=settings.labels,
            attributes=self._attributes,
            buffer=Buffer(max_messages=64, max_bytes=4 * 1024 * 1024),
            settings=settings.client,
            on_rejections=lambda rejected: self._note_rejected(device, rejected),
            rng=self._rng,
        )
        await client.open()
        self._devices.add(device)
        aliases = {attribute.name: alias for alias, attribute in client.dictionary}
        sender = self._open[device] = _Sender(client, aliases)
        return sender

    async def _close_device(self, device: str) -> None:
        sender = self._open[device]
        await sender.flush(historical=self._settings.historical)
        await sender.client.flush()
        await sender.client.close()
        statistics = sender.client.statistics()
        for name in ("sent", "resent", "acked"):
            self._closed[name] += getattr(statistics, f"{name}_readings")
        del self._open[device]

    async def _drain(self) -> None:
        for sender in self._open.values():
            await sender.flush(historical=self._settings.historical)
        for device in list(self._open):
            await self._close_device(device)

    async def _watch(self) -> None:
        """Gives up when messages are out and nothing has been acked or rejected for long."""
        settled, since = -1, self._clock()
        while True:
            await asyncio.sleep(self._settings.give_up_s / 20)
            waiting = any(sender.client.statistics().buffered_messages for sender in self._open.values())
            now_settled = self._total("acked") + sum(self._rejected.values())
            if now_settled != settled or not waiting:
                settled, since = now_settled, self._clock()
            elif self._clock() - since >= self._settings.give_up_s:
                raise StalledError(self._settings.give_up_s, ever_acked=self._total("acked") > 0)

    # -- counting -----------------------------------------------------------------------------------------------

    def _report(self, line: int, error: RowError) -> None:
        self._rejected[error.reason] += 1
        self._on_problem(line, error.reason, error.text)

    def _note_rejected(self, device: str, rejected: Sequence[Rejected]) -> None:
        for one in rejected:
            self._rejected[one.reason] += one.count
        self._closed["refused"] += sum(one.count for one in rejected)
        self._on_rejected(device, rejected)

    def _total(self, name: str) -> int:
        live = (getattr(sender.client.statistics(), f"{name}_readings") for sender in self._open.values())
        return self._closed[name] + sum(int(count) for count in live)

    def result(self) -> ReplayResult:
        """What has become of the file by now."""
        acked = self._total("acked")
        return ReplayResult(
            rows=self._rows,
            blank_rows=self._blank_rows,
            devices=len(self._devices),
            sent=self._total("sent"),
            acked=acked,
            rejected=dict(sorted(self._rejected.items())),
            nulls=self._nulls,
            resent=self._total("resent"),
            unacked=self._read - acked - self._closed["refused"],
            seconds=round(self._clock() - self._started, 3),
        )


def _first(group: BaseExceptionGroup[Exception]) -> Exception:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error
