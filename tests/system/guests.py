"""Disks as guests leave them: partitions with real file systems, written to in three steps, one for each
level of a chain.

Each file system is an image of its own until the disk is put together, and it is the kernel, ntfs-3g and
mtools that write to it. The trap: what ntfs-3g writes is there after umount only where it mounted a block
device.
"""

import json
import random
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gateway.access.client import open_vdi
from tests.system.mounted import digests, filesystem, loop_device, ntfs_3g, run
from tests.system.site import MIB, Site, Vdi

STEPS = 3
GRAIN = 65536
_ALIGNED = MIB
GPT, MBR = "gpt", "dos"


@dataclass(frozen=True)
class Kind:
    """A kind of file system, and how to make one in a file."""

    name: str
    size: int
    make: tuple[str, ...]
    types: dict[str, str]

    @property
    def programs(self) -> tuple[str, ...]:
        return (self.make[0], *{"vfat": ("mcopy",), "ntfs": ("ntfs-3g",)}.get(self.name, ()))


_LINUX = {GPT: "0FC63DAF-8483-4772-8E79-3D69D8477DE4", MBR: "83"}
_MICROSOFT = "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7"
KINDS = (
    Kind("ext4", 16 * MIB, ("mkfs.ext4", "-q"), _LINUX),
    # Smaller than anybody should have it.
    Kind("xfs", 20 * MIB, ("mkfs.xfs", "-q", "--unsupported"), _LINUX),
    Kind("vfat", 12 * MIB, ("mkfs.vfat",), {GPT: _MICROSOFT, MBR: "c"}),
    Kind("ntfs", 12 * MIB, ("mkntfs", "-F", "-Q", "-q"), {GPT: _MICROSOFT, MBR: "7"}),
)


def missing_programs() -> list[str]:
    """What has to be installed for these disks."""
    return [name for kind in KINDS for name in kind.programs if shutil.which(name) is None]


@dataclass
class Guest:
    """A file system of one kind: its image after each step, and the digests of its files after the last."""

    kind: Kind
    images: list[Path] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)


def make_guests(
    directory: Path, seed: int, only: Collection[str] = ("ext4", "xfs", "vfat", "ntfs")
) -> list[Guest]:
    """One file system of each kind, in `directory`."""
    rng = random.Random(seed)
    return [_make_guest(directory, kind, rng) for kind in KINDS if kind.name in only]


def _make_guest(directory: Path, kind: Kind, rng: random.Random) -> Guest:
    guest = Guest(kind)
    image, root = directory / kind.name, directory / f"{kind.name}.files"
    with image.open("wb") as file:
        file.truncate(kind.size)
    run(*kind.make, image)
    for step in range(STEPS):
        with _writable(kind, image, root) as files:
            change(files, step, rng)
            guest.files = digests(files)
        kept = directory / f"{kind.name}.{step}"
        run("cp", "--sparse=always", image, kept)
        guest.images.append(kept)
    assert len(guest.files) > 10
    return guest


@contextmanager
def _writable(kind: Kind, image: Path, root: Path) -> Iterator[Path]:
    match kind.name:
        case "vfat":
            # Not every kernel has it.
            root.mkdir(exist_ok=True)
            yield root
            run("mkfs.vfat", "-i", "20261123", image)
            run("mcopy", "-s", "-Q", "-i", image, *sorted(root.iterdir()), "::")
        case "ntfs":
            with loop_device(image, write=True) as device, ntfs_3g(device, root) as files:
                yield files
        case _:
            with filesystem(image, root, kind=kind.name) as files:
                yield files


