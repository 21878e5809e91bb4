"""What the scripts say about themselves, before they set anything up."""

import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


def run(name: str, *arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    # Without a PATH that leads to them, neither apt-get nor pip nor Python can be run.
    return subprocess.run(
        [str(SCRIPTS / name), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={"PATH": str(tools(cwd))},
        timeout=60,
    )


def tools(directory: Path) -> Path:
    """A directory with what it takes to print a text."""
    place = directory / "bin"
    place.mkdir(exist_ok=True)
    for name in ("bash", "sed", "dirname", "basename", "sort", "paste"):
        link = place / name
        if not link.is_symlink():
            link.symlink_to(f"/usr/bin/{name}")
    return place


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize("name", ["run", "test", "setup", "bench"])
def test_help_is_the_text_at_the_head_of_the_script(tmp_path: Path, name: str, option: str) -> None:
    done = run(name, option, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"\n  scripts/{name}" in done.stdout
    assert "set -e" not in done.stdout


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("run", "--port", "80"), "it takes no arguments"),
        (("setup", "--test"), "there is no option --test; give --tests or nothing"),
        (("setup", "--tests", "now"), "there is no option --tests now"),
        (("bench",), "give one of: chains "),
        (("bench", "htp"), 'there is no benchmark "htp"; give one of: chains '),
    ],
)
def test_what_can_not_be_understood_is_told_at_once(
    tmp_path: Path, command: tuple[str, ...], said: str
) -> None:
    done = run(*command, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
