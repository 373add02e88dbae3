"""Log lines: whole in JSON, readable in text, never forged by what a client sent."""

import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.logs import JsonFormatter, LogConfig, TextFormatter, configure_logs


@pytest.fixture(autouse=True)
def root_logger_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def one_event(stream: io.StringIO) -> dict[str, Any]:
    (line,) = stream.getvalue().splitlines()
    event = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert isinstance(event, dict)
    return event


def test_json_has_message_and_fields() -> None:
    stream = io.StringIO()
    configure_logs(LogConfig(), stream)
    logging.getLogger("gateway.batch").warning("batch retried", extra={"lane": 3, "rate": float("nan")})
    event = one_event(stream)
    assert event["level"] == "warning"
    assert event["logger"] == "gateway.batch"
    assert event["message"] == "batch retried"
    assert event["lane"] == 3
    assert event["rate"] == "nan"
    assert event["time"].endswith("Z")


def test_an_exception_stays_on_its_line() -> None:
    stream = io.StringIO()
    configure_logs(LogConfig(format="json"), stream)
    try:
        raise ValueError("no\nline")
    except ValueError:
        logging.getLogger("x").exception("failed")
    event = one_event(stream)
    assert event["exception"]["type"] == "ValueError"
    assert "test_logs.py" in event["exception"]["stack"]


def test_a_field_cannot_replace_the_lines_own() -> None:
    stream = io.StringIO()
    configure_logs(LogConfig(), stream)
    logging.getLogger("x").info("hello", extra={"level": "none", "time": 1})
    event = one_event(stream)
    assert event["level"] == "info"
    assert event["field_level"] == "none"


@pytest.mark.parametrize(
    ("stream", "form", "is_text"),
    [
        pytest.param(Terminal(), "auto", True, id="terminal"),
        pytest.param(io.StringIO(), "auto", False, id="pipe"),
        pytest.param(io.StringIO(), "text", True, id="forced-text"),
        pytest.param(Terminal(), "json", False, id="forced-json"),
    ],
)
def test_auto_is_text_at_a_terminal(stream: io.StringIO, form: str, is_text: bool) -> None:
    configure_logs(LogConfig(format=form), stream)
    logging.getLogger("x").error("hello", extra={"lane": 1})
    assert stream.getvalue().startswith("{") is not is_text
    assert ("lane=1" in stream.getvalue()) is is_text


def test_level_and_warnings() -> None:
    stream = io.StringIO()
    configure_logs(LogConfig(level="warning"), stream)
    logging.getLogger("x").info("quiet")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert "DeprecationWarning" in one_event(stream)["message"]


@given(st.text(max_size=30), st.text(max_size=30))
def test_no_text_begins_a_second_line(message: str, field: str) -> None:
    record = logging.makeLogRecord({"msg": "%s", "args": (message,), "device": field})
    for formatter in (JsonFormatter(), TextFormatter()):
        line = formatter.format(record)
        assert len(line.splitlines()) == 1
        assert line.isprintable()
    parsed = json.loads(JsonFormatter().format(record))
    assert (parsed["message"], parsed["device"]) == (message, field)


def test_a_traceback_follows_in_text() -> None:
    try:
        raise ValueError("no")
    except ValueError:
        record = logging.makeLogRecord({"msg": "failed", "exc_info": sys.exc_info()})
    assert TextFormatter().format(record).endswith("ValueError: no")
