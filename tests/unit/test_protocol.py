"""The protocol's files: generated code is up to date, the linter has no complaint, enumerations agree."""

import os
import re
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from atlasco.telemetry.v1 import ingest_pb2

from gateway import status
from storage.model import Reason, ValueType
from storage.outbox import WIRE_TYPES

ROOT = Path(__file__).resolve().parents[2]
PROTOS = ROOT / "protos"
BUF = ROOT / "node_modules" / ".bin" / "buf"


def test_generated_modules_regenerate_unchanged(tmp_path: Path) -> None:
    # The generator finds its plugins on the path; in a virtual environment they stand beside the interpreter.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        [sys.executable, PROTOS / "generate.py", tmp_path],
        env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*_pb2*.py*") if path.is_file()}
    committed = {
        path.relative_to(PROTOS): path.read_text()
        for path in PROTOS.rglob("*_pb2*.py*")
        if "__pycache__" not in path.parts
    }
    assert made.keys() == committed.keys(), "run `make protos`"
    assert [str(name) for name in made if made[name] != committed[name]] == [], "run `make protos`"


def test_the_linter_has_no_complaint() -> None:
    if not BUF.exists():
        text = "buf is not installed: run `npm install`"
        if os.environ.get("CI") == "true":
            pytest.fail(text)
        pytest.skip(text)
    done = subprocess.run([BUF, "lint"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_reasons_of_rejections_are_the_protocols() -> None:
    wire = {
        name.removeprefix("REJECTION_REASON_"): number
        for name, number in ingest_pb2.RejectionReason.items()
        if number != ingest_pb2.REJECTION_REASON_UNSPECIFIED
    }
    assert {reason.name: reason.value for reason in Reason} == wire


_STATUS_LINE = re.compile(r"^//   ([A-Z_]+) +([A-Z_]+(?:, [A-Z_]+)*)\b", re.MULTILINE)

# Reasons that the specification covers by their status alone: clients act on that.
BY_STATUS_ALONE = {
    "IDENTITY_MISSING",
    "IDENTITY_AMBIGUOUS",
    "IDENTITY_MALFORMED",
    "TRUST_DOMAIN_FOREIGN",
    "CREDENTIAL_EXPIRED",
    "CREDENTIAL_REVOKED",
    "GATEWAY_STOPPING",
    "OVERLOADED",
    "INTERNAL",
}


def specified(file: str) -> list[tuple[str, str]]:
    """Status and reason of every line in a file's table of errors."""
    text = (PROTOS / "atlasco" / "telemetry" / "v1" / file).read_text("utf-8")
    return [
        (code, reason)
        for code, reasons in _STATUS_LINE.findall(text)
        if code in grpc.StatusCode.__members__
        for reason in reasons.split(", ")
    ]


@pytest.mark.parametrize("file", ["ingest.proto", "query.proto"])
def test_reasons_end_calls_with_the_status_that_is_specified(file: str) -> None:
    table = specified(file)
    assert len(table) > 10
    codes = {reason.name: code.name for reason, code in status.CODES.items()}
    assert [(code, reason) for code, reason in table if codes.get(reason) != code] == []


def test_every_reason_has_a_status_and_a_word_in_the_specification() -> None:
    assert set(status.CODES) == set(status.Reason)
    assert all(reason.name == reason.value for reason in status.Reason)
    words = {
        word
        for path in PROTOS.rglob("*.proto")
        for word in re.findall(r"\b[A-Z]+(?:_[A-Z]+)*\b", path.read_text("utf-8"))
    }
    assert {reason.value for reason in status.Reason} - words - BY_STATUS_ALONE == set()


def test_every_type_of_a_value_has_one_on_the_wire() -> None:
    assert set(WIRE_TYPES) == set(ValueType)
    assert len(set(WIRE_TYPES.values())) == len(WIRE_TYPES)
