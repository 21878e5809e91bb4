import sys

import pytest

from gateway.cli.output import print_table


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
