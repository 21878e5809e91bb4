"""The files of a disk in the mount, read by cp, dd, sha256sum and QEMU, and by fifty readers at once, are the
disk that NBD shows and libvhdi reads."""

import os
import random
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import pyvhdi

from gateway.access.client import open_vdi
from tests.conftest import run_here
from tests.nbd_plugin.conftest import Nbd
from tests.system.guests import write_changes
from tests.system.mounted import Mounted, digest, leases, needs_fuse, needs_loops, run, wait_until_free
from tests.system.site import MIB, Site, Vdi, depth, stored_content, wait_until

pytestmark = needs_fuse

SIZE = 11 * MIB + 512
READERS = 50


def make_chain(site: Site, directory: Path, seed: int, *, levels: int = 3, size: int = SIZE) -> Vdi:
    """A disk with holes, whose data is spread over the levels of its chain."""
    rng = random.Random(seed)
    vdi = site.create_vdi(size)
    image = directory / f"image-{seed}"
    with image.open("wb") as file:
        file.truncate(vdi.size)
    before = None
    for level in range(levels):
        if level:
            site.gateway.call("VDI.snapshot", vdi.ref, {})
        with image.open("r+b") as file:
            for _ in range(4):
                # libvhdi reads blocks that are written in finer parts wrongly.
                file.seek(rng.randrange(vdi.size // 65536) * 65536)
                file.write(rng.randbytes(65536 * rng.randrange(1, 12)))
            file.truncate(vdi.size)
        write_changes(site, vdi, image, before)
        before = image.read_bytes()
    assert depth(site, vdi) == levels
    return vdi


@pytest.fixture(scope="module")
def chain(shared_site: Site, tmp_path_factory: pytest.TempPathFactory) -> Vdi:
    return make_chain(shared_site, tmp_path_factory.mktemp("chain"), seed=1)


@pytest.fixture(scope="module")
def nbd(shared_site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nbd]:
    server = Nbd(shared_site, tmp_path_factory.mktemp("nbd"))
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def content(chain: Vdi, nbd: Nbd, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What NBD shows of the chain."""
    copy = tmp_path_factory.mktemp("content") / "raw"
    run("nbdcopy", nbd.uri(chain), copy)
    assert copy.stat().st_size == chain.size
    return copy


def test_copies_and_checksums_are_the_disk(mount: Mounted, chain: Vdi, content: Path, tmp_path: Path) -> None:
    disk = mount.of(chain, "disk.raw")
    assert run("sha256sum", disk).split()[0] == digest(content)
    run("cmp", disk, content)
    run("cp", "--sparse=always", disk, tmp_path / "copy")
    assert digest(tmp_path / "copy") == digest(content)
    assert (tmp_path / "copy").stat().st_blocks < chain.size // 512
    for arguments in (("bs=1M", "iflag=direct"), ("bs=4k",), ("bs=512",), ("bs=3M", "iflag=fullblock")):
        run("dd", f"if={disk}", f"of={tmp_path / 'dd'}", *arguments)
        assert digest(tmp_path / "dd") == digest(content), arguments
    run("dd", f"if={disk}", f"of={tmp_path / 'dd'}", "bs=1", "skip=3000001", "count=777")
    assert (tmp_path / "dd").read_bytes() == content.read_bytes()[3000001:3000778]


@pytest.mark.parametrize(("name", "driver"), [("raw", "raw"), ("vhd", "vpc"), ("qcow2", "qcow2")])
def test_qemu_finds_the_same_disk_over_fuse_and_nbd(
    mount: Mounted, nbd: Nbd, chain: Vdi, name: str, driver: str
) -> None:
    file = mount.of(chain, f"disk.{name}")
    uri = nbd.uri(chain)
    said = run("qemu-img", "compare", "-f", driver, "-F", "raw", file, uri)
    assert "Images are identical" in said


def test_the_files_in_a_format_are_whole_images(
    site: Site, mount: Mounted, chain: Vdi, content: Path, tmp_path: Path
) -> None:
    folder = mount.of(chain)
    assert "No errors were found" in run("qemu-img", "check", "-f", "qcow2", folder / "disk.qcow2")
    checked = run_here("vhd-check", str(folder / "disk.vhd"))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    for name in ("vhd", "qcow2"):
        url = site.export_url(chain, format=name)
        run("curl", "-sS", "--fail", "-o", tmp_path / name, url)
        run("cmp", folder / f"disk.{name}", tmp_path / name)
        assert (folder / f"disk.{name}").stat().st_size == (tmp_path / name).stat().st_size
    image = pyvhdi.file()
    image.open(str(tmp_path / "vhd"))
    try:
        assert image.read(image.get_media_size()) == content.read_bytes()
    finally:
        image.close()
    wait_until_free(site.gateway, chain)


@needs_loops
def test_a_loop_device_with_direct_io_reads_the_same(mount: Mounted, chain: Vdi, content: Path) -> None:
    device = run("losetup", "--find", "--show", "--direct-io=on", "--read-only", mount.of(chain, "disk.raw"))
    try:
        # The end that isn't a whole sector of the device is not in it.
        with open(device.strip(), "rb") as read, content.open("rb") as wanted:
            found = read.read()
            assert found == wanted.read(len(found))
        assert chain.size - len(found) < 4096
    finally:
        run("losetup", "--detach", device.strip())


def read_in_pieces(path: Path, seed: int, opened: threading.Barrier | None = None) -> str:
    """Read a file in pieces of odd lengths, first some of them out of order; the digest of the whole."""
    rng = random.Random(seed)
    file = os.open(path, os.O_RDONLY)
    try:
        if opened is not None:
            opened.wait(60)
        size = os.fstat(file).st_size
        for _ in range(8):
            os.pread(file, rng.choice((512, 4096, 100_000)), rng.randrange(size))
        found = sha256()
        while piece := os.read(file, rng.choice((4096, 70_001, 262_144, MIB))):
            found.update(piece)
        return found.hexdigest()
    finally:
        os.close(file)


def test_fifty_readers_of_one_disk_share_a_lease(
    site: Site, mount: Mounted, chain: Vdi, content: Path
) -> None:
    opened = threading.Barrier(READERS + 1)
    with ThreadPoolExecutor(READERS) as pool:
        disk = mount.of(chain, "disk.raw")
        digests = [pool.submit(read_in_pieces, disk, number, opened) for number in range(READERS)]
        opened.wait(60)
        assert leases(site.gateway, chain) == ["read"]
        assert {each.result(60) for each in digests} == {digest(content)}
    wait_until_free(site.gateway, chain)
    assert mount.resident() < 200 * MIB


def test_fifty_readers_of_many_disks_in_all_formats_get_their_own_bytes(
    site: Site, mount: Mounted, tmp_path: Path
) -> None:
    disks = [make_chain(site, tmp_path, seed, levels=2, size=4 * MIB) for seed in range(2, 8)]
    names = ("disk.raw", "disk.vhd", "disk.qcow2")
    files = [mount.of(disks[number % len(disks)], names[number % 3]) for number in range(READERS)]
    alone = {file: digest(file) for file in files}
    assert len(set(alone.values())) == len(alone) == 6
    for vdi in disks[::3]:
        assert alone[mount.of(vdi, "disk.raw")] == sha256(stored_chain(site, vdi)).hexdigest()
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(read_in_pieces, files, range(READERS)))
    assert found == [alone[file] for file in files]
    for vdi in disks:
        wait_until_free(site.gateway, vdi)


def stored_chain(site: Site, vdi: Vdi) -> bytes:
    """What libvhdi reads of a leaf and its parents."""
    images: list[Any] = []
    parents = {
        record["uuid"]: record["sm_config"].get("vhd-parent")
        for record in site.gateway.call("VDI.get_all_records").values()
    }
    uuid: str | None = vdi.uuid
    while uuid:
        image = pyvhdi.file()
        image.open(str(site.directory / f"{uuid}.vhd"))
        if images:
            images[-1].set_parent(image)
        images.append(image)
        uuid = parents[uuid]
    try:
        content: bytes = images[0].read(vdi.size)
        return content
    finally:
        for image in images:
            image.close()


def test_programs_that_only_look_take_no_lease_and_are_not_refused(
    site: Site, mount: Mounted, nbd: Nbd, tmp_path: Path
) -> None:
    """Somebody writes the disk over NBD meanwhile."""
    vdi = site.create_vdi()
    folder = mount.of(vdi)
    with subprocess.Popen(
        ["qemu-io", "-f", "raw", nbd.uri(vdi, write=True)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        try:
            writer.stdin.write("write -P 7 64k 64k\n")
            writer.stdin.flush()
            wait_until(lambda: leases(site.gateway, vdi) == ["write"], "the writer")
            run("ls", "-l", folder)
            run("stat", *(folder / name for name in ("disk.raw", "disk.vhd", "disk.qcow2", "record.json")))
            run("du", folder / "disk.raw")
            assert leases(site.gateway, vdi) == ["write"]
            done = subprocess.run(
                ["head", "-c", "1", str(folder / "disk.raw")], capture_output=True, text=True, check=False
            )
            assert "Device or resource busy" in done.stderr
        finally:
            writer.communicate("flush\nquit\n", timeout=30)
    wait_until_free(site.gateway, vdi)
    assert (folder / "disk.raw").read_bytes()[65536:131072] == b"\7" * 65536
    assert stored_content(vdi)[65536:131072] == b"\7" * 65536


def test_who_waits_for_a_busy_disk_holds_up_nobody_else(site: Site, mount: Mounted) -> None:
    busy, free = [site.create_vdi(2 * MIB) for _ in range(30)], site.create_vdi(2 * MIB)
    control = str(site.gateway.state_dir / "access.sock")
    files = [mount.of(vdi, "disk.raw") for vdi in busy]
    alone = mount.of(free, "disk.raw")
    with ThreadPoolExecutor(len(busy)) as pool:
        with ExitStack() as writers:
            for vdi in busy:
                writers.enter_context(closing(open_vdi(control, vdi.uuid, write=True, purpose="test")))
            waiting = [pool.submit(file.read_bytes) for file in files]
            assert alone.read_bytes() == bytes(2 * MIB)
            assert not any(each.done() for each in waiting)
        assert [each.result(30) for each in waiting] == [bytes(2 * MIB)] * len(busy)
    for vdi in busy:
        wait_until_free(site.gateway, vdi)


@needs_loops
@pytest.mark.parametrize("kind", ["vhd", "raw"])
def test_readers_get_the_same_bytes_while_they_are_pushed_out_of_memory(
    site: Site, mount: Mounted, chain: Vdi, content: Path, kind: str
) -> None:
    vdi = chain
    if kind == "raw":
        vdi = site.create_vdi(chain.size, kind)
        write_changes(site, vdi, content, None)
    images = [path for path in site.directory.iterdir() if path.suffix in (".vhd", ".raw")]
    ending = threading.Event()

    def push_out() -> None:
        while not ending.is_set():
            for image in images:
                with image.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            ending.wait(0.01)

    pusher = threading.Thread(target=push_out)
    pusher.start()
    try:
        for name in ("disk.raw", "disk.vhd", "disk.qcow2"):
            file = mount.of(vdi, name)
            with ThreadPoolExecutor(6) as pool:
                found = set(pool.map(partial(read_in_pieces, file), range(6)))
            if name == "disk.raw":
                assert found == {digest(content)}
            assert len(found) == 1
        device = run("losetup", "--find", "--show", "--read-only", mount.of(vdi, "disk.raw")).strip()
        try:
            with open(device, "rb", buffering=0) as looped, content.open("rb") as wanted:
                for number in random.Random(7).sample(range(vdi.size // 4096), 300):
                    looked_at = os.pread(looped.fileno(), 4096, number * 4096)
                    assert looked_at == os.pread(wanted.fileno(), 4096, number * 4096)
        finally:
            run("losetup", "--detach", device)
    finally:
        ending.set()
        pusher.join()
    wait_until_free(site.gateway, vdi)
