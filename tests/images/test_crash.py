"""Crashes of everything that writes a VHD: after a kill or a power failure at any point each reader opens
each file, what a flush promised is there, and nothing else than what was once written to a place."""

import errno
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.images.disk import Disk
from gateway.images.files import FileCalls
from gateway.images.vhd.check import check_vhd, repair_vhd
from gateway.images.vhd.create import create_differencing, create_dynamic, create_fixed, set_hidden
from gateway.images.vhd.format import Footer
from gateway.images.vhd.image import open_vhd
from tests.crash import CrashState, RecordingFileCalls
from tests.images.disks import content, inspect, libvhdi_reads, make_child, open_leaf

SECTOR = 512
FLUSHED = "flushed"


class Expectation:
    """What each sector may hold after a crash: what was flushed, or anything written to it since."""

    def __init__(self, content: bytes, *, parts_of_sectors: bool = False) -> None:
        self.parts_of_sectors = parts_of_sectors
        self.current = bytearray(content)
        self.flushed = bytearray(content)
        self.possible: dict[int, set[bytes]] = {}
        self.seen = 0

    def follow(self, marks: tuple[object, ...]) -> None:
        for mark in marks[self.seen :]:
            if mark == FLUSHED:
                self.flushed[:] = self.current
                self.possible.clear()
                continue
            assert isinstance(mark, tuple)
            offset, data = mark
            self.current[offset : offset + len(data)] = data
            for sector in range(offset // SECTOR, -(-(offset + len(data)) // SECTOR)):
                value = bytes(self.current[sector * SECTOR : (sector + 1) * SECTOR])
                self.possible.setdefault(sector, set()).add(value)
        self.seen = len(marks)

    def check(self, content: bytes, who: str, story: object, misread: frozenset[int] = frozenset()) -> None:
        if content == self.flushed:
            return
        assert len(content) == len(self.flushed), f"{who} sees another size: {story}"
        for sector in range(len(content) // SECTOR):
            place = slice(sector * SECTOR, (sector + 1) * SECTOR)
            value = content[place]
            if value != self.flushed[place] and sector not in misread:
                assert self.allows(sector, value), f"{who}, sector {sector} is wrong: {story}"

    def allows(self, sector: int, value: bytes) -> bool:
        """A fixed disk takes parts of sectors as they come, and the model may lose one part of two."""
        possible = self.possible.get(sector, set())
        if value in possible or not self.parts_of_sectors:
            return value in possible
        flushed = self.flushed[sector * SECTOR : (sector + 1) * SECTOR]
        return all(
            byte in choice for byte, choice in zip(value, zip(flushed, *possible, strict=True), strict=True)
        )


def misread_by_libvhdi(path: Path) -> frozenset[int]:
    """libvhdi takes the clear bits after a set one in the same byte of a bitmap for set ones."""
    with path.open("rb") as source:
        image = open_vhd(source.fileno(), str(path))
        sectors: set[int] = set()
        for block in range(image.blocks):
            offset = image.block_offset(block)
            if offset is None:
                continue
            for index, byte in enumerate(image.read_bitmap(offset)):
                first = block * image.sectors_per_block + index * 8
                clear = [bit for bit in range(9 - byte.bit_length(), 8) if not byte & (0x80 >> bit)]
                sectors.update(first + bit for bit in clear if byte)
    return frozenset(sectors)


def read_by_qemu(path: Path) -> bytes:
    raw = path.with_suffix(".qemu")
    command = ["qemu-img", "convert", "-f", "vpc", "-O", "raw", str(path), str(raw)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    content = raw.read_bytes()
    raw.unlink()
    return content


def check_files(paths: list[Path], expectation: Expectation, state: object, *, qemu: bool) -> None:
    """Let every reader open the chain (leaf first) and hold what it reads against the expectation."""
    expectation.check(content(paths[0]), "we", state)
    misread = misread_by_libvhdi(paths[0]) if len(paths) > 1 else frozenset()
    expectation.check(libvhdi_reads(paths), "libvhdi", state, misread)
    for path in paths:
        assert check_vhd(str(path)).errors == (), state
    if qemu and len(paths) == 1:  # qemu takes no notice of a VHD's parent
        expectation.check(read_by_qemu(paths[0]), "qemu", state)


def go_on(path: Path, rng: random.Random, expectation: Expectation, *, alone: bool) -> None:
    """After a crash the image can be written to as if nothing had been."""
    before = bytearray(content(path))
    disk = open_leaf(path, writable=True)
    for _ in range(6):
        offset = rng.randrange(len(before) // SECTOR) * SECTOR
        data = rng.randbytes(min(3 * SECTOR, len(before) - offset))
        disk.pwrite(data, offset)
        before[offset : offset + len(data)] = data
    disk.close()
    assert content(path) == before
    assert check_vhd(str(path)).errors == ()
    if not alone:
        return
    # qemu looks at no bitmap: it sees an unflushed write too, but nothing that only lies there.
    theirs = read_by_qemu(path)
    for sector in range(len(before) // SECTOR):
        value = theirs[sector * SECTOR : (sector + 1) * SECTOR]
        if value != before[sector * SECTOR : (sector + 1) * SECTOR]:
            assert expectation.allows(sector, value), sector


class Work:
    """Random requests to an image that is written in place, with the promises noted."""

    def __init__(self, path: Path, files: RecordingFileCalls, rng: random.Random) -> None:
        self.path = path
        self.files = files
        self.rng = rng

    def session(self, requests: int) -> None:
        disk = open_leaf(self.path, writable=True, files=self.files)
        for _ in range(requests):
            self.request(disk)
        disk.close()
        self.files.mark(FLUSHED)

    def request(self, disk: Disk) -> None:
        rng = self.rng
        match rng.choices(("write", "odd write", "zero", "trim", "flush"), (6, 2, 2, 2, 4))[0]:
            case "write":
                offset = rng.randrange(disk.size // SECTOR) * SECTOR
                length = min(rng.choice((1, 2, 8, 20)) * SECTOR, disk.size - offset)
                data = rng.randbytes(length)
                self.files.mark((offset, data))
                disk.pwrite(data, offset)
            case "odd write":
                offset = rng.randrange(disk.size)
                data = rng.randbytes(min(rng.randrange(1, 1500), disk.size - offset))
                self.files.mark((offset, data))
                disk.pwrite(data, offset)
            case "flush":
                disk.flush()
                self.files.mark(FLUSHED)
            case kind:
                offset = rng.randrange(disk.size // SECTOR) * SECTOR
                length = min(rng.choice((1, 8, 16, 30)) * SECTOR, disk.size - offset)
                self.files.mark((offset, bytes(length)))
                disk.zero(offset, length, trim=kind == "trim")


class Scene:
    """A directory with an image in it, and the calls that were made there."""

    def __init__(self, tmp_path: Path, seed: int) -> None:
        self.root = tmp_path / "sr"
        self.root.mkdir()
        self.into = tmp_path / "crashed"
        self.rng = random.Random(seed)

    def states(self, files: RecordingFileCalls, per_point: int) -> Iterator[CrashState]:
        yield from files.kill_states(self.into / "kill")
        yield from files.power_states(self.into / "power", self.rng, per_point)


def run_in_place(
    scene: Scene,
    names: list[str],
    *,
    per_point: int,
    qemu_every: int,
    go_on_every: int,
    sessions: int = 2,
    requests: int = 10,
) -> None:
    """Write to the image names[0] in place, then look at every way in which a crash may leave it."""
    before = content(scene.root / names[0])
    files = RecordingFileCalls(scene.root)
    work = Work(scene.root / names[0], files, scene.rng)
    for _ in range(sessions):
        work.session(requests)
    fixed = inspect(scene.root / names[0]).header is None
    kinds = {kind: Expectation(before, parts_of_sectors=fixed) for kind in ("kill", "power")}
    for number, state in enumerate(scene.states(files, per_point)):
        expectation = kinds[state.directory.parent.name]
        expectation.follow(state.marks)
        paths = [state.directory / name for name in names]
        check_files(paths, expectation, state, qemu=number % qemu_every == 0)
        if number % go_on_every == 0:
            go_on(paths[0], scene.rng, expectation, alone=len(paths) == 1)
    assert expectation.current == content(scene.root / names[0])


Make = Callable[[Scene, int], list[str]]


def make_dynamic(scene: Scene, block_size: int) -> list[str]:
    create_dynamic(str(scene.root / "image.vhd"), 9 * block_size + SECTOR, block_size=block_size)
    return ["image.vhd"]


def make_differencing(scene: Scene, block_size: int) -> list[str]:
    size = 9 * block_size + SECTOR
    base = scene.root / "base.vhd"
    create_dynamic(str(base), size, block_size=block_size)
    disk = open_leaf(base, writable=True)
    for block in (0, 2, 3, 8):
        disk.pwrite(scene.rng.randbytes(block_size - SECTOR), block * block_size + SECTOR * (block % 2))
    disk.close()
    make_child(scene.root / "image.vhd", base, block_size=block_size)
    return ["image.vhd", "base.vhd"]


def make_fixed(scene: Scene, block_size: int) -> list[str]:
    create_fixed(str(scene.root / "image.vhd"), 3 * block_size)
    return ["image.vhd"]


@pytest.mark.parametrize("block_size", [4096, 16384])
@pytest.mark.parametrize("make", [make_dynamic, make_differencing, make_fixed])
class TestWritingInPlace:
    def test_loses_nothing_that_was_flushed(self, tmp_path: Path, make: Make, block_size: int) -> None:
        scene = Scene(tmp_path, seed=block_size)
        names = make(scene, block_size)
        run_in_place(scene, names, per_point=2, qemu_every=40, go_on_every=10)

    @pytest.mark.long
    @pytest.mark.timeout(1800)
    @pytest.mark.parametrize("seed", range(4))
    def test_loses_nothing_that_was_flushed_in_many_states(
        self, tmp_path: Path, make: Make, block_size: int, seed: int
    ) -> None:
        scene = Scene(tmp_path, seed)
        names = make(scene, block_size)
        run_in_place(scene, names, per_point=4, qemu_every=25, go_on_every=15, sessions=3, requests=25)


def test_writing_into_a_large_image_grows_it_in_steps_that_a_crash_forgives(tmp_path: Path) -> None:
    scene = Scene(tmp_path, seed=7)
    create_dynamic(str(scene.root / "image.vhd"), 12 << 20)
    run_in_place(scene, ["image.vhd"], per_point=1, qemu_every=20, go_on_every=9, sessions=1, requests=5)


# Creation


def create_by_renaming(scene: Scene, files: RecordingFileCalls, kind: str) -> None:
    """As a repository does it: made in a staging directory, then renamed."""
    files.mkdir(str(scene.root / "staging"))
    staged = str(scene.root / "staging" / "new")
    size = 5 * 4096
    if kind == "dynamic":
        create_dynamic(staged, size, block_size=4096, files=files)
    elif kind == "fixed":
        create_fixed(staged, size, files=files)
    else:
        base = inspect(scene.root / "base.vhd")
        create_differencing(staged, str(scene.root / "base.vhd"), base, block_size=4096, files=files)
    files.rename(staged, str(scene.root / "new.vhd"))
    files.sync_directory(str(scene.root))
    files.mark("created")


@pytest.mark.parametrize("kind", ["dynamic", "fixed", "differencing"])
def test_a_created_image_is_whole_or_not_there(tmp_path: Path, kind: str) -> None:
    scene = Scene(tmp_path, seed=1)
    content = bytes(5 * 4096)
    if kind == "differencing":
        base = scene.root / "base.vhd"
        create_dynamic(str(base), len(content), block_size=4096)
        disk = open_leaf(base, writable=True)
        content = scene.rng.randbytes(len(content))
        disk.pwrite(content, 0)
        disk.close()
    files = RecordingFileCalls(scene.root)
    create_by_renaming(scene, files, kind)
    created = 0
    for number, state in enumerate(scene.states(files, per_point=12)):
        path = state.directory / "new.vhd"
        if not path.exists():
            assert "created" not in state.marks, state
            continue
        created += 1
        chain = [path, state.directory / "base.vhd"] if kind == "differencing" else [path]
        check_files(chain, Expectation(content), state, qemu=number % 10 == 0)
    assert created


@pytest.mark.parametrize("failing", ["pwrite", "sync", "sync_directory"])
def test_a_failed_creation_leaves_no_file(tmp_path: Path, failing: str) -> None:
    class Full(FileCalls):
        pass

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    setattr(Full, failing, fail)
    with pytest.raises(OSError, match="No space"):
        create_dynamic(str(tmp_path / "new.vhd"), 1 << 21, files=Full())
    assert list(tmp_path.iterdir()) == []


# The hidden flag


def test_hiding_an_image_is_done_or_not_done(tmp_path: Path) -> None:
    scene = Scene(tmp_path, seed=3)
    names = make_dynamic(scene, 4096)
    image = scene.root / names[0]
    disk = open_leaf(image, writable=True)
    content = scene.rng.randbytes(disk.size)
    disk.pwrite(content, 0)
    disk.close()
    files = RecordingFileCalls(scene.root)
    set_hidden(str(image), True, files=files)
    files.mark("hidden")
    for state in scene.states(files, per_point=20):
        path = state.directory / names[0]
        check_files([path], Expectation(content), state, qemu=False)
        if "hidden" in state.marks:
            assert inspect(path).footer.hidden, state
            assert Footer.unpack(path.read_bytes()[:512], "x").hidden, state


# Repairs


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    table = inspect(path).header
    assert table is not None
    with path.open("r+b") as out:
        match kind:
            case "footer":
                out.seek(len(content) - 512)
                out.write(b"\xff" * 512)
            case "copy":
                out.write(bytes(512))
            case "trailing":
                out.seek(len(content))
                out.write(b"x" * 5000)
            case "lost":
                out.seek(table.table_offset + 4 * 7)
                out.write(b"\x00\x7f\x00\x00")
            case "batmap":
                out.seek(table.table_end + 512)
                out.write(b"\xff")


@pytest.mark.parametrize("kind", ["footer", "copy", "trailing", "lost", "batmap"])
def test_an_interrupted_repair_can_be_done_again(tmp_path: Path, kind: str) -> None:
    scene = Scene(tmp_path, seed=5)
    (name,) = make_dynamic(scene, 4096)
    image = scene.root / name
    disk = open_leaf(image, writable=True)
    content = bytearray(disk.size)
    for block in (1, 4, 5):
        content[block * 4096 : (block + 1) * 4096] = scene.rng.randbytes(4096)
        disk.pwrite(content[block * 4096 : (block + 1) * 4096], block * 4096)
    disk.close()
    damage(image, kind)
    files = RecordingFileCalls(scene.root)
    assert repair_vhd(str(image), files).problems == ()
    for state in scene.states(files, per_point=10):
        path = state.directory / name
        assert repair_vhd(str(path)).problems == (), state
        check_files([path], Expectation(bytes(content)), state, qemu=False)
