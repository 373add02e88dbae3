"""checkov finds nothing that is not skipped with a reason beside the resource."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGURATION = REPOSITORY / "terraform"
CHECKOV = REPOSITORY / ".venv-checkov" / "bin" / "checkov"
INSTALL = "terraform/checks/install-checkov.sh"

SKIP = re.compile(r"#checkov:skip=(CKV2?_[A-Z]+_\d+)(?::(.*))?$", re.MULTILINE)


def test_nothing_found() -> None:
    if not CHECKOV.exists():
        message = f"checkov is not installed; run {INSTALL}"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    completed = subprocess.run(
        [
            str(CHECKOV),
            "--directory",
            str(CONFIGURATION),
            "--framework",
            "terraform",
            "--skip-path",
            "tests",
            "--output",
            "json",
            "--quiet",
            "--compact",
            # The scan is offline: no rules and no texts are fetched.
            "--skip-download",
            "--download-external-modules",
            "false",
        ],
        cwd=CONFIGURATION,
        env={name: value for name, value in os.environ.items() if name in {"PATH", "HOME", "TMPDIR", "LANG"}},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    report = json.loads(completed.stdout)
    failed = [
        f"{check['check_id']} {check['resource']} ({check['file_path']}): {check['check_name']}"
        for check in report["results"]["failed_checks"]
    ]
    assert failed == []
    # A scan that parsed nothing would also find nothing.
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["resource_count"] > 100


def test_every_skip_has_a_reason() -> None:
    skips = {
        f"{path.name}:{check}": (reason or "").strip()
        for path in CONFIGURATION.rglob("*.tf")
        for check, reason in SKIP.findall(path.read_text(encoding="utf-8"))
    }
    assert skips
    assert [skip for skip, reason in skips.items() if len(reason) < 40] == []
