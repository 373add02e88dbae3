"""Imports go one way, so that a part can be read, tested and replaced without what stands above it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What each package may import of the others; a package that is not here has not been thought about.
MAY_IMPORT: dict[str, set[str]] = {
    "runtime": set(),
    "embedded": set(),
    "storage": {"runtime"},
    "router": {"storage", "runtime"},
    "gateway": {"router", "storage", "runtime"},
    "device": {"runtime"},
    "demo": {"gateway", "router", "storage", "device", "embedded", "runtime"},
    "cli": {"gateway", "router", "storage", "device", "embedded", "demo", "runtime"},
    "bench": {"gateway", "router", "storage", "device", "embedded", "demo", "cli", "runtime"},
}
PACKAGES = [name for name in MAY_IMPORT if (ROOT / name).is_dir()]
OURS = {*MAY_IMPORT, "tests"}


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of every module that is imported anywhere in a file, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def violations(package: str, source: str) -> list[str]:
    found = []
    for line, name in imported(ast.parse(source)):
        top = name.split(".")[0]
        if name.startswith("."):
            found.append(f"{line}: {name} is relative: say where it comes from")
        elif top in OURS and top not in {package, *MAY_IMPORT[package]}:
            found.append(f"{line}: {package} must not import {name}")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_is_below_it(package: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{problem}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for problem in violations(package, path.read_text("utf-8"))
    ]
    assert found == []


def test_every_package_has_a_place() -> None:
    there = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "build", "dist"}
    assert there <= set(MAY_IMPORT)


def test_the_rules_have_no_circle() -> None:
    done: set[str] = set()
    while ready := {name for name, below in MAY_IMPORT.items() if name not in done and below <= done}:
        done |= ready
    assert done == set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("package", "source", "allowed"),
    [
        ("storage", "from gateway.batch import Committer", False),
        ("storage", "def f():\n    import gateway.lanes", False),
        ("device", "from storage.model import Reason", False),
        ("embedded", "from runtime.config import setting", False),
        ("runtime", "import storage", False),
        ("gateway", "from tests.storage.conftest import Database", False),
        ("gateway", "from . import batch", False),
        ("gateway", "from storage.model import Reason\nimport runtime.metrics\nimport numpy", True),
        ("runtime", "import runtimes", True),
    ],
)
def test_the_check_itself(package: str, source: str, allowed: bool) -> None:
    assert (violations(package, source) == []) is allowed
