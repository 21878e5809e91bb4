"""Mounts as processes, looked at through the kernel; the checks before them without."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trio

from fuse_mount import mounting
from fuse_mount.mounting import MountRefused, check_machine, claim, mounted_at
from tests.conftest import RunningGateway, clean_environment, program
from tests.system.mounted import Mounted, mounted, needs_fuse
from tests.system.site import MIB, Site, Vdi, stored_content, unplugged, wait_until

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A gateway whose mounts don't end it; its SR is called disks."""
    directory = tmp_path_factory.mktemp("site")
    gateway = RunningGateway(directory)
    gateway.start()
    try:
        site = Site(gateway, directory / "sr")
        gateway.call("SR.set_name_label", site.repository, "disks")
        yield site
    finally:
        if gateway.running:
            gateway.stop()
        gateway.kill()
    assert "Traceback" not in gateway.log()


@pytest.fixture
def vdi(site: Site) -> Iterator[Vdi]:
    vdi = site.create_vdi(4 * MIB, "raw")
    with vdi.file.open("r+b") as file:  # never shorter, since the gateway may look at it
        file.write(os.urandom(vdi.size))
    yield vdi
    wait_until(lambda: not operations(site, vdi), "the leases to end")
    site.gateway.call("VDI.destroy", vdi.ref)


@pytest.fixture
def mount(site: Site, tmp_path: Path) -> Iterator[Mounted]:
    """One that the test may end."""
    with mounted(site.gateway, tmp_path / "mnt") as mount:
        yield mount


@pytest.fixture(scope="module")
def lasting(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    """One for all tests that leave it as it is."""
    with mounted(site.gateway, tmp_path_factory.mktemp("lasting") / "mnt") as mount:
        yield mount


def operations(site: Site, vdi: Vdi) -> list[str]:
    return sorted(site.gateway.call("VDI.get_current_operations", vdi.ref).values())


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


@contextmanager
def reading(file: Path) -> Iterator[int]:
    """A descriptor, closed also when its mount has died."""
    fd = os.open(file, os.O_RDONLY)
    try:
        os.pread(fd, 1, 0)
        yield fd
    finally:
        with suppress(OSError):
            os.close(fd)


# Before


def test_what_is_mounted_where_is_read_from_the_kernel(tmp_path: Path) -> None:
    proc = mounted_at("/proc")
    assert proc is not None
    assert proc.kind == "proc"
    assert mounted_at(str(tmp_path)) is None


def test_the_kernels_way_to_write_spaces_is_understood() -> None:
    assert mounting._unescaped(rb"/a\040b\011c\012d\134e\0405") == b"/a b\tc\nd\\e 5"


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("nothing", "there is no directory"),
        ("file", "is no directory"),
        ("full", "isn't empty"),
        ("file/below", "is no directory"),
    ],
)
def test_a_directory_that_can_not_be_mounted_on_is_refused_by_its_name(
    tmp_path: Path, place: str, said: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    with pytest.raises(MountRefused, match=said) as refused:
        claim(str(tmp_path / place))
    assert str(tmp_path / place) in str(refused.value)


def test_another_file_system_is_not_covered() -> None:
    with pytest.raises(MountRefused, match=r"\(proc\) is mounted on /proc"):
        claim("/proc")


def test_a_directory_is_claimed_without_symbolic_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert claim(str(tmp_path / "link")) == str(tmp_path / "real")


def test_a_machine_without_fuse_is_told_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounting, "DEVICE", str(tmp_path / "fuse"))
    with pytest.raises(MountRefused, match="modprobe fuse"):
        check_machine(others=False)
    (tmp_path / "fuse").touch()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(MountRefused, match="package fuse3"):
        check_machine(others=False)


@pytest.mark.parametrize(
    ("configuration", "allowed"),
    [
        ("user_allow_other\n", True),
        ("  user_allow_other \n", True),
        ("#user_allow_other\n", False),
        (None, False),
    ],
)
def test_users_may_let_others_in_where_the_administrator_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configuration: str | None, allowed: bool
) -> None:
    (tmp_path / "fuse").touch()
    if configuration is not None:
        (tmp_path / "fuse.conf").write_text(configuration)
    monkeypatch.setattr(mounting, "DEVICE", str(tmp_path / "fuse"))
    monkeypatch.setattr(mounting, "FUSE_CONFIGURATION", str(tmp_path / "fuse.conf"))
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/fusermount3")
    check_machine(others=True)  # root may in any case
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    check_machine(others=False)
    if allowed:
        check_machine(others=True)
    else:
        with pytest.raises(MountRefused, match="user_allow_other"):
            check_machine(others=True)


