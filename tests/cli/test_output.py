import sys

import pytest

from gateway.cli import main
from gateway.cli.output import UsageError, parse_size, print_note, print_table


@pytest.mark.parametrize("on_terminal", [False, True])
def test_a_name_is_one_cell_and_gives_the_terminal_no_commands(
    on_terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: on_terminal)
    monkeypatch.setenv("TERM", "dumb")  # no colours
    print_table(["Name", "Size"], [["a\tb\nc\rd\x1b[2Je\x9bf\u202eg", "1"]])
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split() == ["Name", "Size"]
    assert line.split() == ["a", "b", "c", "d", "[2Je", "f", "g", "1"]


def test_a_remark_or_an_error_with_a_name_in_it_is_one_line_and_gives_the_terminal_no_commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    print_note("partition 1 (\x1b]0;owned\x07\x9b2J\n) can't be mounted")
    # The label of a guest's filesystem comes to the user this way, when inspect asks which one is meant.
    assert main.run(["vdi-resize", "\x1b[2J\x07", "disk-size=\x1b[2J"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == len(said.splitlines()) == 2
    assert said.replace("\n", "").isprintable()


@pytest.mark.parametrize("text", ["9" * 400 + ".5TiB", "9" * 5000, "9999999999TiB", str(1 << 63)])
def test_a_size_that_no_disk_has_is_told(text: str) -> None:
    with pytest.raises(UsageError, match=r"SIZE: 9+.* is more than a disk can have"):
        parse_size(text, "SIZE")
    assert parse_size(str((1 << 63) - 1), "SIZE") == (1 << 63) - 1
