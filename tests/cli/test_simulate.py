import argparse
import asyncio
import json

import pytest

from cli import simulate
from tests.device.reference_server import ReferenceServer


@pytest.fixture
async def server():
    async with ReferenceServer() as running:
        yield running


def parse(*arguments):
    root = argparse.ArgumentParser()
    simulate.add_parser(root.add_subparsers())
    return root.parse_args(["simulate", *map(str, arguments)])


async def test_a_short_simulation_ends_with_its_counts(server, capsys):
    parsed = parse("--target", server.target, "--devices", 8, "--duration", 0.5, "--rate", 200)
    config = simulate.parse_config(parsed)
    assert await simulate._simulate(config) == 0
    closing = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert closing["devices"] == 8
    assert closing["acked"] > 0
    assert closing["sent"] == closing["acked"] + closing["rejected"]
    assert closing["unacked"] == 0


async def test_nobody_listens(capsys):
    config = simulate.parse_config(parse("--target", "127.0.0.1:1", "--devices", 1, "--duration", 0.1))
    import dataclasses

    assert await simulate._simulate(dataclasses.replace(config, flush_deadline_s=0.2)) == 3
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ack_p50_ms"] is None


@pytest.mark.parametrize(
    "arguments",
    [
        ("--rate", "fast"),
        ("--devices", "0"),
        ("--duration", "-1"),
        ("--disconnect-share", "2"),
        ("--ca", "x.pem"),
    ],
    ids=lambda arguments: arguments[0],
)
async def test_wrong_arguments_are_told(capsys, arguments):
    assert await asyncio.to_thread(simulate.run, parse(*arguments)) == 2
    assert capsys.readouterr().err.startswith("atlasco simulate: ")