async def test_a_second_signal_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended(BaseException):
        pass

    def exit_now(code: int) -> None:
        raise Ended(code)

    async def for_ever(_: object) -> None:
        await trio.sleep_forever()

    async def signals() -> AsyncIterator[int]:
        yield signal.SIGTERM
        yield signal.SIGINT

    monkeypatch.setattr(os, "_exit", exit_now)
    monkeypatch.setattr(mounting, "_end", for_ever)
    with pytest.raises(BaseExceptionGroup) as ended:
        await mounting._obey(None, signals())  # type: ignore[arg-type]
    assert [error.args for error in ended.value.exceptions if isinstance(error, Ended)] == [(130,)]


# Listing


@contextmanager
def generated(directory: Path, count: int) -> Iterator[Path]:
    directory.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fuse_mount.generated", str(directory), str(count)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{count} VDIs are mounted on {directory}\n"
        yield directory
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        subprocess.run(["fusermount3", "-uz", "-q", str(directory)], check=False, capture_output=True)
        if process.stdout is not None:
            process.stdout.close()


@needs_fuse
@pytest.mark.parametrize("count", [3000, pytest.param(20_000, marks=pytest.mark.long)])
def test_thousands_of_disks_are_listed_each_once(tmp_path: Path, count: int) -> None:
    with generated(tmp_path / "mnt", count) as directory:
        snapshots = (count - 1) // 5
        for _ in range(2):
            assert len(set(os.listdir(directory / "disks"))) == count - snapshots
        assert len(set(os.listdir(directory / "disks" / "disk 0" / "snapshots"))) == snapshots
        with os.scandir(directory / "by-uuid") as entries:
            assert len({os.stat(entry).st_ino for entry in entries}) == count
        # What stat says is what the listing has said.
        with os.scandir(directory / "disks") as entries:
            for entry in entries:
                assert entry.inode() == os.stat(entry.path).st_ino


@needs_fuse
def test_a_listing_that_has_begun_and_one_that_is_rewound_are_whole(
    site: Site, lasting: Mounted, vdi: Vdi
) -> None:
    lasting.of(vdi)
    listing = os.scandir(lasting.directory / "disks")
    first = next(listing)
    more = site.create_vdi(2 * MIB)
    lasting.of(more)
    rest = {entry.name for entry in listing}
    assert {first.name, *rest} == set(os.listdir(lasting.directory / "disks")) - {name_of(lasting, more)}
    site.gateway.call("VDI.destroy", more.ref)


def name_of(mount: Mounted, vdi: Vdi) -> str:
    return mount.of(vdi).resolve().name


@needs_fuse
def test_any_label_is_a_name_that_can_be_opened(site: Site, lasting: Mounted) -> None:
    labels = ["", ".", "..", "a/b", "/", "line\nbreak", "tab\t", "x" * 300, "盤" * 100, " ", "-rf", "*", "~"]
    vdis = [site.create_vdi(2 * MIB) for _ in range(2 * len(labels))]
    for made, label in zip(vdis, labels * 2, strict=True):
        site.gateway.call("VDI.set_name_label", made.ref, label)
    for made, label in zip(vdis, labels * 2, strict=True):
        record = lasting.of(made, "record.json")
        wait_until(
            lambda record=record, label=label: json.loads(record.read_text())["name_label"] == label,  # type: ignore[misc]
            f"the name {label!r}",
        )
        assert record.resolve().parent.parent == lasting.directory / "disks"
        site.gateway.call("VDI.destroy", made.ref)
    wait_until(lambda: names(lasting.directory / "disks") == [], "them to go")


# What comes and goes


