"""Processes: exit codes and signals, in processes of their own; lag and shutdown within this one."""

import asyncio
import json
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runtime import process as process_module
from runtime.config import ConfigError
from runtime.metrics import MemoryMetrics
from runtime.process import DependencyUnreachable, ExitCode, Shutdown, exit_code_of, run_process, sample_lag
from tests.waiting import PATIENCE_S, until

ROOT = Path(__file__).parents[2]

PREAMBLE = """
import asyncio, sys, time
from runtime.config import ConfigError
from runtime.logs import LogConfig, configure_logs
from runtime.process import DependencyUnreachable, run_process
configure_logs(LogConfig(format="json"))
"""


@contextmanager
def process(body: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that runs `main` of the body; what it prints first is read before it is handed
    out.
    """
    code = PREAMBLE + textwrap.dedent(body) + "\nsys.exit(run_process(main))\n"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def ended(child: subprocess.Popen[str]) -> tuple[int, str, list[dict[str, object]]]:
    out, err = child.communicate(timeout=PATIENCE_S)
    return child.returncode, out, [json.loads(line) for line in err.splitlines() if line.startswith("{")]


WAITS = """
async def main(shutdown):
    print("ready", flush=True)
    await shutdown.wait()
    print("drained after", shutdown.reason, flush=True)
    return 0
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda each: each.name)
def test_a_signal_asks_for_the_end(number: signal.Signals) -> None:
    with process(WAITS) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        code, out, logs = ended(child)
    assert (code, out) == (0, f"drained after {number.name}\n")
    assert [entry["message"] for entry in logs] == ["shutdown asked for"]


def test_a_second_signal_ends_a_drain_that_hangs_even_with_the_loop_blocked() -> None:
    body = """
    async def main(shutdown):
        print("ready", flush=True)
        await shutdown.wait()
        print("draining", flush=True)
        while True:
            time.sleep(0.01)
    """
    with process(body) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        assert child.stdout.readline() == "draining\n"
        child.send_signal(signal.SIGTERM)
        child.wait(PATIENCE_S)
        assert child.returncode == 128 + signal.SIGTERM
        assert child.stderr is not None
        assert "second signal" in child.stderr.read()


@pytest.mark.parametrize(
    ("statement", "code", "message"),
    [
        pytest.param("return 0", 0, None, id="ok"),
        pytest.param("return 1", 1, None, id="failed"),
        pytest.param("raise ConfigError(['ATLASCO_X is wrong'])", 2, "ATLASCO_X is wrong", id="configuration"),
        pytest.param("raise DependencyUnreachable('db:5432')", 3, "db:5432", id="unreachable"),
        pytest.param("raise ZeroDivisionError('no')", 1, "process failed", id="bug"),
        pytest.param("asyncio.current_task().cancel(); await asyncio.sleep(9)", 1, "process failed", id="cancel"),
    ],
)
def test_exit_codes(statement: str, code: int, message: str | None) -> None:
    with process(f"async def main(shutdown):\n    {statement}\n") as child:
        actual, _, logs = ended(child)
    assert actual == code
    assert [entry["message"] for entry in logs] == ([message] if message else [])


def test_an_error_that_nobody_awaits_is_logged() -> None:
    body = """
    async def main(shutdown):
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: 1 / 0)
        await asyncio.sleep(0)
        return 0
    """
    with process(body) as child:
        code, _, logs = ended(child)
    assert code == 0
    assert logs[0]["level"] == "error"
    exception = logs[0]["exception"]
    assert isinstance(exception, dict)
    assert exception["type"] == "ZeroDivisionError"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        pytest.param(ExceptionGroup("", [ConfigError(["a"]), ConfigError(["b"])]), 2, id="all-configuration"),
        pytest.param(ExceptionGroup("", [ConfigError(["a"]), ValueError()]), 1, id="mixed"),
        pytest.param(
            ExceptionGroup("", [ExceptionGroup("", [DependencyUnreachable("db")])]), 3, id="nested-unreachable"
        ),
    ],
)
def test_the_exit_code_of_a_group(error: BaseException, code: int) -> None:
    assert exit_code_of(error) == ExitCode(code)


def test_signal_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    async def main(shutdown: Shutdown) -> int:
        assert signal.getsignal(signal.SIGTERM) is not before[0]
        return 0

    assert run_process(main) == 0
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_the_lag_of_the_loop_is_measured() -> None:
    metrics = MemoryMetrics()

    async def main(shutdown: Shutdown) -> int:
        await until(lambda: metrics.distribution("atlasco_event_loop_lag_seconds").count >= 2, "two samples")
        return 0

    assert run_process(main, metrics=metrics) == 0


async def test_a_loop_that_stands_still_is_seen(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "LAG_WARNING_S", 0.05)
    metrics = MemoryMetrics()
    loop = asyncio.get_running_loop()
    sampler = loop.create_task(sample_lag(metrics))
    await asyncio.sleep(0)
    blocked_until = loop.time() + 0.3
    while loop.time() < blocked_until:
        pass
    await until(lambda: metrics.distribution("atlasco_event_loop_lag_seconds").count, "a sample")
    sampler.cancel()
    assert metrics.distribution("atlasco_event_loop_lag_seconds").maximum > 0.05
    assert "the event loop stood still" in caplog.text


async def test_the_first_reason_stays() -> None:
    shutdown = Shutdown()
    assert not shutdown.requested
    shutdown.request("SIGTERM")
    shutdown.request("SIGINT")
    await shutdown.wait()
    assert (shutdown.requested, shutdown.reason) == (True, "SIGTERM")
