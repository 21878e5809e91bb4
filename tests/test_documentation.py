import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.cli.main import COMMANDS, application
from gateway.cli.words import translated
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
    text = re.sub(r"\{\d+:of user\}", " of user …", text)
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


def command_lines(document: Path) -> Iterator[list[str]]:
    """The arguments of each `vdi-gateway` that stands in a block of commands or between backquotes."""
    text = document.read_text().replace("\\\n", " ")
    blocks = "\n".join(line for line in text.splitlines() if line.startswith("    "))
    inline = re.findall(r"`vdi-gateway ([a-z-]+ [^`]+)`", text)
    for found in [*re.findall(r"(?<![\w/-])vdi-gateway (.+)", blocks), *inline]:
        words = shlex.split(re.split(r"[|>)]| 2>| &", found)[0], comments=True)
        yield words


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_documents_are_understood(document: Path) -> None:
    app = application()
    for words in command_lines(document):
        # CycloptsError or UsageError names what is wrong.
        app.parse_args(translated(app, words), print_error=False, exit_on_error=False)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_that_are_named_exist(document: Path) -> None:
    named = re.findall(
        r"`((?:sr|vdi|vhd|task|user|session|host|config)-(?!gateway\b)[a-z-]+)(?: [^`]*)?`",
        document.read_text(),
    )
    assert set(named) - {*COMMANDS, "task-id"} == set()


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
