"""Generates the Python modules of the protocol beside their .proto files: `python protos/generate.py [DIR]`.

The result is committed, so that installing the project needs no compiler; a test generates it again into a
scratch directory and compares.
"""

import sys
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent


def generate(target: Path) -> None:
    """Write the message modules, the gRPC modules and their type stubs below `target`.

    Raises:
        SystemExit: protoc refused a file; it has printed why.
    """
    sources = sorted(ROOT.rglob("*.proto"))
    services = [path for path in sources if "\nservice " in path.read_text()]
    for outputs, paths in (
        (("python_out", "mypy_out"), sources),
        (("grpc_python_out", "mypy_grpc_out"), services),
    ):
        arguments = [
            "protoc",
            f"--proto_path={ROOT}",
            f"--proto_path={Path(grpc_tools.__file__).parent / '_proto'}",
            *(f"--{output}={target}" for output in outputs),
            *(str(path.relative_to(ROOT)) for path in paths),
        ]
        if code := protoc.main(arguments):
            raise SystemExit(code)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
