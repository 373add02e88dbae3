"""What the guides tell an operator to type exists: commands and their flags, Terraform's names, files, sections."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.main import COMMANDS, build_parser
from tests.k8s.manifests import REPOSITORY

DOCS = REPOSITORY / "docs"
TERRAFORM = REPOSITORY / "terraform"
PAGES = sorted(DOCS.rglob("*.md"))
GUIDES = [DOCS / f"{name}.md" for name in ("deploy-aws", "operations", "production-readiness", "sizing")]

FENCE = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
# Not the namespace, the database or the user of that name.
COMMAND = re.compile(r"(?<![\w/.:-])(?<!-n )(?<!namespace )(?<!DATABASE )(?<!SCHEMA )atlasco +([a-z][^|;&#)\"]*)")


def code(page: Path) -> Iterator[str]:
    """The code of a page, a logical line each."""
    text = page.read_text(encoding="utf-8")
    for block in FENCE.findall(text):
        yield from re.sub(r"\\\n\s*", " ", block).splitlines()
    yield from (" ".join(span.split()) for span in SPAN.findall(FENCE.sub("", text)))


def commands(page: Path) -> list[str]:
    return [found.strip() for line in code(page) for found in COMMAND.findall(line)]


def problem(parser: argparse.ArgumentParser, words: list[str]) -> str | None:
    """What is wrong with a command line; None when it could be typed."""
    options: set[str] = set()
    while True:
        options |= {option for action in parser._actions for option in action.option_strings}
        choices = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not choices or not words or words[0].startswith("-"):
            break
        if words[0] not in choices[0]:
            return f"there is no {parser.prog} {words[0]}"
        parser, words = choices[0][words[0]], words[1:]
    for word in words:
        flag = word.partition("=")[0].rstrip(",.")
        if flag.startswith("--") and flag != "--" and flag not in options:
            return f"{parser.prog} has no {flag}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_exists(page: Path) -> None:
    parser = build_parser()
    problems = {
        line: wrong
        for line in commands(page)
        # A word that is no command, in running text such as "atlasco tables", is caught too.
        if (wrong := problem(parser, line.split()))
    }
    assert problems == {}


def test_the_guides_are_read() -> None:
    found = {line.split()[0] for page in PAGES for line in commands(page)}
    assert {"migrate", "query", "simulate", "pki", "tenant", "rebuild", "verify", "load"} <= found <= set(COMMANDS)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("simulate --devices 20 --fleet", "atlasco simulate has no --fleet"),
        ("pki servant x", "there is no atlasco pki servant"),
        ("tenant attribute set … --no-latest", None),
    ],
)
def test_what_does_not_exist_is_noticed(line: str, wrong: str | None) -> None:
    assert problem(build_parser(), line.split()) == wrong


def declared(kind: str) -> set[str]:
    text = (TERRAFORM / f"{kind}s.tf").read_text(encoding="utf-8")
    return set(re.findall(rf'^{kind} "([a-z_]+)"', text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_output_variable_and_file_of_terraform_exists(page: Path) -> None:
    lines = [line for line in code(page) if "terraform" in line or ".tfvars" in line]
    outputs = {name for line in lines for name in re.findall(r"\boutput (?:-raw |-json )?([a-z][a-z_]+)", line)}
    assert outputs <= declared("output")
    assert {name for line in lines for name in re.findall(r"-var[= ]'?([a-z_]+)=", line)} <= declared("variable")
    for line in lines:
        for name in re.findall(r"([a-z]+\.tfvars)\b", line):
            assert (TERRAFORM / name).exists(), line
    for line in code(page):
        for path in re.findall(r"(?<![\w/])((?:terraform|k8s|docs|docker|storage|protos)/[\w./-]+\.[a-z]+)\b", line):
            assert (REPOSITORY / path).exists() or path.endswith(("backend.hcl", ".pem", ".crt")), path


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_every_name_is_one_of_ours(page: Path) -> None:
    """Variables and their parts, outputs, secrets, tables, columns, metrics: each has to be somewhere."""
    sources = [
        *TERRAFORM.rglob("*.tf"),
        *(REPOSITORY / "storage" / "sql").rglob("*.sql"),
        *(REPOSITORY / "storage").rglob("*.py"),
        DOCS / "metrics.md",
        DOCS / "sizing" / "model.py",
    ]
    known = set(re.findall(r"[a-z0-9_]+", " ".join(file.read_text(encoding="utf-8") for file in sources)))
    spans = {span.split(" ")[0].strip() for span in SPAN.findall(FENCE.sub("", page.read_text(encoding="utf-8")))}
    names = {
        part for span in spans if re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)+(\.[a-z_]+)*", span) for part in span.split(".")
    }
    assert names - known - {"use_lockfile"} == set()


def test_variables_of_the_environment_exist() -> None:
    reference = (DOCS / "configuration.md").read_text(encoding="utf-8")
    elsewhere = "".join(
        (REPOSITORY / "cli" / f"{name}.py").read_text(encoding="utf-8") for name in ("migrate", "maintain")
    )
    for page in GUIDES:
        for name in set(re.findall(r"\bATLASCO_[A-Z_]+\b", page.read_text(encoding="utf-8"))):
            assert name in reference or name in elsewhere, f"{page.name}: {name}"


def slug(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_sections_resolve(page: Path) -> None:
    for target, section in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
        text = (page.parent / target if target else page).read_text(encoding="utf-8")
        titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
        assert section in {slug(title) for title in titles}, f"{page.name} links to {target}#{section}"


def test_every_alarm_and_runbook_named_exists() -> None:
    alarms = (TERRAFORM / "modules" / "observability" / "alarms.tf").read_text(encoding="utf-8")
    for page in GUIDES:
        for name in re.findall(r"`((?:postgres|kafka|warehouse)-[a-z-]+)`", page.read_text(encoding="utf-8")):
            assert f'"{name}' in alarms, name
