import sys

import pytest

from gateway.cli.output import UsageError, parse_size, print_table


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


@pytest.mark.parametrize("text", ["9" * 400 + ".5TiB", "9" * 5000, "9999999999TiB", str(1 << 63)])
def test_a_size_that_no_disk_has_is_told(text: str) -> None:
    with pytest.raises(UsageError, match=r"SIZE: 9+.* is more than a disk can have"):
        parse_size(text, "SIZE")
    assert parse_size(str((1 << 63) - 1), "SIZE") == (1 << 63) - 1
