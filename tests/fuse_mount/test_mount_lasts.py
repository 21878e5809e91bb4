"""Mounts go on beside each other, without a terminal, and while the gateway is away."""

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from fuse_mount.mounting import mounted_at
from tests.conftest import RunningGateway, clean_environment, program
from tests.fuse_mount.mount_files import names, reading
from tests.fuse_mount.served_site import operations
from tests.system.mounted import Mounted, mounted, needs_fuse
from tests.system.site import MIB, Site, Vdi, wait_until


@needs_fuse
def test_a_mount_that_lives_is_left_alone(site: Site, lasting: Mounted) -> None:
    done = site.gateway.command("mount", str(lasting.directory))
    assert done.returncode == 1
    assert "is mounted already, by another vdi-gateway mount" in done.stderr
    assert names(lasting.directory) == ["by-uuid", "disks"]


@needs_fuse
def test_two_mounts_show_the_same(site: Site, lasting: Mounted, tmp_path: Path, vdi: Vdi) -> None:
    with mounted(site.gateway, tmp_path / "second") as second:
        with reading(lasting.of(vdi, "disk.raw")), reading(second.of(vdi, "disk.raw")):
            assert operations(site, vdi) == ["read", "read"]
        assert second.stop() == 0
        assert lasting.of(vdi, "disk.raw").read_bytes() == vdi.file.read_bytes()


# The gateway


@needs_fuse
@pytest.mark.parametrize("crash", [False, True])
def test_a_gateway_that_restarts_disturbs_no_reader_and_is_found_again(
    site: Site, lasting: Mounted, vdi: Vdi, crash: bool
) -> None:
    content = vdi.file.read_bytes()
    with reading(lasting.of(vdi, "disk.raw")) as fd:
        if crash:
            site.gateway.kill()
        else:
            site.gateway.stop()
        assert os.pread(fd, MIB, MIB) == content[MIB : 2 * MIB]
        assert os.listdir(lasting.directory / "by-uuid" / vdi.uuid)
        site.gateway.start()
        assert os.pread(fd, MIB, 2 * MIB) == content[2 * MIB : 3 * MIB]
        made = site.create_vdi(2 * MIB)
        assert lasting.of(made, "disk.raw").stat().st_size == 2 * MIB
        site.gateway.call("VDI.destroy", made.ref)
        wait_until(lambda: not (lasting.directory / "by-uuid" / made.uuid).is_symlink(), "the disk to go")
        wait_until(lambda: operations(site, vdi) == ["read"], "the reader to be known again")
    assert "the gateway is away" in lasting.log()


@needs_fuse
def test_what_went_while_the_gateway_was_away_goes(site: Site, lasting: Mounted) -> None:
    made = site.create_vdi(2 * MIB)
    kept = site.create_vdi(2 * MIB)
    lasting.of(made)
    site.gateway.stop()
    os.unlink(made.file)
    site.gateway.start()
    site.gateway.call("SR.scan", site.repository)
    wait_until(lambda: not (lasting.directory / "by-uuid" / made.uuid).is_symlink(), "the disk to go")
    assert lasting.of(kept).exists()
    site.gateway.call("VDI.destroy", kept.ref)


@needs_fuse
def test_without_a_gateway_there_is_no_mount(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    gateway = RunningGateway(tmp_path)
    done = gateway.command("mount", str(tmp_path / "mnt"))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"no gateway runs on {gateway.state_dir}" in done.stderr
    assert done.stderr.count("\n") == 1


# In the background


@needs_fuse
def test_in_the_background_it_goes_on_without_a_terminal(site: Site, tmp_path: Path, vdi: Vdi) -> None:
    directory = tmp_path / "mnt"
    directory.mkdir()
    done = site.gateway.command("mount", directory.name, "--background", cwd=tmp_path)
    try:
        assert (done.returncode, done.stderr) == (0, "")
        assert f"is mounted on {directory}, read-only; `fusermount3 -u {directory}`" in done.stdout
        assert (directory / "by-uuid" / vdi.uuid / "disk.raw").read_bytes() == vdi.file.read_bytes()
        again = site.gateway.command("mount", str(directory), "--background")
        assert again.returncode == 1
        assert again.stderr.count("\n") == 1
        assert "is mounted already" in again.stderr
    finally:
        subprocess.run(["fusermount3", "-uz", str(directory)], check=True)
    wait_until(lambda: mounted_at(str(directory)) is None, "the mount to end")
    log = site.gateway.state_dir / "mount.log"
    assert log.stat().st_mode & 0o777 == 0o600
    assert "Traceback" not in log.read_text()


@needs_fuse
def test_nothing_goes_on_in_the_background_when_it_is_interrupted_before(site: Site, tmp_path: Path) -> None:
    directory = tmp_path / "mnt"
    directory.mkdir()

    def processes() -> list[str]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if str(directory).encode() in (process / "cmdline").read_bytes():
                    found.append(process.name)
        return found

    site.gateway.signal(signal.SIGSTOP)
    try:
        command = [program(), "mount", str(directory), "--background"]
        environment = {**clean_environment(), "VDI_GATEWAY_STATE_DIR": str(site.gateway.state_dir)}
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as waiting:
            wait_until(lambda: len(processes()) == 2, "the process in the background")
            waiting.send_signal(signal.SIGINT)
            assert waiting.wait(30) == 130
    finally:
        site.gateway.signal(signal.SIGCONT)
    wait_until(lambda: processes() == [], "it to end")
    assert mounted_at(str(directory)) is None
