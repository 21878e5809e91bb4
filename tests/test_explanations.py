"""A failed comparison of whole images is told at once, wherever the tests run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = 60
PROGRAM = """
def test_images():
    assert bytes(4 << 20) == bytes(4096) + b"\\x01" * ((4 << 20) - 4096)

def test_words():
    assert ["one", "two"] == ["one", "three"]
"""


@pytest.mark.parametrize(("option", "in_ci"), [("-q", "1"), ("-vv", "")])
def test_images_that_differ_are_told_by_their_first_difference(
    tmp_path: Path, option: str, in_ci: str
) -> None:
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_assertrepr_compare\n")
    (tmp_path / "test_them.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", option, "-c", os.devnull, "--rootdir", str(tmp_path), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
        env={**os.environ, "CI": in_ci, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert "2 failed" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    assert "At index 4096 diff" in done.stdout
    assert len(done.stdout) < 100_000
    assert "Full diff" in done.stdout  # everything else is explained as ever
