"""Times on the command line: the same line means the same on every machine."""

import argparse
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from cli import query, rollup, tenant, verify
from cli.query_arguments import BadArgument
from cli.times import ABSOLUTE, moment, parse_time

NOW_US = 1_767_225_600_000_000  # 2026-01-01T00:00:00Z

# Each command that takes a time, the arguments up to the time, and where it puts it.
TAKE_A_TIME = {
    "rollup-from": (["rollup", "create", "acme", "climate", "--attribute", "load", "--from"], "since"),
    "verify-from": (["verify", "--from"], "start"),
    "verify-to": (["verify", "--to"], "end"),
    "release-before": (["tenant", "quarantine", "release", "acme", "--before"], "before"),
}


@pytest.fixture
def far_from_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "XXX+11")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser()
    commands = whole.add_subparsers(required=True)
    for module in (query, rollup, tenant, verify):
        module.add_parser(commands)
    return whole


@pytest.mark.usefixtures("far_from_utc")
@pytest.mark.parametrize(("arguments", "name"), TAKE_A_TIME.values(), ids=TAKE_A_TIME)
def test_a_time_without_a_zone_is_utc(arguments: list[str], name: str) -> None:
    taken = getattr(parser().parse_args([*arguments, "2026-03-01T06:00"]), name)
    assert taken == datetime(2026, 3, 1, 6, tzinfo=UTC)


@pytest.mark.parametrize(("arguments", "name"), TAKE_A_TIME.values(), ids=TAKE_A_TIME)
def test_a_command_says_what_times_it_takes(
    arguments: list[str], name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit):
        parser().parse_args([*arguments, "2026-01-01", "--help"])
    assert f"{arguments[-1]} TIME" in (text := capsys.readouterr().out)
    assert ABSOLUTE in text.split(f"  {arguments[-1]} TIME")[-1].splitlines()[0]
    with pytest.raises(SystemExit):
        parser().parse_args([*arguments, "soon"])
    assert "'soon' is no time: use ISO 8601" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-01-01T01:00:00+01:00", datetime(2026, 1, 1, tzinfo=UTC)),
        ("2026-01-01T00:00:00.000001", datetime(2026, 1, 1, microsecond=1, tzinfo=UTC)),
        ("9999-12-31T23:59:59.999999Z", datetime.max.replace(tzinfo=UTC)),
    ],
)
def test_a_moment(text: str, expected: datetime) -> None:
    assert moment(text) == expected


@pytest.mark.usefixtures("far_from_utc")
@pytest.mark.parametrize(
    ("text", "offset_us"),
    [
        ("now", 0),
        ("-90s", -90_000_000),
        ("-1h", -3_600_000_000),
        ("now-2d", -2 * 86_400_000_000),
        ("+1w", 7 * 86_400_000_000),
        ("2026-01-01", 0),
        ("2026-01-01T00:00:01Z", 1_000_000),
        ("2026-01-01T01:00:00+01:00", 0),
        ("2026-01-01 00:00:00.5", 500_000),
        # More than the 53 bits of a double.
        ("9999-12-31T23:59:59.999999Z", 253_402_300_799_999_999 - NOW_US),
    ],
)
def test_a_time_of_a_query(text: str, offset_us: int) -> None:
    assert parse_time(text, NOW_US, "--start") == NOW_US + offset_us


@pytest.mark.parametrize("text", ["", "1h", "-1", "-1y", "tomorrow", "2026-13-01"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(BadArgument, match="--start"):
        parse_time(text, NOW_US, "--start")
