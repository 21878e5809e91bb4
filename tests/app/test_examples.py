"""What docs/operations.md tells people to copy is taken as it stands."""

import re
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

from gateway.config import Origins
from tests.conftest import program

TEXT = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()


def example(first: str) -> str:
    """The indented block that begins with this line."""
    found = re.search(rf"^    {re.escape(first)}\n(?:(?:    .*)?\n)*", TEXT, re.MULTILINE)
    assert found is not None
    return textwrap.dedent(found[0]).strip() + "\n"


def test_the_configuration_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(example("[listen]"))
    for name in ("site.pem", "site-key.pem"):
        (tmp_path / name).touch()
    config = Origins(state_dir=str(tmp_path), file=None, arguments={}).read()
    assert (config.limits["transfers"], config.limits["header_bytes"]) == (32, 16384)
    assert config.certificate == (str(tmp_path / "site.pem"), str(tmp_path / "site-key.pem"))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_no_fault_with_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "vdi-gateway.service"
    # The program and the user are there only where it is installed.
    installed = example("[Unit]").replace("/opt/vdi-gateway/.venv/bin/vdi-gateway", program())
    unit.write_text(installed.replace("User=vdi-gateway", "User=root"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
