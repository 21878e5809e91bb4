import errno
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.images.chain import open_chain_files
from gateway.images.errors import ImageTooLarge, UnsupportedImage
from gateway.images.files import Buffer, FileCalls
from gateway.images.vhd.create import create_differencing, create_dynamic, create_fixed
from gateway.images.vhd.format import EPOCH, MAX_VIRTUAL_SIZE, NO_ID, BatmapHeader, Platform
from tests.images.disks import inspect, make_child

MIB = 1 << 20


def test_a_dynamic_image_is_laid_out_as_tapdisk_lays_it_out(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    unique_id = uuid.uuid4()
    create_dynamic(str(path), 1 << 30, unique_id=unique_id)
    content = path.read_bytes()
    image = inspect(path)
    assert content[:512] == content[-512:] == image.footer.pack()
    assert image.unique_id == unique_id
    assert image.header is not None
    assert (image.header.table_offset, image.header.version) == (1536, 0x00010000)
    assert content[1536 : 1536 + 4 * 512] == b"\xff" * (4 * 512)
    batmap = BatmapHeader.unpack(content[1536 + 2048 : 1536 + 2560], "x")
    assert (batmap.map_offset, batmap.map_sectors) == (1536 + 2560, 1)
    assert len(content) == 1536 + 2048 + 512 + 512 + 512
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_differencing_image_names_its_parent_in_three_locators(tmp_path: Path) -> None:
    parent, child = tmp_path / "parent.vhd", tmp_path / "child.vhd"
    create_dynamic(str(parent), 4 * MIB)
    os.utime(parent, (time.time() + 10**6, time.time() + 10**6))
    make_child(child, parent)
    image = inspect(child)
    header = image.header
    assert header is not None
    content = child.read_bytes()
    stored = [
        (item.platform, item.data_space, content[item.data_offset : item.data_offset + item.data_length])
        for item in header.locators[:3]
    ]
    windows = ".\\parent.vhd".encode("utf-16-le")
    assert stored == [
        (Platform.MACX, 512, b"file://./parent.vhd"),
        (Platform.W2KU, 512, windows),
        (Platform.W2RU, 512, windows),
    ]
    assert [item.data_offset for item in header.locators[:3]] == [3072, 3584, 4096]
    assert header.parent_name.decode("utf-16-be").rstrip("\0") == "parent.vhd"
    assert header.parent_id == inspect(parent).unique_id
    assert header.parent_timestamp + EPOCH <= time.time()
    assert image.size == 4 * MIB


def test_a_child_of_a_raw_image_has_no_parent_id_and_holds_all_of_it(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(4 * MIB + 5))
    make_child(tmp_path / "child.vhd", tmp_path / "base.raw")
    image = inspect(tmp_path / "child.vhd")
    assert image.header is not None
    assert image.header.parent_id.int == 0
    assert image.size == 4 * MIB + 512


def test_a_fixed_image_takes_no_space(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    create_fixed(str(path), 1 << 30)
    assert path.stat().st_size == (1 << 30) + 512
    assert path.stat().st_blocks * 512 < 64 * 1024
    assert inspect(path).header is None


def test_the_largest_size_is_made_and_more_is_refused_without_a_file(tmp_path: Path) -> None:
    create_dynamic(str(tmp_path / "a.vhd"), MAX_VIRTUAL_SIZE)
    for create in (create_dynamic, create_fixed):
        with pytest.raises(ImageTooLarge, match="2040 GiB"):
            create(str(tmp_path / "b.vhd"), MAX_VIRTUAL_SIZE + (2 << 20))
        with pytest.raises(ValueError, match="multiple of 512"):
            create(str(tmp_path / "b.vhd"), 1000)
    assert not (tmp_path / "b.vhd").exists()


def test_an_existing_file_is_never_touched(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        create_dynamic(str(path), MIB)
    assert path.read_bytes() == b"precious"


def test_a_failure_leaves_no_file_and_no_descriptor(tmp_path: Path) -> None:
    class Full(FileCalls):
        def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
            super().pwrite(fd, bytes(data)[:700], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No space"):
        create_dynamic(str(tmp_path / "a.vhd"), MIB, files=Full())
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_longest_name_of_a_parent_fits(tmp_path: Path) -> None:
    parent, child = tmp_path / ("ü" * 125 + "p.vhd"), tmp_path / "c.vhd"
    create_dynamic(str(parent), MIB)
    make_child(child, parent)
    chain = open_chain_files(str(child), writable=False)
    assert chain.nodes[0].parent == parent.name
    chain.close()


@pytest.mark.parametrize("name", ["parent.img", ".parent.vhd"])
def test_a_parents_name_that_no_chain_accepts_is_refused(tmp_path: Path, name: str) -> None:
    parent = tmp_path / "real.vhd"
    create_dynamic(str(parent), MIB)
    parent.rename(tmp_path / name)
    with pytest.raises(UnsupportedImage):
        create_differencing(str(tmp_path / "c.vhd"), str(tmp_path / name), inspect(tmp_path / name))


@pytest.mark.parametrize("create", [create_dynamic, create_fixed])
def test_nothing_is_made_to_stand_on_an_image_that_its_id_does_not_tell_from_a_raw_one(
    tmp_path: Path, create: Callable[..., None]
) -> None:
    """Some programs write footers without an id; a child with that as its parent's means a raw parent."""
    parent, child = tmp_path / "a.vhd", tmp_path / "b.vhd"
    create(str(parent), MIB, unique_id=NO_ID)
    with pytest.raises(UnsupportedImage, match="all zeroes"):
        make_child(child, parent)
    assert not child.exists()
