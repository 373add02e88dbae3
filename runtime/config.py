"""Configuration: frozen dataclasses filled from flags, environment and defaults, checked once at the edge.

A process declares its settings as fields of a frozen dataclass:

    @dataclass(frozen=True)
    class GatewayConfig:
        listen: Address = setting("ATLASCO_LISTEN", LOOPBACK, "Where devices connect.", parse=address)
        dsn: str = setting("ATLASCO_DSN", REQUIRED, "The database.", secret=True)

`add_settings` turns each field into a flag (ATLASCO_LISTEN is `--listen`), `load_settings` builds the
dataclass. A flag wins over the environment, the environment over the default. A variable that is set but
empty counts as not set: that is how manifests and compose files say "leave it alone". Units: durations
are float seconds, sizes are int bytes, everywhere.
"""

import argparse
import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

T = TypeVar("T")

_METADATA_KEY = "atlasco.setting"
_PREFIX = "ATLASCO_"


class ConfigError(Exception):
    """The configuration cannot be used.

    The text lists every problem, one a line, and never holds a secret.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems: tuple[str, ...] = tuple(problems)
        super().__init__("\n".join(self.problems))


class _Required:
    """The type of `REQUIRED`."""

    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Final = _Required()
"""As a setting's default: the setting has none and must be given."""


@dataclass(frozen=True)
class Address:
    """A host (name, IPv4 or IPv6 address, without brackets) and a TCP port; port 0 asks for any free
    one.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Kind(Generic[T]):
    """What a setting may be: how its text is read, what is allowed (for people), how a value is written
    back.

    Calling it parses a text; raises ValueError when the text is not allowed.
    """

    read: Callable[[str], T]
    allowed: str
    write: Callable[[T], str] = str
    metavar: str = "TEXT"

    def __call__(self, text: str) -> T:
        """Parse `text`; raises ValueError."""
        return self.read(text)


@dataclass(frozen=True)
class Setting:
    """One field of a configuration: the variable it comes from, its default and its meaning."""

    env: str
    default: Any
    help: str
    parse: Callable[[str], Any]
    secret: bool

    @property
    def flag(self) -> str:
        """The flag derived from the variable: ATLASCO_LOG_LEVEL is --log-level."""
        return "--" + self.env.removeprefix(_PREFIX).lower().replace("_", "-")

    @property
    def dest(self) -> str:
        """Where argparse keeps the flag's value."""
        return "setting_" + self.env

    @property
    def allowed(self) -> str:
        """What values may be, for people."""
        return self.parse.allowed if isinstance(self.parse, Kind) else "text"

    @property
    def default_text(self) -> str:
        """The default as one would write it, for help and documentation."""
        if self.default is REQUIRED:
            return "required"
        if self.default is None or self.default == "":
            return "not set"
        if self.secret:
            return "(secret)"
        return self.parse.write(self.default) if isinstance(self.parse, Kind) else str(self.default)


def setting(
    env: str,
    default: Any,
    help: str,  # noqa: A002 - the word argparse uses for it
    *,
    parse: Callable[[str], Any] = str,
    secret: bool = False,
) -> Any:
    """A dataclass field that `load_settings` fills; see the module's text.

    `parse` reads the text of the flag or variable and raises ValueError when it is not allowed; use a
    `Kind` so that messages can say what is. A `secret` never appears in messages, help or the dataclass's
    repr. With REQUIRED the field has no default, neither here nor in the dataclass's constructor.
    """
    if not re.fullmatch(r"[A-Z][A-Z0-9_]*", env):
        raise ValueError(f"{env!r} is not a name for an environment variable")
    metadata = {_METADATA_KEY: Setting(env=env, default=default, help=help, parse=parse, secret=secret)}
    # Keyword-only, so that a required setting may follow one with a default.
    if default is REQUIRED:
        return dataclasses.field(repr=not secret, kw_only=True, metadata=metadata)
    return dataclasses.field(default=default, repr=not secret, kw_only=True, metadata=metadata)


