"""SQL in files: every statement has one name, and the server can parse it."""

from importlib import resources
from pathlib import Path

import pytest

from storage.statements import statements

FILES = sorted(
    entry.name
    for entry in resources.files("storage").joinpath("sql").iterdir()
    if entry.name.endswith(".sql") and "-- name: " in entry.read_text("utf-8")
)


def test_the_files_are_found() -> None:
    assert {"ingest.sql", "registry.sql", "quarantine.sql"} <= set(FILES)
    assert "schema.sql" not in FILES


@pytest.mark.parametrize("file", FILES)
def test_every_statement_has_a_name_and_a_body(file: str) -> None:
    found = statements(file)
    assert found
    for name, text in found.items():
        body = [line for line in text.splitlines() if line and not line.startswith("--")]
        assert body, f"{file}: {name} is empty"
    with pytest.raises(TypeError):
        found["new"] = "SELECT 1"  # type: ignore[index]


def test_a_name_that_occurs_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sql").mkdir()
    (tmp_path / "sql" / "twice.sql").write_text("-- name: one\nSELECT 1\n-- name: one\nSELECT 2\n")
    (tmp_path / "sql" / "good.sql").write_text(
        "-- A heading.\n\n-- name: one\n-- Why.\nSELECT 1\n\n-- name: two\nSELECT 2\n"
    )
    monkeypatch.setattr(resources, "files", lambda _: tmp_path)
    with pytest.raises(ValueError, match="twice"):
        statements.__wrapped__("twice.sql")
    assert dict(statements.__wrapped__("good.sql")) == {"one": "-- Why.\nSELECT 1", "two": "SELECT 2"}
