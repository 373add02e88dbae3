"""A gateway as a process of its own, without the other commands: `python -m bench.gateway_process`."""

import argparse
import sys

from cli import serve


def main() -> int:
    """Serve with the settings of the environment."""
    parser = argparse.ArgumentParser(prog="gateway")
    serve.add_parser(parser.add_subparsers())
    return serve.run(parser.parse_args(["serve"]))


if __name__ == "__main__":
    sys.exit(main())
