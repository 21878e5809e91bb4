"""vdi-import of files that are known and can't be read: no raw disk is made of them by mistake."""

import gzip
import os
import subprocess
from pathlib import Path

import pytest

from tests.cli.test_transfers import MIB
from tests.conftest import RunningGateway


def unreadable(kind: str, directory: Path) -> Path:
    file = directory / f"disk.{kind}"
    if kind == "gz":
        file.write_bytes(gzip.compress(os.urandom(MIB)))
    else:
        subprocess.run(["qemu-img", "create", "-q", "-f", kind, file, "1M"], check=True)
    return file


@pytest.mark.parametrize("kind", ["gz", "vdi"])
def test_what_can_not_be_read_is_refused_unless_it_is_said_to_be_the_disk(
    house: RunningGateway, tmp_path: Path, kind: str
) -> None:
    file, name = unreadable(kind, tmp_path), f"{tmp_path.name}-{kind}"
    disk = house.run("vdi-create", name, "4MiB").stdout.strip()
    for where in ([disk, str(file)], [str(file), "--sr", "disks", "--name", f"new {name}"]):
        done = house.run("vdi-import", *where)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"{file} can't be imported: it is" in done.stderr
    assert f"new {name}" not in house.run("vdi-list").stdout
    assert house.run("vdi-import", disk, str(file), "--format", "raw").returncode == 0
    got = tmp_path / "got"
    assert house.run("vdi-export", disk, str(got)).returncode == 0
    content = file.read_bytes()
    assert got.read_bytes()[: len(content)] == content
