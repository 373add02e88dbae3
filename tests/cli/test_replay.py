import argparse
import asyncio
import json

import pytest

from cli import replay
from tests.device import turbofan_form
from tests.device.reference_server import ReferenceServer

START_US = 1_767_225_600_000_000
HOUR_US = 3_600_000_000


@pytest.fixture
async def server():
    async with ReferenceServer() as running:
        yield running


@pytest.fixture
def turbofan(tmp_path):
    table = turbofan_form.rows(engines=4, cycles=30)
    return table, turbofan_form.write(tmp_path / "form.txt", table)


def parser():
    root = argparse.ArgumentParser()
    replay.add_parser(root.add_subparsers())
    return root


async def run(server, capsys, *arguments):
    """The exit code, the closing JSON, and what went to standard error."""
    parsed = parser().parse_args(["replay", *map(str, arguments), "--target", server.target, "--tenant", "acme"])
    # The command has an event loop of its own.
    code = await asyncio.to_thread(parsed.run, parsed)
    output = capsys.readouterr()
    closing = json.loads(output.out.splitlines()[-1]) if output.out else None
    return code, closing, output.err


def turbofan_arguments(path):
    return (
        path,
        "--columns",
        ",".join(turbofan_form.COLUMNS),
        "--device-column",
        "unit",
        "--cycle-column",
        "cycle",
        "--period",
        "1h",
        "--start",
        "2026-01-01T00:00:00Z",
    )


async def stored(server):
    return {device: await server.readings(device) for device in server.devices}


async def test_the_turbofan_form_arrives_equal_and_typed(server, turbofan, capsys):
    table, path = turbofan
    code, closing, _ = await run(server, capsys, *turbofan_arguments(path))
    expected = turbofan_form.typed(table, START_US, HOUR_US)
    found = await stored(server)
    assert code == 0
    assert found == expected
    assert {type(value) for (name, _), value in found["1"].items() if name in ("s17", "s18")} == {int}
    assert {type(value) for (name, _), value in found["1"].items() if name == "setting3"} == {float}
    assert closing.pop("seconds") > 0
    assert closing == {
        "rows": len(table),
        "blank_rows": 0,
        "devices": 4,
        "sent": 24 * len(table),
        "acked": 24 * len(table),
        "rejected": {},
        "nulls": 0,
        "resent": 0,
        "unacked": 0,
    }


async def test_again_changes_nothing_and_a_change_corrects_one_reading(server, turbofan, capsys, tmp_path):
    table, path = turbofan
    await run(server, capsys, *turbofan_arguments(path))
    await run(server, capsys, *turbofan_arguments(path))
    revisions = [r for device in server.devices.values() for _, r in device.readings.values()]
    assert set(revisions) == {0}
    assert len(server.devices["1"].sessions) == 2
    table[5][10] = "1234.5"
    turbofan_form.write(path, table)
    await run(server, capsys, *turbofan_arguments(path))
    revisions = [r for device in server.devices.values() for _, r in device.readings.values()]
    assert sorted(revisions)[-2:] == [0, 1]


async def test_bad_rows_cost_nothing_but_themselves(server, capsys, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(
        "id,time,v,label\n"
        "a,1790000000,1.5,x\n"
        "a,1790000001,oops,y\n"
        "a,1790000002\n"
        "a,never,1.5,x\n"
        "a,0,2.5,z\n"
        "a,1790000003,3.5,\n"
    )
    code, closing, errors = await run(server, capsys, path, "--device-column", "id", "--time-column", "time")
    assert code == 0
    assert closing["rejected"] == {
        "ROW_FIELD_COUNT": 1,
        "ROW_TIME": 1,
        "TIMESTAMP_INVALID": 2,
        "VALUE_UNPARSABLE": 1,
    }
    assert (closing["acked"], closing["nulls"], closing["rows"]) == (4, 1, 6)
    for expected in ("line 3: VALUE_UNPARSABLE", "line 4: ROW_FIELD_COUNT", "line 5: ROW_TIME"):
        assert expected in errors
    assert "device a: TIMESTAMP_INVALID" in errors


async def test_two_rows_of_one_time_are_a_correction(server, capsys, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("t,v\n1790000000,1\n1790000000,2\n1790000001,3\n")
    code, closing, _ = await run(server, capsys, path, "--device", "x", "--time-column", "t")
    assert (code, closing["rejected"], closing["acked"]) == (0, {}, 3)
    assert server.devices["x"].readings["v", 1_790_000_000_000_000] == (2, 1)


async def test_an_interrupted_replay_arrives_complete(server, turbofan, capsys):
    table, path = turbofan
    server.faults.cut_after = 2
    code, closing, _ = await run(server, capsys, *turbofan_arguments(path), "--connections", 2)
    assert code == 0
    assert closing["resent"] > 0
    assert await stored(server) == turbofan_form.typed(table, START_US, HOUR_US)


async def test_pace(server, turbofan, capsys):
    table, path = turbofan
    # 40 hours of data or less, in a fraction of a second.
    code, closing, _ = await run(server, capsys, *turbofan_arguments(path), "--speed", 40 * 3600 / 0.3)
    assert code == 0
    assert closing["seconds"] > 0.1
    assert await stored(server) == turbofan_form.typed(table, START_US, HOUR_US)


async def test_silence_ends_the_replay(server, turbofan, capsys):
    _, path = turbofan
    server.faults.hold_commits = True
    code, closing, errors = await run(server, capsys, *turbofan_arguments(path), "--give-up-after", 0.3)
    assert code == 3
    assert closing["unacked"] > 0
    assert "nothing was acked" in errors


async def test_a_refusal_ends_the_replay(server, turbofan, capsys):
    import grpc

    _, path = turbofan
    server.faults.refuse = (grpc.StatusCode.PERMISSION_DENIED, "DEVICE_UNKNOWN")
    code, _, errors = await run(server, capsys, *turbofan_arguments(path))
    assert code == 1
    assert "DEVICE_UNKNOWN" in errors


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(["--type", "s1=complex"], id="type"),
        pytest.param(["--speed", "0"], id="speed"),
        pytest.param(["--cert", "x.pem"], id="half of mutual TLS"),
        pytest.param(["--time-column", "s1"], id="two times"),
    ],
)
async def test_wrong_arguments_are_told(server, turbofan, capsys, changes):
    code, closing, errors = await run(server, capsys, *turbofan_arguments(turbofan[1]), *changes)
    assert (code, closing) == (2, None)
    assert errors.startswith("atlasco replay: ")


def test_the_help_shows_the_turbofan_form(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["replay", "--help"])
    assert "--cycle-column cycle --period 1h" in capsys.readouterr().out
