"""Plans of both environments with a mocked provider: the assertions are in terraform/tests/*.tftest.hcl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.terraform.conftest import Terraform

pytestmark = pytest.mark.terraform


@pytest.mark.parametrize("environment", ["dev", "prod"])
@pytest.mark.parametrize("suite", ["", "validation_"], ids=["is_what_it_must_be", "refuses_wrong_values"])
def test_environment(terraform: Terraform, platform: Path, environment: str, suite: str) -> None:
    file = f"tests/{suite}{environment}.tftest.hcl"
    completed = terraform.run(
        "test", "-json", f"-var-file={environment}.tfvars", f"-filter={file}", cwd=platform, check=False
    )
    events = [json.loads(line) for line in completed.stdout.splitlines() if line.startswith("{")]
    problems = [
        f"{event.get('@testrun', '')}: {event['diagnostic']['summary']}: {event['diagnostic']['detail']}"
        for event in events
        if event["type"] == "diagnostic" and event["diagnostic"]["severity"] == "error"
    ]
    summaries = [event["test_summary"] for event in events if event["type"] == "test_summary"]
    assert completed.returncode == 0, "\n".join(problems) or completed.stderr
    assert len(summaries) == 1
    # A run that was skipped has asserted nothing.
    assert summaries[0]["status"] == "pass"
    assert summaries[0]["failed"] == summaries[0]["errored"] == summaries[0]["skipped"] == 0
    declared = (platform / file).read_text(encoding="utf-8").count('\nrun "')
    assert summaries[0]["passed"] == declared > 0
