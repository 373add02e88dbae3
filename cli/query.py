"""`atlasco query`: latest values, series, aggregates, searches and freshness, as a table or as JSON lines."""

import argparse
import os
import sys
from typing import Any

import grpc

from cli import query_find, query_read
from cli.query_arguments import BadArgument, limit_of
from cli.query_gateway import HINTS, Gateway, failure, open_channel
from cli.query_print import print_rows
from cli.query_read import NotFound, Truncated

EXAMPLES = """\
examples:
  atlasco query devices --type pump --label site=berlin
  atlasco query latest pump-7 pump-8 --attribute temperature
  atlasco query series pump-7 --attribute temperature --start -1h --end now
  atlasco query series pump-7 --attribute temperature --start 2026-01-01 --end 2026-02-01T12:00:00Z --json
  atlasco query latest pump-7 --freshness dashboard --explain
  atlasco query export pump-7 --attribute temperature --start -90d --freshness analytics --json > readings.jsonl
  atlasco query find 'temperature > 80 and status = "active"' --attribute temperature
  atlasco query aggregate temperature --type pump --bucket 1h --time-zone Europe/Berlin --start -7d --by device
  atlasco query freshness

Without --ca the connection is plaintext, for a gateway in development mode on this machine: name the tenant with
--tenant. With --ca, --cert and --key the certificate says who asks.
"""


def add_parser(subparsers: Any) -> None:
    """Add `atlasco query` and its questions."""
    parser = subparsers.add_parser(
        "query",
        help="read telemetry back",
        description="Reads telemetry from a gateway: pages through everything by itself.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    questions = parser.add_subparsers(title="questions", metavar="QUESTION", required=True)
    query_read.add_questions(questions)
    query_find.add_questions(questions)
    query_read.add_freshness(questions)


def run(arguments: argparse.Namespace) -> int:
    """Ask and print; returns the exit code."""
    try:
        with open_channel(arguments) as channel:
            rows = arguments.ask(Gateway(channel, arguments), arguments)
            print_rows(rows, limit_of(arguments), as_json=arguments.json)
    except BadArgument as error:
        return _fail(str(error), 2)
    except Truncated:
        return _fail("the export ended early: what was shown is not the whole", 1)
    except NotFound as error:
        return _fail(f"ENTITY_NOT_FOUND: the tenant has no device named {error} ({HINTS['ENTITY_NOT_FOUND']})", 1)
    except grpc.RpcError as error:
        return _fail(*failure(error, arguments.target))
    except BrokenPipeError:
        # The reader, such as head, has seen enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _fail(text: str, code: int) -> int:
    # One line, whatever the other side wrote.
    print("atlasco query: " + " ".join(text.split()), file=sys.stderr)
    return code
