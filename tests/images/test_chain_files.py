"""Which files become a chain, and which never do."""

import errno
import itertools
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.images.chain import NodeKind, chain_is_current, open_chain_files, open_disk
from gateway.images.errors import CorruptImage, ImageError, MissingParent, UnsupportedImage
from gateway.images.vhd.create import create_dynamic
from gateway.images.vhd.format import MAX_VIRTUAL_SIZE, DiskType, DynamicHeader
from gateway.images.vhd.relink import set_parent
from tests.images.damaged import Vhd
from tests.images.disks import inspect, make_child, open_leaf, read

MIB = 1 << 20


@pytest.fixture
def family(tmp_path: Path) -> tuple[Path, Path, Path]:
    root, middle, leaf = (tmp_path / f"{name}.vhd" for name in ("root", "middle", "leaf"))
    create_dynamic(str(root), 4 * MIB)
    make_child(middle, root)
    make_child(leaf, middle)
    for path, text in ((root, b"root"), (middle, b"midd")):
        disk = open_leaf(path, writable=True)
        disk.pwrite(text, 0 if path == root else 512)
        disk.close()
    return root, middle, leaf


def failing_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every close fails as on a network file system whose server has no room: the descriptor is gone."""
    real = os.close

    def close(fd: int) -> None:
        real(fd)
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "close", close)


def open_in(directory: Path) -> list[str]:
    links = (Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
    targets = (os.readlink(link) for link in links if link.is_symlink())
    return [target for target in targets if target.startswith(str(directory))]


def test_a_chain_closes_all_its_files_whatever_a_close_says(
    family: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = open_chain_files(str(family[2]), writable=True)
    assert len(open_in(tmp_path)) == 3
    with monkeypatch.context() as patch:
        failing_closes(patch)
        chain.close()
    assert open_in(tmp_path) == []


def test_a_disk_closes_all_its_files_and_tells_that_a_close_failed(
    family: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = open_leaf(family[2])
    assert len(open_in(tmp_path)) == 3
    with monkeypatch.context() as patch:
        failing_closes(patch)
        with pytest.raises(OSError, match="quota"):
            disk.close()
    assert open_in(tmp_path) == []


def rename_parent(child: Path, name: str) -> None:
    """Make every name that a child has for its parent another one, with a right checksum."""
    image = inspect(child)
    header = image.header
    assert header is not None
    path = f"./{name}".encode("utf-16-le")
    with child.open("r+b") as file:
        locators = []
        for locator in header.locators[:3]:
            data = f"file://./{name}".encode() if locator is header.locators[0] else path
            file.seek(locator.data_offset)
            file.write(data.ljust(512, b"\0"))
            locators.append(replace(locator, data_length=len(data)))
        stored = name.encode("utf-16-be").ljust(512, b"\0")
        file.seek(512)
        file.write(replace(header, parent_name=stored, locators=(*locators, *header.locators[3:])).pack())


def change_header(child: Path, **changes: object) -> None:
    header = inspect(child).header
    assert header is not None
    with child.open("r+b") as file:
        file.seek(512)
        file.write(replace(header, **changes).pack())  # type: ignore[arg-type]  # any field of the dataclass


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_chain_is_opened_leaf_first_and_read_through(family: tuple[Path, Path, Path]) -> None:
    before = open_files()
    chain = open_chain_files(str(family[2]), writable=True)
    assert [Path(node.path).name for node in chain.nodes] == ["leaf.vhd", "middle.vhd", "root.vhd"]
    assert [node.parent for node in chain.nodes] == ["middle.vhd", "root.vhd", None]
    assert chain.depth == 3
    assert chain_is_current(chain)
    modes = [os.O_ACCMODE & int(flags(node.fd), 8) for node in chain.nodes]
    assert modes == [os.O_RDWR, os.O_RDONLY, os.O_RDONLY]
    disk = open_disk(chain)
    chain.close()
    assert read(disk, 0, 4) + read(disk, 512, 4) == b"rootmidd"
    with pytest.raises(ValueError, match="belong"):
        open_disk(chain)
    disk.close()
    disk.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        read(disk, 0, 4)
    assert open_files() == before


def flags(fd: int) -> str:
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        if line.startswith("flags:"):
            return line.split()[1]
    raise AssertionError


def test_a_chain_that_is_only_closed_leaves_no_descriptor(family: tuple[Path, Path, Path]) -> None:
    before = open_files()
    chain = open_chain_files(str(family[2]), writable=False)
    chain.close()
    chain.close()
    assert open_files() == before


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_chain_is_no_longer_current_when_a_file_was_replaced(
    family: tuple[Path, Path, Path], level: int
) -> None:
    chain = open_chain_files(str(family[2]), writable=False)
    copy = family[level].with_suffix(".new")
    shutil.copy(family[level], copy)
    copy.rename(family[level])
    assert not chain_is_current(chain)
    chain.close()


def test_a_chain_is_no_longer_current_when_a_file_is_gone(family: tuple[Path, Path, Path]) -> None:
    chain = open_chain_files(str(family[2]), writable=False)
    family[1].unlink()
    assert not chain_is_current(chain)
    chain.close()


def test_a_chain_is_no_longer_current_when_its_raw_root_gave_way_to_another(tmp_path: Path) -> None:
    raw, leaf, other = (tmp_path / name for name in ("raw.raw", "leaf.vhd", "other.vhd"))
    raw.write_bytes(bytes(4 * MIB))
    make_child(leaf, raw)
    create_dynamic(str(other), 4 * MIB)
    chain = open_chain_files(str(leaf), writable=False)
    set_parent(str(leaf), str(other), keep=str(tmp_path / "keep"))
    assert not chain_is_current(chain)
    chain.close()
    chain = open_chain_files(str(leaf), writable=False)
    Vhd(leaf).set_footers(disk_type=DiskType.DYNAMIC)
    assert not chain_is_current(chain)
    chain.close()


def test_a_chain_is_no_longer_current_when_a_child_was_relinked(family: tuple[Path, Path, Path]) -> None:
    root, _, leaf = family
    chain = open_chain_files(str(leaf), writable=False)
    rename_parent(leaf, "root.vhd")
    change_header(leaf, parent_id=inspect(root).unique_id)
    assert not chain_is_current(chain)
    chain.close()
    relinked = open_chain_files(str(leaf), writable=False)
    assert relinked.depth == 2
    relinked.close()


def test_a_missing_parent_is_named(family: tuple[Path, Path, Path]) -> None:
    family[1].unlink()
    before = open_files()
    with pytest.raises(MissingParent, match=r"leaf\.vhd: its parent middle\.vhd"):
        open_chain_files(str(family[2]), writable=False)
    assert open_files() == before


def test_another_disk_under_the_parents_name_is_refused(family: tuple[Path, Path, Path]) -> None:
    family[1].unlink()
    create_dynamic(str(family[1]), 4 * MIB)
    with pytest.raises(CorruptImage, match=r"middle\.vhd is another disk"):
        open_chain_files(str(family[2]), writable=False)


@pytest.mark.parametrize("name", ["../root.vhd", "/etc/root.vhd", "sub/root.vhd"])
def test_a_parent_is_looked_for_in_the_same_directory_only(tmp_path: Path, name: str) -> None:
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    create_dynamic(str(tmp_path / "root.vhd"), 4 * MIB)
    shutil.copy(tmp_path / "root.vhd", here / "sub" / "root.vhd")
    make_child(here / "leaf.vhd", tmp_path / "root.vhd")
    rename_parent(here / "leaf.vhd", name)
    with pytest.raises(MissingParent):
        open_chain_files(str(here / "leaf.vhd"), writable=False)


@pytest.mark.parametrize(
    "name",
    [
        "passwd",
        ".hidden.vhd",
        "a\0.vhd",
        "x.vhd.tmp",
        "",
        pytest.param("\u20ac" * 84 + ".vhd", id="256 bytes"),
    ],
)
def test_a_name_that_no_repository_holds_is_no_parent(family: tuple[Path, Path, Path], name: str) -> None:
    rename_parent(family[2], name)
    with pytest.raises(CorruptImage, match="does not name its parent"):
        open_chain_files(str(family[2]), writable=False)


def make_link(path: Path, target: Path) -> None:
    path.symlink_to(target)


def make_pipe(path: Path, _: Path) -> None:
    os.mkfifo(path)


def make_directory(path: Path, _: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [make_link, make_pipe, make_directory])
@pytest.mark.parametrize("writable", [True, False])
def test_what_is_no_regular_file_is_no_image(tmp_path: Path, make: object, writable: bool) -> None:
    create_dynamic(str(tmp_path / "root.vhd"), 4 * MIB)
    make_child(tmp_path / "leaf.vhd", tmp_path / "root.vhd")
    (tmp_path / "root.vhd").rename(tmp_path / "elsewhere.vhd")
    assert callable(make)
    make(tmp_path / "root.vhd", tmp_path / "elsewhere.vhd")
    with pytest.raises(CorruptImage, match="not a regular file"):
        open_chain_files(str(tmp_path / "leaf.vhd"), writable=writable)
    with pytest.raises(CorruptImage, match="not a regular file"):
        open_chain_files(str(tmp_path / "root.vhd"), writable=writable)


def test_a_chain_that_comes_back_to_itself_is_corrupt(family: tuple[Path, Path, Path]) -> None:
    _, middle, leaf = family
    rename_parent(middle, "leaf.vhd")
    change_header(middle, parent_id=inspect(leaf).unique_id)
    before = open_files()
    with pytest.raises(CorruptImage, match=r"comes back to leaf\.vhd"):
        open_chain_files(str(leaf), writable=False)
    assert open_files() == before


def test_sixty_four_levels_are_read_and_sixty_five_refused(tmp_path: Path) -> None:
    paths = [tmp_path / f"{level}.vhd" for level in range(65)]
    create_dynamic(str(paths[0]), 4 * MIB)
    disk = open_leaf(paths[0], writable=True)
    disk.pwrite(b"deep", 0)
    disk.close()
    for parent, child in itertools.pairwise(paths):
        make_child(child, parent)
    disk = open_leaf(paths[63])
    assert read(disk, 0, 4) == b"deep"
    disk.close()
    with pytest.raises(CorruptImage, match="more than 64 levels"):
        open_chain_files(str(paths[64]), writable=False)


def test_a_raw_parent_serves_and_reads_as_zeroes_beyond_its_end(tmp_path: Path) -> None:
    base, leaf = tmp_path / "base.raw", tmp_path / "leaf.vhd"
    base.write_bytes(b"r" * 700)
    make_child(leaf, base, size=4 * MIB)
    chain = open_chain_files(str(leaf), writable=False)
    assert [node.kind for node in chain.nodes] == [NodeKind.VHD, NodeKind.RAW]
    assert chain_is_current(chain)
    disk = open_disk(chain)
    assert read(disk, 0, 4096) == b"r" * 700 + bytes(3396)
    disk.close()


def test_a_raw_parent_named_in_two_ways_is_refused(tmp_path: Path) -> None:
    for name in ("one.raw", "two.raw"):
        (tmp_path / name).write_bytes(bytes(MIB))
    leaf = tmp_path / "leaf.vhd"
    make_child(leaf, tmp_path / "one.raw")
    header = inspect(leaf).header
    assert header is not None
    with leaf.open("r+b") as file:
        file.seek(header.locators[2].data_offset)
        file.write(".\\two.raw".encode("utf-16-le"))
    with pytest.raises(CorruptImage, match="different raw parents"):
        open_chain_files(str(leaf), writable=False)


def test_a_strange_extension_is_unsupported(tmp_path: Path) -> None:
    (tmp_path / "a.img").write_bytes(bytes(512))
    with pytest.raises(UnsupportedImage, match=r"\.vhd or \.raw"):
        open_chain_files(str(tmp_path / "a.img"), writable=False)


def test_a_raw_image_is_a_disk_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(b"raw" + bytes(1000))
    disk = open_leaf(path, writable=True)
    assert disk.size == 1003
    disk.pwrite(b"RAW", 0)
    disk.close()
    assert path.read_bytes()[:3] == b"RAW"


def test_opening_two_tebibytes_reads_the_tables_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{level}.vhd" for level in range(3)]
    create_dynamic(str(paths[0]), MAX_VIRTUAL_SIZE)
    for parent, child in itertools.pairwise(paths):
        make_child(child, parent)
    header = inspect(paths[2]).header
    assert isinstance(header, DynamicHeader)
    bytes_read = 0
    preadv, pread = os.preadv, os.pread

    def counted_preadv(fd: int, buffers: tuple[memoryview, ...], offset: int) -> int:
        nonlocal bytes_read
        count = preadv(fd, buffers, offset)
        bytes_read += count
        return count

    def counted_pread(fd: int, length: int, offset: int) -> bytes:
        nonlocal bytes_read
        data = pread(fd, length, offset)
        bytes_read += len(data)
        return data

    monkeypatch.setattr(os, "preadv", counted_preadv)
    monkeypatch.setattr(os, "pread", counted_pread)
    disk = open_leaf(paths[2])
    assert bytes_read < 3 * (4 * header.max_table_entries + 16384)
    assert read(disk, 1 << 40, 4096) == bytes(4096)
    disk.close()


def test_errors_name_the_file_and_the_problem() -> None:
    error = ImageError("/sr/a.vhd", "it is broken")
    assert (error.path, error.problem, str(error)) == ("/sr/a.vhd", "it is broken", "/sr/a.vhd: it is broken")
