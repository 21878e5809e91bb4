import re
from pathlib import Path

import pytest

from gateway.cli.main import COMMANDS
from gateway.core.errors import MESSAGES

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def error_row(code: str) -> str:
    """The line of docs/errors.md for one code; what a message fills in is shown as dots."""
    text = re.sub(r"\{\d+:detail\}", " (…)", MESSAGES[code])
    text = re.sub(r"\{\d+(?:![rs])?\}", "…", text)
    return f"| `{code}` | {text} |"


def test_every_error_code_is_documented_with_its_present_sentence() -> None:
    documented = [
        line for line in (ROOT / "docs/errors.md").read_text().splitlines() if line.startswith("| `")
    ]
    assert documented == [error_row(code) for code in sorted(MESSAGES)]


def test_every_command_is_documented() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "docs/commands.md").read_text(), re.MULTILINE)
    assert headings == list(COMMANDS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", document.read_text())
    assert [target for target in targets if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_scripts_and_documents_that_are_named_exist(document: Path) -> None:
    named = re.findall(
        r"(?<![\w/.-])(?:\./)?((?:scripts|docs|tests|gateway)/[\w./-]*\w)", document.read_text()
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_readme_begins_with_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    commands = [line.split()[0] for line in lines if line.startswith("    ")][:2]
    assert commands == ["./scripts/run", "./scripts/test"]