def settings_of(config_type: type[Any]) -> dict[str, Setting]:
    """The settings of a configuration dataclass by field name, in the order declared."""
    return {
        field.name: field.metadata[_METADATA_KEY]
        for field in dataclasses.fields(config_type)
        if _METADATA_KEY in field.metadata
    }


def add_settings(parser: argparse.ArgumentParser, config_type: type[Any]) -> None:
    """Add one flag for each setting of `config_type`.

    A setting that another configuration of the same process already added to `parser` is shared, not
    added twice.
    """
    title = (config_type.__doc__ or config_type.__name__).strip().splitlines()[0].rstrip(".")
    if title.startswith(f"{config_type.__name__}("):  # the signature that @dataclass writes as a docstring
        title = config_type.__name__
    group = parser.add_argument_group(title)
    for entry in settings_of(config_type).values():
        if parser.get_default(entry.dest) is argparse.SUPPRESS:
            continue
        text = f"{entry.help.rstrip('.')}. [{entry.env}; default: {entry.default_text}]"
        if entry.secret:
            text = f"{text} Prefer the variable: a command line can be read by other users."
        text = text.replace("%", "%%")
        if entry.parse is boolean:
            group.add_argument(
                entry.flag,
                dest=entry.dest,
                default=argparse.SUPPRESS,
                action=argparse.BooleanOptionalAction,
                help=text,
            )
        else:
            metavar = entry.parse.metavar if isinstance(entry.parse, Kind) else "TEXT"
            group.add_argument(entry.flag, dest=entry.dest, default=argparse.SUPPRESS, metavar=metavar, help=text)


def load_settings(config_type: type[T], args: argparse.Namespace, environ: Mapping[str, str] | None = None) -> T:
    """Build `config_type` from flags, then `environ` (the process's own by default), then defaults.

    Raises ConfigError with every problem found, among them a ValueError of the dataclass's own
    __post_init__.
    """
    environment = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name, entry in settings_of(config_type).items():
        given = getattr(args, entry.dest, None)
        source = entry.flag
        if given is None:
            given = environment.get(entry.env) or None
            source = entry.env
        if given is None:
            if entry.default is REQUIRED:
                problems.append(f"{entry.env} (or {entry.flag}) must be set: {entry.help}")
            continue
        if isinstance(given, bool):
            values[name] = given
            continue
        try:
            values[name] = entry.parse(given)
        except ValueError as error:
            problems.append(_problem(entry, source, given, error))
    if problems:
        raise ConfigError(problems)
    try:
        return config_type(**values)
    except ValueError as error:
        raise ConfigError([str(error)]) from error


def _problem(entry: Setting, source: str, given: str, error: ValueError) -> str:
    shown = "the value given" if entry.secret else repr(given)
    if isinstance(entry.parse, Kind):
        return f"{source}: {shown} is not allowed; it must be {entry.allowed}"
    # A foreign parser's message tends to quote its input.
    return f"{source}: {shown} is not allowed" + ("" if entry.secret else f": {error}")


def describe_settings(config_types: Iterable[type[Any]]) -> str:
    """The settings of the given configurations as one Markdown table, a shared setting once."""
    lines = ["| Variable | Flag | Default | Allowed | Meaning |", "| --- | --- | --- | --- | --- |"]
    seen: set[str] = set()
    for config_type in config_types:
        for entry in settings_of(config_type).values():
            if entry.env in seen:
                continue
            seen.add(entry.env)
            words = entry.default_text
            default = words if words in ("required", "not set", "(secret)") else f"`{words}`"
            cells = (f"`{entry.env}`", f"`{entry.flag}`", default, entry.allowed, entry.help)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _read_address(text: str) -> Address:
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%a-z]+)\]|([^\s:\[\]/]+)):([0-9]{1,5})", text.strip())
    if match is None or int(match[3]) > 65535:
        raise ValueError("not host:port")
    return Address(match[1] or match[2], int(match[3]))


