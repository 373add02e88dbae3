"""The configuration is formatted, valid against the provider's schema, and says what each value is for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.terraform.conftest import Terraform

pytestmark = pytest.mark.terraform

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGURATION = REPOSITORY / "terraform"

DOCUMENT = REPOSITORY / "docs" / "aws-terraform.md"


def test_formatted(terraform: Terraform) -> None:
    completed = terraform.run("fmt", "-check", "-recursive", "-diff", cwd=CONFIGURATION, check=False)
    assert completed.returncode == 0, completed.stdout


def test_valid_against_the_provider_schema(terraform: Terraform, platform: Path) -> None:
    report = json.loads(terraform.run("validate", "-json", cwd=platform).stdout)
    assert report["valid"]
    # Deprecated arguments are warnings today and errors in the next major version of the provider.
    assert report["diagnostics"] == []


def test_only_the_aws_provider_pinned() -> None:
    """Every module declares the one provider, and nothing uses another by its prefix."""
    for versions in CONFIGURATION.rglob("versions.tf"):
        text = versions.read_text(encoding="utf-8")
        assert re.findall(r'source\s+= "([^"]+)"', text) == ["hashicorp/aws"], versions
        assert 'version = "~> 5.100"' in text, versions
    used = {
        kind.split("_", 1)[0]
        for path in CONFIGURATION.rglob("*.tf")
        for kind in re.findall(r'^(?:resource|data) "([^"]+)"', path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    }
    assert used == {"aws"}


def _blocks(kind: str, path: Path) -> list[tuple[str, str]]:
    text = path.read_text(encoding="utf-8")
    return re.findall(rf'^{kind} "([^"]+)" \{{\n(.*?)^\}}', text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "path",
    sorted([*CONFIGURATION.rglob("variables.tf"), *CONFIGURATION.rglob("outputs.tf")]),
    ids=lambda path: str(path.relative_to(CONFIGURATION)),
)
def test_variables_and_outputs_are_described_and_typed(path: Path) -> None:
    kind = path.stem.rstrip("s")
    blocks = _blocks(kind, path)
    assert blocks
    for name, body in blocks:
        assert re.search(r"^  description = ", body, re.MULTILINE), f"{kind} {name} has no description"
        if kind == "variable":
            assert re.search(r"^  type\s+= ", body, re.MULTILINE), f"variable {name} has no type"


def test_every_root_variable_that_can_be_wrong_is_validated() -> None:
    unchecked = {
        name for name, body in _blocks("variable", CONFIGURATION / "variables.tf") if "validation {" not in body
    }
    assert unchecked == set()


def test_every_parameter_is_explained_in_the_reference() -> None:
    source = (CONFIGURATION / "modules" / "postgres" / "parameters.tf").read_text(encoding="utf-8")
    parameters = set(re.findall(r'^    "([a-z_.]+)"\s+= \{ value', source, flags=re.MULTILINE))
    assert len(parameters) > 30
    explained = set(re.findall(r"^\| `([a-z_.]+)` \|", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert parameters - explained == set()


def test_every_output_is_in_the_reference() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    missing = [name for name, _ in _blocks("output", CONFIGURATION / "outputs.tf") if f"`{name}`" not in text]
    assert missing == []
