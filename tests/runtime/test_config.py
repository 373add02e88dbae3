"""Settings: precedence, every parser, all problems at once, no secret shown, documentation from code."""

import argparse
import contextlib
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.config import (
    REQUIRED,
    Address,
    ConfigError,
    Kind,
    add_settings,
    address,
    boolean,
    byte_size,
    choice,
    describe_settings,
    duration,
    load_settings,
    non_negative_int,
    optional_path,
    positive_int,
    setting,
)

LOOPBACK = Address("127.0.0.1", 7070)


@dataclass(frozen=True)
class Sample:
    """A sample. More text."""

    listen: Address = setting("ATLASCO_LISTEN", LOOPBACK, "Where.", parse=address)
    dsn: str = setting("ATLASCO_DSN", REQUIRED, "The database.", secret=True)
    age: float = setting("ATLASCO_FLUSH_AGE", 0.02, "Oldest 100% batch.", parse=duration)
    size: int = setting("ATLASCO_SIZE", 64 * 2**20, "Most.", parse=byte_size)
    chatty: bool = setting("ATLASCO_CHATTY", True, "Talk.", parse=boolean)
    key: Path | None = setting("ATLASCO_KEY", None, "Key.", parse=optional_path)
    mode: str = setting("ATLASCO_MODE", "a", "Mode.", parse=choice("a", "b"))
    lanes: int = setting("ATLASCO_LANES", 4, "Lanes.", parse=positive_int)

    def __post_init__(self) -> None:
        if self.mode == "b" and self.lanes == 1:
            raise ValueError("ATLASCO_MODE b needs more than one lane")


@dataclass(frozen=True)
class Sibling:
    """Shares one setting with Sample."""

    dsn: str = setting("ATLASCO_DSN", REQUIRED, "The database.", secret=True)


@dataclass(frozen=True)
class Token:
    """A secret that has a form."""

    token: int = setting("ATLASCO_TOKEN", 7, "Token.", parse=positive_int, secret=True)
    other: int = setting("ATLASCO_OTHER", 7, "Token.", parse=int, secret=True)


def parse(*argv: str, config_type: type = Sample) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_settings(parser, config_type)
    return parser.parse_args(argv)


def test_flag_wins_over_environment_wins_over_default() -> None:
    environ = {"ATLASCO_DSN": "from-env", "ATLASCO_LANES": "9", "ATLASCO_MODE": "b"}
    config = load_settings(Sample, parse("--lanes", "3"), environ)
    assert (config.lanes, config.mode, config.dsn, config.age) == (3, "b", "from-env", 0.02)


def test_an_empty_variable_is_not_set() -> None:
    config = load_settings(Sample, parse("--dsn", "x"), {"ATLASCO_LANES": "", "ATLASCO_KEY": ""})
    assert config.lanes == 4
    assert config.key is None


@pytest.mark.parametrize(
    ("argv", "environ", "expected"),
    [
        pytest.param(["--no-chatty"], {}, False, id="flag-off"),
        pytest.param(["--chatty"], {"ATLASCO_CHATTY": "false"}, True, id="flag-over-variable"),
        pytest.param([], {"ATLASCO_CHATTY": "off"}, False, id="variable"),
    ],
)
def test_booleans(argv: list[str], environ: dict[str, str], expected: bool) -> None:
    assert load_settings(Sample, parse("--dsn", "x", *argv), environ).chatty is expected


def test_all_problems_are_reported_at_once_by_name_value_and_what_is_allowed() -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(Sample, parse("--lanes", "0"), {"ATLASCO_LISTEN": "nowhere", "ATLASCO_MODE": "c"})
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert "ATLASCO_LISTEN: 'nowhere' is not allowed; it must be host:port" in text
    assert "--lanes: '0' is not allowed; it must be an integer, 1 or more" in text
    assert "ATLASCO_MODE: 'c' is not allowed; it must be one of a, b" in text
    assert "ATLASCO_DSN (or --dsn) must be set" in text


def test_a_check_across_fields_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="needs more than one lane"):
        load_settings(Sample, parse("--dsn", "x", "--mode", "b", "--lanes", "1"), {})


