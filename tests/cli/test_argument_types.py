"""Labels and durations mean the same to every command, and are refused alike."""

import pytest

from cli.argument_types import label, seconds
from cli.main import main


@pytest.mark.parametrize(("text", "pair"), [("a=1", ("a", "1")), ("a=", ("a", "")), ("a=b=c", ("a", "b=c"))])
def test_a_label_ends_its_key_at_the_first_sign(text: str, pair: tuple[str, str]) -> None:
    assert label(text) == pair


def test_a_duration_is_told_in_seconds() -> None:
    assert [seconds("250ms"), seconds("10m"), seconds("2d")] == [0.25, 600.0, 172_800.0]


@pytest.mark.parametrize(
    "command",
    [
        ["query", "devices", "--tenant", "t"],
        ["query", "aggregate", "a", "--tenant", "t", "--start", "-1h"],
        ["tenant", "device", "add", "t", "d"],
        ["replay", "data.csv", "--tenant", "t"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("text", ["novalue", "=novalue", ""])
def test_what_is_no_label_is_refused_with_its_form(
    command: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--label", text])
    assert caught.value.code == 2
    assert f"argument --label: {text!r} is not KEY=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["maintain", "--every"],
        ["device", "delete", "t", "d", "--timeout"],
        ["tenant", "create", "t", "--retention"],
        ["pki", "server", "dir", "--valid"],
        ["warehouse", "compact", "--keep"],
    ],
    ids=" ".join,
)
def test_what_is_no_duration_is_refused_with_its_form(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "soon"])
    assert caught.value.code == 2
    assert f"argument {command[-1]}: 'soon' is not a duration" in capsys.readouterr().err