def change(files: Path, step: int, rng: random.Random) -> None:
    """What a guest does in a while: new files, others rewritten in part, some gone."""
    folder = files / f"step {step}" / "Ünïcode"
    folder.mkdir(parents=True)
    for number in range(12):
        (folder / f"small-{number}.txt").write_bytes(rng.randbytes(rng.randrange(1, 3000)))
    (folder / "large").write_bytes(rng.randbytes(rng.randrange(700_000, 1_200_000)))
    (folder / "empty").touch()
    earlier = [path for path in files.rglob("*") if path.is_file() and f"step {step}" not in path.parts]
    for path in sorted(rng.sample(sorted(earlier), len(earlier) // 3)):
        if path.stat().st_size == 0 or rng.randrange(4) == 0:
            path.unlink()
            continue
        with path.open("r+b") as file:
            file.seek(rng.randrange(path.stat().st_size))
            file.write(rng.randbytes(rng.randrange(1, 20_000)))


@dataclass(frozen=True)
class Disk:
    """A disk with all guests in a chain as deep as there are steps; `image` is what it holds now.

    `table` has the start and the length in bytes of each partition.
    """

    vdi: Vdi
    image: Path
    table: dict[int, tuple[int, int]]
    partitions: dict[int, Guest]


def make_disk(site: Site, directory: Path, guests: list[Guest], table: str) -> Disk:
    """With MBR, all but the first are logical partitions."""
    image = directory / f"disk.{table}"
    size = sum(guest.kind.size + 2 * _ALIGNED for guest in guests) + 2 * _ALIGNED
    with image.open("wb") as file:
        file.truncate(size)
    lines = [f"label: {table}"]
    for place, guest in enumerate(guests):
        if table == MBR and place == 1:
            lines.append("type=5")
        lines.append(f"size={guest.kind.size // 512}, type={guest.kind.types[table]}")
    run("sfdisk", "--quiet", image, given="\n".join(lines) + "\n")
    found = json.loads(run("sfdisk", "--json", image))["partitiontable"]["partitions"]
    numbers = [int(each["node"].removeprefix(str(image))) for each in found]
    table_of = {
        number: (int(each["start"]) * 512, int(each["size"]) * 512)
        for number, each in zip(numbers, found, strict=True)
    }
    filled = [number for number, each in zip(numbers, found, strict=True) if each["type"] != "5"]
    vdi = site.create_vdi(size)
    before = None
    for step in range(STEPS):
        if step:
            site.gateway.call("VDI.snapshot", vdi.ref, {})
        for number, guest in zip(filled, guests, strict=True):
            _put(guest.images[step], image, table_of[number][0])
        write_changes(site, vdi, image, before)
        before = image.read_bytes()
    return Disk(vdi, image, table_of, dict(zip(filled, guests, strict=True)))


def _put(source: Path, target: Path, start: int) -> None:
    with source.open("rb") as reading, target.open("r+b") as writing:
        writing.seek(start)
        shutil.copyfileobj(reading, writing, MIB)


def write_changes(site: Site, vdi: Vdi, image: Path, before: bytes | None) -> None:
    """Write to the VDI where an image differs from what it was."""
    written = 0
    control = str(site.gateway.state_dir / "access.sock")
    with closing(open_vdi(control, vdi.uuid, write=True, purpose="test")) as disk, image.open("rb") as file:
        for offset in range(0, vdi.size, GRAIN):
            piece = file.read(GRAIN)
            was = bytes(len(piece)) if before is None else before[offset : offset + len(piece)]
            if piece != was:
                disk.pwrite(piece, offset)
                written += 1
    assert written, "nothing has changed"


def readers(guest: Guest) -> dict[str, Callable[[Path, Path], AbstractContextManager[Path]]]:
    """How the files of a guest can be looked at on this machine: what mounts a partition on a directory."""
    name = guest.kind.name
    in_kernel = {
        "ext4": lambda source, to: filesystem(source, to, "ro", "noload", kind="ext4"),
        "xfs": lambda source, to: filesystem(source, to, "ro", "norecovery", "nouuid", kind="xfs"),
        "vfat": lambda source, to: filesystem(source, to, "ro", "utf8", kind="vfat"),
        "ntfs": lambda source, to: filesystem(source, to, "ro", kind="ntfs3"),
    }
    known = {line.split()[-1] for line in Path("/proc/filesystems").read_text().splitlines()}
    found: dict[str, Callable[[Path, Path], AbstractContextManager[Path]]] = {}
    if ("ntfs3" if name == "ntfs" else name) in known:
        found["kernel"] = in_kernel[name]
    if name == "ntfs":
        found["ntfs-3g"] = lambda source, to: ntfs_3g(source, to, "ro", "norecover")
        found["ntfs-3g on a loop device"] = _looped_ntfs_3g
    if name == "vfat":
        found["mtools"] = _copied_by_mtools
    return found


@contextmanager
def _looped_ntfs_3g(source: Path, to: Path) -> Iterator[Path]:
    with loop_device(source) as device, ntfs_3g(device, to, "ro", "norecover") as files:
        yield files


@contextmanager
def _copied_by_mtools(source: Path, to: Path) -> Iterator[Path]:
    to.mkdir()
    run("mcopy", "-s", "-n", "-Q", "-i", source, "::*", to)
    yield to
