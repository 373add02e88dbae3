"""A file replayed through gateways that are killed, stopped and cut off from their database: the same final state."""

import asyncio
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pytest
from atlasco.telemetry.v1 import common_pb2, query_pb2, query_pb2_grpc

from device.replay.layout import Layout, ReplayOptions, survey
from device.replay.run import Replay, ReplayResult, ReplaySettings
from device.settings import ClientSettings
from embedded.errors import ProcessFailed
from runtime.process import ExitCode
from tests.device import turbofan_form
from tests.e2e.gateway_process import GatewayProcess
from tests.gateway.raw_stream import D, RawStream, now_us, readings, service
from tests.gateway.running_gateway import new_channel
from tests.gateway.stored import changes, history, rows
from tests.storage.conftest import Database
from tests.waiting import PATIENCE_S, until

TENANT = "engines"
PERIOD_US = 60_000_000
# A whole second, within the clock window for the length of a life.
START_US = (time.time_ns() // 10**9 - 86_400) * 10**6
QUICK = ClientSettings(backoff_base_s=0.05, backoff_cap_s=0.2)

Table: TypeAlias = list[list[str]]


@pytest.fixture(scope="module")
def table() -> Table:
    return turbofan_form.rows(engines=6, cycles=40)


@pytest.fixture
def process(database: Database, tmp_path: Path) -> Iterator[GatewayProcess]:
    running = GatewayProcess(database, tmp_path / "gateway.log")
    try:
        running.start()
        yield running
    finally:
        running.kill()


class Pace:
    """The time by which rows are due. It stops in mid-replay until it is let go: after standing still for a while, the
    machine would else send the rest of the file in one go.
    """

    def __init__(self, stops_s: float) -> None:
        self._began = time.monotonic()
        self._stops_s = stops_s

    def __call__(self) -> float:
        return min(time.monotonic() - self._began, self._stops_s)

    def let_go(self) -> None:
        self._stops_s = math.inf


def replay_of(path: Path, target: str, clock: Callable[[], float] = time.monotonic, **settings: Any) -> Replay:
    options = ReplayOptions(
        path=path,
        device_column="unit",
        cycle_column="cycle",
        period="1m",
        start=datetime.fromtimestamp(START_US / 1e6, UTC).isoformat(),
        columns=turbofan_form.COLUMNS,
    )
    layout = Layout(options)
    sending = ReplaySettings(target=target, tenant=TENANT, client=QUICK, readings_per_message=100, **settings)
    return Replay(layout, survey(layout, paced=sending.speed is not None), sending, clock=clock)


async def replay(path: Path, target: str) -> ReplayResult:
    run = replay_of(path, target)
    async with asyncio.timeout(PATIENCE_S):
        await run.run()
    result = run.result()
    assert (result.unacked, result.rejected) == (0, {})
    return result


async def patiently(method: Any, request: Any) -> Any:
    """The answer, once the database does answer."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await method(request, metadata=service(TENANT), wait_for_ready=True)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise


async def query(target: str, device: str) -> dict[tuple[str, int], Any]:
    """Every reading of a device, through the Query RPC, typed as the answer has it."""
    found: dict[tuple[str, int], Any] = {}
    async with new_channel(target) as channel:
        stub: Any = query_pb2_grpc.QueryServiceStub(channel)
        request = query_pb2.ReadSeriesRequest(
            entities=[device],
            attributes=list(turbofan_form.COLUMNS[2:]),
            start_time_us=START_US,
            end_time_us=START_US + 10**6 * 86_400,
            page_size=1_000,
        )
        while True:
            page = await patiently(stub.ReadSeries, request)
            for series in page.series:
                integers = series.type == common_pb2.ATTRIBUTE_TYPE_INT64
                values = series.int64_values if integers else series.double_values
                found |= {(series.attribute, at): value for at, value in zip(series.times_us, values, strict=True)}
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token


async def check_equal_to_the_file(database: Database, target: str, table: Table, revised: int = 0) -> None:
    """Read back reading by reading, typed right, and one change in the outbox for each."""
    expected = turbofan_form.typed(table, START_US, PERIOD_US)
    for device, values in expected.items():
        stored = await query(target, device)
        assert stored == values
        assert {key: type(value) for key, value in stored.items()} == {k: type(v) for k, v in values.items()}
    told = changes(database, TENANT)
    assert len(told) == sum(map(len, expected.values())) + revised
    assert sum(1 for change in told if change[4] == 0) == len(told) - revised


async def test_kill_in_mid_stream_and_replay_again(
    process: GatewayProcess, database: Database, tmp_path: Path, table: Table
) -> None:
    half = turbofan_form.write(tmp_path / "half.txt", table[: len(table) // 2])
    whole = turbofan_form.write(tmp_path / "whole.txt", table)
    # 40 cycles at 20 in a second: the kill comes while rows are still being sent.
    pace = Pace(stops_s=1.0)
    first = replay_of(half, process.target, pace, speed=PERIOD_US / 1e6 * 20)
    running = asyncio.create_task(first.run())
    await until(lambda: first.result().acked > 500, "readings are acked", beside=running)
    process.kill()
    assert not running.done()
    pace.let_go()
    process.start()
    await until(running.done, "the replay ends")
    await running
    assert first.result().unacked == 0
    again = await replay(whole, process.target)
    assert again.rows == len(table)
    await check_equal_to_the_file(database, process.target, table)

    # Once more: nothing changes anywhere.
    before = changes(database, TENANT)
    await replay(whole, process.target)
    assert changes(database, TENANT) == before

    # One value changed: one correction.
    corrected = [list(cells) for cells in table]
    corrected[7][4 + 2] = "643.99"
    await replay(turbofan_form.write(tmp_path / "corrected.txt", corrected), process.target)
    unit, cycle, name = corrected[7][0], int(corrected[7][1]), turbofan_form.COLUMNS[6]
    at = START_US + cycle * PERIOD_US
    assert changes(database, TENANT)[len(before) :] == [(unit, name, at, 643.99, 1)]
    revisions = {key: revision for key, (_, revision) in history(database, TENANT, unit).items() if revision}
    assert revisions == {(name, at): 1}
    await check_equal_to_the_file(database, process.target, corrected, revised=1)


async def test_sigterm_drains(process: GatewayProcess, database: Database) -> None:
    t0 = now_us() - 60_000_000
    async with new_channel(process.target) as channel:
        stream = RawStream(channel, TENANT, "d")
        await stream.hello()
        for sequence in range(1, 41):
            await stream.send(sequence, readings(t0, doubles=[(D, sequence, 1.0)]))
        process.terminate()
        notice = (await stream.hear("reconnect_notice")).reconnect_notice
        assert notice.reason == notice.REASON_SHUTDOWN
        await stream.acks_through(40)
        assert (await stream.half_close()).code == "OK"
    assert await asyncio.to_thread(process.wait) == 0
    assert len(history(database, TENANT, "d")) == 40


async def test_sigterm_waits_for_no_silent_connection(database: Database, tmp_path: Path) -> None:
    # A gateway that waits for the hello, or for the end of the drain, is still there when the test's patience ends.
    lenient = {"ATLASCO_HELLO_TIMEOUT": "1h", "ATLASCO_DRAIN_TIMEOUT": "1h"}
    process = GatewayProcess(database, tmp_path / "gateway.log", settings=lenient)
    try:
        process.start()
        async with new_channel(process.target) as channel:
            silent, leaving = RawStream(channel, TENANT, "silent"), RawStream(channel, TENANT, "leaving")
            await leaving.hello()
            await until(lambda: "atlasco_streams_open 2.0" in process.ask("metrics").splitlines())
            process.terminate()
            await leaving.hear("reconnect_notice")
            assert (await leaving.half_close()).code == "OK"
            assert await asyncio.to_thread(process.wait) == 0
            silent.drop()
    finally:
        process.kill()


async def test_the_database_restarts_under_load(
    process: GatewayProcess, database: Database, tmp_path: Path, table: Table
) -> None:
    pace = Pace(stops_s=2.0)
    whole = turbofan_form.write(tmp_path / "whole.txt", table)
    run = replay_of(whole, process.target, pace, speed=PERIOD_US / 1e6 * 10)
    running = asyncio.create_task(run.run())
    await until(lambda: run.result().acked > 500, "readings are acked", beside=running)
    # When one of its processes dies, the server ends all others, recovers from its log and starts again.
    [(backend,)] = rows(database, "SELECT min(pid) FROM pg_stat_activity WHERE application_name = 'atlasco-ingest'")
    os.kill(backend, signal.SIGKILL)
    assert not running.done()
    pace.let_go()
    async with asyncio.timeout(PATIENCE_S):
        await running
    assert (run.result().unacked, run.result().rejected) == (0, {})
    await check_equal_to_the_file(database, process.target, table)


async def test_metrics_and_health(process: GatewayProcess, tmp_path: Path, table: Table) -> None:
    result = await replay(turbofan_form.write(tmp_path / "whole.txt", table), process.target)
    lines = dict(
        line.rsplit(" ", 1) for line in process.ask("metrics").splitlines() if line and not line.startswith("#")
    )
    committed = sum(
        float(value) for name, value in lines.items() if name.startswith("atlasco_readings_committed_total")
    )
    assert committed == result.acked
    # The gateway may notice a moment later that the last client has hung up.
    await until(lambda: "atlasco_streams_open 0.0" in process.ask("metrics").splitlines())
    assert process.ask("livez") == "alive\n"
    with pytest.raises(OSError, match="404"):
        process.ask("nothing")


def test_the_port_is_taken(process: GatewayProcess, database: Database, tmp_path: Path) -> None:
    second = GatewayProcess(database, tmp_path / "second.log", process.target)
    with pytest.raises(ProcessFailed, match="did not become ready"):
        second.start()
    assert second.wait() == ExitCode.CONFIGURATION
