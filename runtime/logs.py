"""Structured logs: one event, one line, on standard error.

Code logs with the standard library and puts what varies into `extra`, never into the message:

    log.warning("batch retried", extra={"lane": 3, "attempt": 2, "sqlstate": "40001"})

For machines a line is a JSON object (time, level, logger, message, the extra fields, exception); for
people at a terminal it is aligned text. A text that came from a client cannot forge a line in either
form.
"""

import json
import logging
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TextIO

from runtime.config import choice, setting

LEVELS = ("debug", "info", "warning", "error")

# What logging itself puts on every record; whatever else is there came in by `extra`.
_OWN_ATTRIBUTES = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
_OWN_KEYS = frozenset({"time", "level", "logger", "message", "exception"})


@dataclass(frozen=True)
class LogConfig:
    """Logs."""

    format: str = setting(
        "ATLASCO_LOG_FORMAT",
        "auto",
        "Form of the log lines; auto is text at a terminal, json elsewhere.",
        parse=choice("auto", "json", "text"),
    )
    level: str = setting("ATLASCO_LOG_LEVEL", "info", "Least severe level that is logged.", parse=choice(*LEVELS))


def configure_logs(config: LogConfig, stream: TextIO | None = None) -> None:
    """Send the process's logs, and Python warnings, to `stream` (standard error by default).

    Replaces whatever handlers the root logger had; calling it again with another configuration is fine.
    """
    target = sys.stderr if stream is None else stream
    text = config.format == "text" or (config.format == "auto" and target.isatty())
    handler = logging.StreamHandler(target)
    handler.setFormatter(TextFormatter() if text else JsonFormatter())
    logging.basicConfig(handlers=[handler], level=config.level.upper(), force=True)
    logging.captureWarnings(True)


def extra_fields(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller passed as `extra`."""
    return {key: value for key, value in record.__dict__.items() if key not in _OWN_ATTRIBUTES}


class JsonFormatter(logging.Formatter):
    """One JSON object a line; ASCII only, so that no collector's decoder can stumble over it."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON. Never raises on account of a field's value."""
        event: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for key, value in extra_fields(record).items():
            event[f"field_{key}" if key in _OWN_KEYS else key] = _plain(value)
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            event["exception"] = {
                "type": type(error).__qualname__,
                "message": str(error),
                "stack": "".join(traceback.format_exception(error)),
            }
        return json.dumps(event, separators=(",", ":"))


class TextFormatter(logging.Formatter):
    """Time, level, logger, message and fields for a person; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        line = f"{_time(record)} {record.levelname:<7} {record.name}: {_printable(record.getMessage())}"
        for key, value in extra_fields(record).items():
            line += f" {key}={_printable(str(_plain(value)))}"
        if record.exc_info and record.exc_info[1] is not None:
            line += "\n" + "".join(traceback.format_exception(record.exc_info[1])).rstrip()
        return line


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds")[:-6] + "Z"


def _plain(value: Any) -> Any:
    """A value that JSON has; everything else as its text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        # NaN and Infinity are no JSON: one such field would make the whole line unreadable.
        return value if value - value == 0 else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)


def _printable(text: str) -> str:
    """The text with control characters escaped: a device's name must not begin a line of its own."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
