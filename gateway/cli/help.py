"""`--help` without a terminal: plain ASCII text of 78 columns, one paragraph per argument."""

import textwrap
from typing import TYPE_CHECKING, Any

from cyclopts.help import HelpEntry, PlainFormatter

if TYPE_CHECKING:
    from cyclopts.help import HelpPanel
    from rich.console import Console, ConsoleOptions

WIDTH = 78


class ManualFormatter(PlainFormatter):
    """Lays entries out as manual pages do; cyclopts' own plain form breaks lines twice."""

    def __call__(self, console: "Console", options: "ConsoleOptions", panel: "HelpPanel") -> None:
        """Prints one group of entries."""
        if not panel.entries:
            return
        lines = [f"{panel.title}:"] if panel.title else []
        for entry in panel.entries:
            lines.append("  " + ", ".join(entry.display_labels_with_metavar or entry.positive_names))
            text = _with_notes(_plain(console, entry.description), entry)
            lines += textwrap.wrap(
                text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False
            )
        console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
        console.print()

    def render_description(self, console: "Console", options: "ConsoleOptions", description: Any) -> None:
        """Prints what stands between the usage and the arguments."""
        paragraphs = _plain(console, description, keep_paragraphs=True).split("\n\n")
        text = "\n\n".join(
            textwrap.fill(" ".join(each.split()), WIDTH, break_on_hyphens=False) for each in paragraphs
        )
        if text:
            console.print(text, highlight=False, markup=False, soft_wrap=True)
            console.print()


def _plain(console: "Console", shown: Any, *, keep_paragraphs: bool = False) -> str:
    """What rich would show, as text."""
    with console.capture() as captured:
        console.print(shown or "", end="")
    text = "\n".join(line.rstrip() for line in captured.get().splitlines())
    return text.strip() if keep_paragraphs else " ".join(text.split())


def _with_notes(text: str, entry: HelpEntry) -> str:
    """The description and what is worth knowing beside it, on one line."""
    notes = []
    if entry.choices:
        notes.append("one of " + ", ".join(entry.choices))
    if entry.env_var:
        notes.append("also from $" + ", $".join(entry.env_var))
    if entry.default not in (None, "False", '""'):
        notes.append(f"default: {entry.default}")
    if entry.required:
        notes.append("required")
    return f"{text} ({'; '.join(notes)})" if notes else text
