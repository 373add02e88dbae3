"""The `atlasco` console script: one command, one subcommand per job.

Each subcommand lives in a module of this package that offers `add_parser(subparsers)`; the parser it adds sets
`run`, a function from the parsed arguments to an exit code.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = (
    "demo",
    "serve",
    "migrate",
    "maintain",
    "relay",
    "load",
    "warehouse",
    "rebuild",
    "verify",
    "rollup",
    "projection",
    "device",
    "tenant",
    "simulate",
    "replay",
    "query",
    "pki",
)

EPILOG = """\
exit codes:
  0  done
  1  the work failed; the last line on standard error says why
  2  the arguments or the configuration are wrong; the message names the flag or the variable
  3  a database, broker or gateway could not be reached
  130  interrupted

start here:
  make demo                                   everything on this machine, with simulated devices
  atlasco serve --help                        a gateway on your own database
  atlasco replay data.csv --device-column id  your own file, as devices would send it
"""


def build_parser(commands: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser of the command line, with these subcommands."""
    parser = argparse.ArgumentParser(
        prog="atlasco",
        description="AtlasCo Telemetry Platform: device streams into typed, partitioned PostgreSQL, exactly once.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in commands:
        importlib.import_module(f"cli.{name}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    # A command imports what it needs and nothing else: some of it takes a second to load.
    named = [word for word in words[:1] if word in COMMANDS]
    arguments = build_parser(named or COMMANDS).parse_args(words)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