@pytest.mark.parametrize("variable", ["ATLASCO_TOKEN", "ATLASCO_OTHER"])
def test_a_secret_is_never_shown(variable: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(Token, parse(config_type=Token), {variable: "hunter2"})
    assert variable in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in repr(load_settings(Sample, parse("--dsn", "hunter2"), {}))
    parser = argparse.ArgumentParser()
    add_settings(parser, Token)
    assert "default: (secret)" in parser.format_help()


def test_help_names_the_variable_and_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    parser = argparse.ArgumentParser()
    add_settings(parser, Sample)
    text = parser.format_help()
    assert "Oldest 100% batch. [ATLASCO_FLUSH_AGE; default: 20ms]" in text
    assert "[ATLASCO_DSN; default: required]" in text
    assert "default: 64MiB" in text


def test_two_configurations_of_one_process_share_a_setting() -> None:
    parser = argparse.ArgumentParser()
    add_settings(parser, Sample)
    add_settings(parser, Sibling)
    args = parser.parse_args(["--dsn", "x"])
    assert load_settings(Sibling, args, {}).dsn == "x"
    assert load_settings(Sample, args, {}).dsn == "x"
    assert describe_settings([Sample, Sibling]).count("`ATLASCO_DSN`") == 1


def test_the_table_has_a_row_for_each_setting() -> None:
    table = describe_settings([Sample])
    assert "| `ATLASCO_DSN` | `--dsn` | required | text | The database. |" in table
    assert "| `ATLASCO_FLUSH_AGE` | `--flush-age` | `20ms` |" in table
    assert "| `ATLASCO_KEY` | `--key` | not set |" in table
    assert len(table.splitlines()) == 2 + 8


def test_a_required_setting_has_no_default_in_the_constructor_either() -> None:
    with pytest.raises(TypeError, match="dsn"):
        Sample()


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        pytest.param(address, "127.0.0.1:7070", Address("127.0.0.1", 7070), id="ipv4"),
        pytest.param(address, "[::1]:0", Address("::1", 0), id="ipv6"),
        pytest.param(address, "gateway.svc:65535", Address("gateway.svc", 65535), id="name"),
        pytest.param(duration, "250ms", 0.25, id="milliseconds"),
        pytest.param(duration, "30s", 30.0, id="seconds"),
        pytest.param(duration, "1.5h", 5400.0, id="fraction"),
        pytest.param(duration, "7d", 604800.0, id="days"),
        pytest.param(duration, "0", 0.0, id="zero"),
        pytest.param(byte_size, "64MiB", 64 * 2**20, id="mebibytes"),
        pytest.param(byte_size, "10MB", 10**7, id="megabytes"),
        pytest.param(byte_size, "4096", 4096, id="bytes"),
        pytest.param(non_negative_int, "0", 0, id="zero-integer"),
        pytest.param(boolean, "Yes", True, id="yes"),
    ],
)
def test_accepted(kind: Kind[object], text: str, value: object) -> None:
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        pytest.param(address, "7070", id="no-host"),
        pytest.param(address, "::1:7070", id="bare-ipv6"),
        pytest.param(address, "host:65536", id="port-too-large"),
        pytest.param(address, "http://host:80", id="url"),
        pytest.param(duration, "5", id="no-unit"),
        pytest.param(duration, "-5s", id="negative"),
        pytest.param(duration, "nan", id="nan"),
        pytest.param(duration, "5 minutes", id="words"),
        pytest.param(byte_size, "64Mi", id="kubernetes-size"),
        pytest.param(byte_size, "-1", id="negative-size"),
        pytest.param(positive_int, "0", id="zero"),
        pytest.param(positive_int, "1_000", id="underscore"),
        pytest.param(positive_int, "٣", id="arabic-digit"),
        pytest.param(non_negative_int, "-1", id="negative-integer"),
        pytest.param(boolean, "maybe", id="maybe"),
        pytest.param(choice("a"), "A", id="choice-case"),
    ],
)
def test_refused(kind: Kind[object], text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        kind(text)


@given(st.integers(0, 10**12))
def test_a_size_written_reads_back(size: int) -> None:
    assert byte_size(byte_size.write(size)) == size


@given(st.integers(0, 10**9), st.sampled_from([1e3, 1.0]))
def test_a_duration_written_reads_back(count: int, per_second: float) -> None:
    seconds = count / per_second
    assert duration(duration.write(seconds)) == seconds


@given(st.text(max_size=20))
def test_any_text_is_a_value_or_a_value_error(text: str) -> None:
    for kind in (address, duration, byte_size, positive_int, boolean):
        with contextlib.suppress(ValueError):
            kind(text)
