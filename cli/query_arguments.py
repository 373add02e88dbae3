"""The arguments that all questions of `atlasco query` take, and what they mean."""

import argparse
import os
import re
from pathlib import Path
from typing import Any

from atlasco.telemetry.v1 import query_pb2

from cli.argument_types import label
from runtime.config import duration

TARGET_DEFAULT = "127.0.0.1:7070"
TIERS = ("critical", "dashboard", "report", "analytics")
# A terminal is no place for a million rows; JSON lines may be.
TABLE_ROWS = 1_000


class BadArgument(Exception):
    """The command line or the environment is wrong; the text says which part."""


def add_question(
    questions: Any, name: str, text: str, ask: Any, *, is_fresh: bool = True, timeout_s: float | None = 30.0
) -> argparse.ArgumentParser:
    """Add a question: `ask` has its rows. `is_fresh`: it is asked with a freshness. `timeout_s`: the default; None: no
    limit, for one whose answer is as long as its caller reads.
    """
    parser: argparse.ArgumentParser = questions.add_parser(name, help=text, description=f"Lists {text}.")
    parser.set_defaults(ask=ask)
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help=f"at most N rows, 0: all (default: {TABLE_ROWS} in a table, all as JSON)",
    )
    patience = "for all of it (default: no limit)" if timeout_s is None else f"per request (default: {timeout_s:g})"
    parser.add_argument("--timeout", type=float, default=timeout_s, metavar="SECONDS", help=patience)
    if is_fresh:
        freshness = parser.add_argument_group("freshness")
        freshness.add_argument(
            "--freshness",
            default="critical",
            metavar="TIER|DURATION",
            help="critical, dashboard, report, analytics, or how stale answers may be: 250ms (default: critical)",
        )
        freshness.add_argument("--read-token", default="", metavar="HEX", help="see the write that returned this token")
        freshness.add_argument(
            "--allow-degraded", action="store_true", help="where nothing is fresh enough, take what there is"
        )
        freshness.add_argument("--explain", action="store_true", help="tell on stderr where answers came from, and why")
    gateway = parser.add_argument_group("gateway")
    gateway.add_argument(
        "--target",
        default=os.environ.get("ATLASCO_TARGET") or TARGET_DEFAULT,
        metavar="HOST:PORT",
        help=f"[ATLASCO_TARGET; default: {TARGET_DEFAULT}]",
    )
    gateway.add_argument(
        "--tenant",
        default=os.environ.get("ATLASCO_TENANT") or None,
        metavar="NAME",
        help="who asks, in development mode [ATLASCO_TENANT]",
    )
    for flag, what in (
        ("--ca", "certificates of the authority that signed the gateway's"),
        ("--cert", "certificate of a service identity"),
        ("--key", "its private key"),
    ):
        gateway.add_argument(flag, type=Path, metavar="FILE", help=f"PEM: {what}")
    return parser


def take_relative_times(parser: argparse.ArgumentParser) -> None:
    """Have a question take `-1h` for a value."""
    # argparse takes it for a flag; it does not what looks like a negative number, so that is what it is told.
    parser._negative_number_matcher = re.compile(r"^-[0-9]+[a-z]*$")


def limit_of(arguments: argparse.Namespace) -> int:
    """The most rows to show; 0: all.

    Raises:
        BadArgument: it is negative.
    """
    if arguments.limit is None:
        return 0 if arguments.json else TABLE_ROWS
    if arguments.limit < 0:
        raise BadArgument(f"--limit {arguments.limit} must be 0 or more")
    return int(arguments.limit)


def freshness_of(arguments: argparse.Namespace) -> query_pb2.Freshness | None:
    """What the arguments ask for; None for a question without freshness.

    Raises:
        BadArgument: the freshness or the token is none.
    """
    if not hasattr(arguments, "freshness"):
        return None
    freshness = query_pb2.Freshness(explain=arguments.explain, allow_degraded=arguments.allow_degraded)
    if arguments.freshness.lower() in TIERS:
        freshness.tier = query_pb2.Tier.Value(f"TIER_{arguments.freshness.upper()}")
    else:
        try:
            freshness.max_staleness_us = round(duration(arguments.freshness) * 1e6)
        except ValueError:
            raise BadArgument(
                f"--freshness {arguments.freshness!r} is neither one of {', '.join(TIERS)} nor a duration such as 250ms"
            ) from None
    try:
        freshness.read_token = bytes.fromhex(arguments.read_token)
    except ValueError:
        raise BadArgument(f"--read-token {arguments.read_token!r} is not hexadecimal") from None
    return freshness


def add_labels(parser: argparse.ArgumentParser) -> None:
    """Add --label: pairs of key and value that devices must have."""
    text = "only devices with this label; repeatable"
    parser.add_argument("--label", action="append", default=[], type=label, metavar="KEY=VALUE", help=text)