def _read_boolean(text: str) -> bool:
    word = text.strip().lower()
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0"):
        return False
    raise ValueError("not a boolean")


def _read_integer(text: str, minimum: int) -> int:
    # int() would take "1_000", "٣" and surrounding blanks in the middle of a manifest as a surprise.
    if not re.fullmatch(r"[+-]?[0-9]{1,19}", text.strip(), re.ASCII):
        raise ValueError("not an integer")
    value = int(text)
    if value < minimum:
        raise ValueError(f"less than {minimum}")
    return value


_DURATION_UNITS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _read_duration(text: str) -> float:
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)(us|ms|s|m|h|d)", text.strip(), re.ASCII)
    if match is None:
        if re.fullmatch(r"0+", text.strip(), re.ASCII):
            return 0.0
        raise ValueError("not a duration")
    # Divided, not multiplied, below a second: 250 / 1000 is exactly the float written as 0.25.
    number, unit = float(match[1]), _DURATION_UNITS[match[2]]
    return number / round(1 / unit) if unit < 1 else number * unit


def _write_duration(seconds: float) -> str:
    if seconds == 0:
        return "0s"
    if math.isfinite(seconds):
        for unit in ("d", "h", "m", "s", "ms", "us"):
            size = _DURATION_UNITS[unit]
            count = round(seconds * round(1 / size)) if size < 1 else round(seconds / size)
            if count >= 1 and math.isclose(count * size, seconds, rel_tol=1e-12):
                return f"{count}{unit}"
    return f"{seconds}s"


_SIZE_UNITS: Final = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}


def _read_size(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,15})\s?([kMGT]?B|[KMGT]iB)?", text.strip(), re.ASCII)
    if match is None:
        raise ValueError("not a size")
    return int(match[1]) * _SIZE_UNITS[match[2] or "B"]


def _write_size(size: int) -> str:
    for unit in ("TiB", "GiB", "MiB", "KiB", "TB", "GB", "MB", "kB"):
        if size and size % _SIZE_UNITS[unit] == 0:
            return f"{size // _SIZE_UNITS[unit]}{unit}"
    return f"{size}B"


def _write_boolean(value: bool) -> str:
    return "true" if value else "false"


def _read_optional_path(text: str) -> Path | None:
    return Path(text).expanduser() if text else None


address: Final = Kind(_read_address, "host:port, an IPv6 host in brackets, port 0 to 65535", metavar="HOST:PORT")
"""Reads "127.0.0.1:7070" or "[::1]:7070" into an Address."""

boolean: Final = Kind(_read_boolean, "true or false", _write_boolean, "BOOL")
"""Reads true/false, yes/no, on/off, 1/0. As a flag: --name and --no-name."""

positive_int: Final = Kind(lambda text: _read_integer(text, 1), "an integer, 1 or more", metavar="N")
"""Reads an integer of 1 or more."""

non_negative_int: Final = Kind(lambda text: _read_integer(text, 0), "an integer, 0 or more", metavar="N")
"""Reads an integer of 0 or more."""

duration: Final = Kind(
    _read_duration,
    "a duration: a number with us, ms, s, m, h or d, such as 250ms",
    _write_duration,
    "DURATION",
)
"""Reads "250ms", "30s", "5m", "7d" into float seconds. Zero or more; a bare number other than 0 is
refused, for nobody can tell its unit."""

byte_size: Final = Kind(_read_size, "a size: bytes, or a number with kB, MB, KiB, MiB, GiB …", _write_size, "SIZE")
"""Reads "64MiB", "10MB" or "4096" into int bytes."""

optional_path: Final = Kind(_read_optional_path, "a path", metavar="PATH")
"""Reads a path, with ~ expanded; an empty text is None."""


def choice(*words: str) -> Kind[str]:
    """A setting that is one of `words`."""

    def read(text: str) -> str:
        if text not in words:
            raise ValueError("not a choice")
        return text

    return Kind(read, "one of " + ", ".join(words), metavar="|".join(words))