@needs_fuse
def test_disks_and_snapshots_appear_are_renamed_and_disappear(site: Site, lasting: Mounted) -> None:
    made = site.create_vdi(2 * MIB)
    site.gateway.call("VDI.set_name_label", made.ref, "web")
    disk = lasting.directory / "disks" / "web"
    wait_until(disk.exists, "the disk")
    assert not (disk / "snapshots").exists()
    snapshot = site.gateway.call("VDI.snapshot", made.ref, {})
    wait_until((disk / "snapshots" / "web" / "disk.raw").exists, "the snapshot")
    site.gateway.call("VDI.set_name_label", made.ref, "shop")
    renamed = lasting.directory / "disks" / "shop"
    wait_until(lambda: renamed.exists() and not disk.exists(), "the new name")
    site.gateway.call("VDI.destroy", made.ref)
    wait_until(lambda: names(lasting.directory / "disks") == ["web"], "the snapshot to stand alone")
    site.gateway.call("VDI.destroy", snapshot)
    wait_until(lambda: names(lasting.directory / "disks") == [], "the snapshot to go")
    assert names(lasting.directory / "by-uuid") == []


@needs_fuse
def test_an_sr_that_is_unplugged_takes_its_disks_along(site: Site, lasting: Mounted, vdi: Vdi) -> None:
    lasting.of(vdi)
    [pbd] = site.gateway.call("SR.get_PBDs", site.repository)
    wait_until(lambda: unplugged(site.gateway, pbd), "nobody to use the SR")
    wait_until(lambda: names(lasting.directory) == ["by-uuid"], "the SR to go")
    assert names(lasting.directory / "by-uuid") == []
    site.gateway.call("PBD.plug", pbd)
    assert lasting.of(vdi, "disk.raw").read_bytes() == vdi.file.read_bytes()


@needs_fuse
def test_the_record_is_that_of_the_gateway(site: Site, lasting: Mounted, vdi: Vdi) -> None:
    shown = json.loads(lasting.of(vdi, "record.json").read_text())
    record = site.gateway.call("VDI.get_record", vdi.ref)
    assert shown.pop("ref") == vdi.ref
    # In XML numbers are texts, and dates a type of their own.
    shown.update({name: str(value) for name, value in shown.items() if type(value) is int})
    record["snapshot_time"] = str(record["snapshot_time"])
    assert {name: shown[name] for name in shown if "operations" not in name} == {
        name: record[name] for name in record if "operations" not in name
    }


@needs_fuse
def test_only_the_disks_that_are_named_are_shown(site: Site, tmp_path: Path, vdi: Vdi) -> None:
    other = site.create_vdi(2 * MIB)
    with mounted(site.gateway, tmp_path / "mnt", "--only", vdi.uuid) as mount:
        assert names(mount.directory / "by-uuid") == [vdi.uuid]
        assert len(names(mount.directory / "disks")) == 1
    site.gateway.call("VDI.destroy", other.ref)


@needs_fuse
def test_what_is_not_writable_can_not_be_changed(lasting: Mounted, vdi: Vdi) -> None:
    file = lasting.of(vdi, "disk.raw")
    for change in (
        lambda: file.open("r+b"),
        (file.parent / "new").touch,
        file.unlink,
        lambda: os.truncate(file, 0),
        lambda: file.chmod(0o777),
        (file.parent.parent / "new").mkdir,
        lambda: file.rename(file.parent / "new"),
    ):
        with pytest.raises(OSError, match="Read-only file system"):
            change()


# The end


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


# As somebody who may not


@needs_fuse
@pytest.mark.skipif(not shutil.which("setpriv"), reason="setpriv (util-linux) isn't there")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_others_are_kept_out_unless_they_are_let_in(site: Site, tmp_path: Path, vdi: Vdi) -> None:
    # A way for nobody: pytest's directories are the owner's alone.
    directory = Path("/run") / f"vdi-gateway-test-{os.getpid()}"
    as_nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    look = [*as_nobody, "cat", str(directory / "by-uuid" / vdi.uuid / "record.json")]
    try:
        with mounted(site.gateway, directory) as mount:
            mount.of(vdi)
            assert subprocess.run(look, capture_output=True, check=False).returncode == 1
        with mounted(site.gateway, directory, "--allow-other") as mount:
            mount.of(vdi)
            assert (
                json.loads(subprocess.run(look, capture_output=True, check=True).stdout)["uuid"] == vdi.uuid
            )
    finally:
        directory.rmdir()
        directory.with_suffix(".log").unlink(missing_ok=True)
