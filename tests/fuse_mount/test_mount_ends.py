"""However a mount ends, its leases end with it, and what was written before it is there."""

import errno
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from fuse_mount import mounting
from tests.fuse_mount.mount_files import names, reading
from tests.fuse_mount.served_site import operations
from tests.system.mounted import Mounted, mounted, needs_fuse
from tests.system.site import MIB, Site, Vdi, stored_content, wait_until


@needs_fuse
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_unmounts(mount: Mounted, number: signal.Signals) -> None:
    assert names(mount.directory) == ["by-uuid", "disks"]
    assert mount.stop(number) == 0
    assert not mount.mounted
    assert mount.log() == ""


@needs_fuse
def test_fusermount_ends_the_process(mount: Mounted) -> None:
    subprocess.run(["fusermount3", "-u", str(mount.directory)], check=True)
    assert mount.process.wait(30) == 0
    assert mount.log() == ""


@needs_fuse
def test_a_signal_unmounts_also_while_a_file_is_open(site: Site, mount: Mounted, vdi: Vdi) -> None:
    with reading(mount.of(vdi, "disk.raw")) as fd:
        assert operations(site, vdi) == ["read"]
        assert mount.stop() == 0
        assert not mount.mounted
        with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
            os.pread(fd, 1, MIB)
    assert vdi.uuid in mount.log()
    wait_until(lambda: operations(site, vdi) == [], "the lease to end")


@needs_fuse
def test_what_was_written_before_a_signal_is_there_and_the_writer_hears_that_it_ends(
    site: Site, tmp_path: Path
) -> None:
    written_to = site.create_vdi(8 * MIB)
    piece = os.urandom(MIB)
    with mounted(site.gateway, tmp_path / "mnt", "--writable") as mount:
        fd = os.open(mount.of(written_to, "disk.raw"), os.O_RDWR)
        os.pwrite(fd, piece, 3 * MIB)
        assert mount.stop() == 0
        with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
            os.pwrite(fd, piece, 4 * MIB)
        with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
            os.close(fd)
        assert f'"{written_to.uuid}": "writing"' in mount.log()
    wait_until(lambda: operations(site, written_to) == [], "the lease to end")
    assert stored_content(written_to) == bytes(3 * MIB) + piece + bytes(4 * MIB)
    site.gateway.call("VDI.destroy", written_to.ref)


@needs_fuse
def test_a_signal_while_somebody_stands_in_the_mount_unmounts(mount: Mounted) -> None:
    with subprocess.Popen(["sleep", "600"], cwd=mount.directory / "by-uuid") as visitor:
        try:
            assert mount.stop() == 0
        finally:
            visitor.kill()
    assert not mount.mounted
    assert "working directory" in mount.log()


@needs_fuse
def test_a_signal_leaves_the_mount_of_another_alone_that_has_taken_the_directory(
    site: Site, mount: Mounted, vdi: Vdi
) -> None:
    with reading(mount.of(vdi, "disk.raw")):
        subprocess.run(["umount", "--lazy", mount.directory], check=True)
        with mounted(site.gateway, mount.directory) as other, reading(other.of(vdi, "disk.raw")) as fd:
            assert mount.stop() == 0
            assert other.mounted
            assert os.pread(fd, 4096, MIB) == vdi.file.read_bytes()[MIB : MIB + 4096]
            os.close(os.open(other.of(vdi, "disk.raw"), os.O_RDONLY))


@needs_fuse
def test_after_kill_9_readers_get_errors_the_lease_ends_and_the_directory_can_be_mounted_on_again(
    site: Site, mount: Mounted, vdi: Vdi
) -> None:
    with reading(mount.of(vdi, "disk.raw")) as fd:
        mount.kill()
        with pytest.raises(OSError, match=f"{os.strerror(errno.ENOTCONN)}|{os.strerror(errno.ECONNABORTED)}"):
            os.pread(fd, 1, MIB)
        wait_until(lambda: operations(site, vdi) == [], "the lease to end")
        assert mount.mounted
        mount.start()
        assert mount.of(vdi, "disk.raw").read_bytes() == vdi.file.read_bytes()
    assert "a mount that had died was unmounted" in mount.log()
    assert mount.stop() == 0
    assert not mount.mounted


async def test_a_second_signal_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended(BaseException):
        pass

    def exit_now(code: int) -> None:
        raise Ended(code)

    async def for_ever(*_: object) -> None:
        await trio.sleep_forever()

    async def signals() -> AsyncIterator[int]:
        yield signal.SIGTERM
        yield signal.SIGINT

    monkeypatch.setattr(os, "_exit", exit_now)
    monkeypatch.setattr(mounting, "_end", for_ever)
    with pytest.raises(BaseExceptionGroup) as ended:
        await mounting._obey(None, None, signals())  # type: ignore[arg-type]
    assert [error.args for error in ended.value.exceptions if isinstance(error, Ended)] == [(130,)]
