"""The commands of README.md, in their order, as a reader pastes them: only port and size are others here."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import RunningGateway, clean_environment
from tests.system.mounted import NO_FUSE

README = Path(__file__).parents[2] / "README.md"
SIZE = 64 << 20


def commands(first: str, end: str) -> list[str]:
    """The indented lines from one heading until another."""
    text = README.read_text()
    part = text[text.index(f"\n## {first}\n") : text.index(f"\n## {end}\n")]
    return [line.strip() for line in part.splitlines() if line.startswith("    ")]


def test_the_commands_of_the_readme_do_what_it_says(tmp_path: Path) -> None:
    if shutil.which("nbdcopy") is None or shutil.which("qemu-img") is None:
        pytest.skip("nbdcopy or qemu-img is not installed")
    lines = commands("Upload and download", "Files")
    if not NO_FUSE:
        lines += commands("Files", "Tasks")
    begin = next(number for number, line in enumerate(lines) if line.startswith("truncate "))
    # What comes before sets up, and starts the gateway.
    assert [line.split()[0] for line in lines[:begin]] == ["./scripts/setup", "vdi-gateway", "export"]
    content = os.urandom(3 << 20)
    (tmp_path / "disk.raw").write_bytes(content)
    gateway = RunningGateway(tmp_path, ("--nbd", "127.0.0.1:0"))
    gateway.start()
    try:
        script = "\n".join(lines[begin:]).replace("1GiB", "64MiB")
        assert "http://127.0.0.1:8080/" in script
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script.replace("http://127.0.0.1:8080", gateway.url)],
            cwd=tmp_path,
            env={**clean_environment(), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert gateway.stop() == 0
    finally:
        gateway.kill()
    assert (tmp_path / "copy.raw").read_bytes() == content.ljust(SIZE, b"\0")
    if not NO_FUSE:
        assert (tmp_path / "another.raw").read_bytes() == (tmp_path / "copy.raw").read_bytes()
    compared = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", "disk.raw", "disk.qcow2"]
    assert b"identical" in subprocess.run(compared, cwd=tmp_path, capture_output=True, check=True).stdout
