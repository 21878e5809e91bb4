"""A directory with backups of one disk: the manifest, its images, and who may write there.

Each generation is a qcow2 image, `<uuid of the snapshot>.qcow2`: whole, or an overlay over the one before,
which it names. So QEMU opens any of them without the manifest; what that adds are times, numbers and
checksums. Nothing here talks to a gateway.

The trap: only what the manifest names is part of the backup, and it is replaced as a whole, durably, after
the files it speaks of and before those go that it speaks of no more. Files that it has never named are
somebody else's, and stay.
"""

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from gateway.cli.output import CommandError
from gateway.images.files import FILES

MANIFEST: Final = "manifest.json"
_NEW_MANIFEST: Final = f"{MANIFEST}.new"
_LOCK: Final = "lock"
_FORMAT: Final = "vdi-gateway backup"
_VERSION: Final = 1
_LARGEST_MANIFEST: Final = 64 << 20  # bytes
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
# What may lie in a directory that is to become one with backups.
_NOT_COUNTED: Final = frozenset({_LOCK, _NEW_MANIFEST, "lost+found"})


@dataclass(frozen=True, slots=True)
class Generation:
    """One backup: the disk as it was at `time` (UTC), when `snapshot` (uuid) was taken. Sizes are bytes.

    `base` is the number of the generation that it stands on; None if its file is the whole disk. `etag` and
    `sha256` are of the file; `modified_ns` is when that was last written, as the file system tells it.
    """

    number: int
    time: str
    snapshot: str
    file: str
    base: int | None
    virtual_size: int
    file_size: int
    sha256: str
    etag: str
    modified_ns: int


@dataclass(frozen=True, slots=True)
class Attempt:
    """A backup that has begun. The gateway knows its snapshot by `mark`; `snapshot` is the uuid, if known."""

    mark: str
    base: int | None
    snapshot: str | None = None


@dataclass(frozen=True, slots=True)
class BackedUpDisk:
    """Whose backups these are: uuid, and the name it had last."""

    uuid: str
    name_label: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that is known of the backups. `discarded` are uuids of snapshots that go, with their files; of one
    whose uuid nobody knows, its mark."""

    vdi: BackedUpDisk
    generations: tuple[Generation, ...] = ()
    attempt: Attempt | None = None
    discarded: tuple[str, ...] = ()

    @property
    def newest(self) -> Generation | None:
        """The generation that was made last."""
        return self.generations[-1] if self.generations else None

    def chain(self, number: int) -> tuple[Generation, ...]:
        """What generation `number` is made of: the whole disk first, itself last. CommandError if unknown."""
        known = {generation.number: generation for generation in self.generations}
        if number not in known:
            numbers = ", ".join(map(str, known)) or "none"
            raise CommandError(f"there is no generation {number}; there are: {numbers}")
        chain = [known[number]]
        while (base := chain[-1].base) is not None:
            chain.append(known[base])
        return tuple(reversed(chain))


@dataclass(frozen=True, slots=True)
class _Document:
    """The manifest as it stands in its file."""

    format: str
    version: int
    vdi: BackedUpDisk
    generations: tuple[Generation, ...]
    attempt: Attempt | None = None
    discarded: tuple[str, ...] = ()


def image_name(snapshot: str) -> str:
    """The file of a generation: what an overlay that the gateway makes names its backing file."""
    return f"{snapshot}.qcow2"


def read_manifest(path: str) -> Manifest:
    """The manifest of the directory `path`. CommandError when there is none, or one that is broken."""
    try:
        with open(os.path.join(path, MANIFEST), "rb") as file:
            content = file.read(_LARGEST_MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        if not os.path.isdir(path):
            raise CommandError(
                f"there is no directory {path}; give the one that vdi-backup wrote to"
            ) from None
        raise CommandError(f"{path} has no {MANIFEST}: it holds no backups of vdi-backup") from None
    except OSError as error:
        raise CommandError(f"{os.path.join(path, MANIFEST)}: {error.strerror}") from None
    return _checked(content, os.path.join(path, MANIFEST))


def _checked(content: bytes, name: str) -> Manifest:
    advice = "restore it from a copy; QEMU opens the images without it"
    try:
        known = msgspec.json.decode(content, type=dict[str, object])
        if known.get("format") == _FORMAT and known.get("version") != _VERSION:
            raise CommandError(
                f"{name} has the version {known.get('version')}, this vdi-gateway knows {_VERSION};"
                " use a newer one"
            )
        document = msgspec.json.decode(content, type=_Document)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CommandError(f"{name} can't be read: {error}; {advice}") from None
    problem = _contradiction(document)
    if problem is not None:
        raise CommandError(f"{name} contradicts itself: {problem}; {advice}")
    return Manifest(document.vdi, document.generations, document.attempt, document.discarded)


def _contradiction(document: _Document) -> str | None:
    """What is wrong with a manifest; file names in it must lead nowhere but into its directory."""
    if document.format != _FORMAT:
        return f"it is no {_FORMAT}"
    attempted = document.attempt.snapshot if document.attempt is not None else None
    for uuid in (*document.discarded, *([] if attempted is None else [attempted])):
        if not _UUID.fullmatch(uuid):
            return f"{uuid!r} is no uuid"
        if uuid in {one.snapshot for one in document.generations}:
            return f"{uuid} is that of a generation, and is to go"
    sizes: dict[int, int] = {}
    last = 0
    for one in document.generations:
        if not _UUID.fullmatch(one.snapshot) or one.file != image_name(one.snapshot):
            return f"the file of generation {one.number} isn't named after its snapshot"
        if one.number <= last:
            return f"generation {one.number} comes after {last}"
        if one.base is not None and not 0 < sizes.get(one.base, 0) <= one.virtual_size:
            return f"generation {one.number} can't stand on {one.base}"
        if not _SHA256.fullmatch(one.sha256) or one.file_size <= 0 or one.virtual_size <= 0:
            return f"generation {one.number} has no size or checksum"
        sizes[one.number] = one.virtual_size
        last = one.number
    return None


class BackupDirectory:
    """A directory that this process alone writes backups to, with its manifest as it is on the disk."""

    def __init__(self, path: str, manifest: Manifest) -> None:
        self.path: Final = path
        self._manifest = manifest

    @property
    def manifest(self) -> Manifest:
        """What was last written durably."""
        return self._manifest

    def image_path(self, snapshot: str) -> str:
        """Where the file of this snapshot (uuid) is."""
        return os.path.join(self.path, image_name(snapshot))

    def has_part(self, snapshot: str) -> bool:
        """Whether some of a download is there with which it can be gone on."""
        return os.path.exists(f"{self.image_path(snapshot)}.part.json")

    def write(self, manifest: Manifest) -> None:
        """Replace the manifest, durably. CommandError if it can't be; then the old one stays."""
        document = _Document(
            _FORMAT, _VERSION, manifest.vdi, manifest.generations, manifest.attempt, manifest.discarded
        )
        new = os.path.join(self.path, _NEW_MANIFEST)
        try:
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.rename(new, os.path.join(self.path, MANIFEST))
            FILES.sync_directory(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(new)
            raise CommandError(
                f"{os.path.join(self.path, MANIFEST)} can't be written: {error.strerror};"
                " the backups that were there are unharmed"
            ) from None
        self._manifest = manifest

    def remove_files(self, snapshot: str) -> None:
        """Remove what there is of the image of a snapshot. CommandError."""
        path = self.image_path(snapshot)
        try:
            for name in (path, f"{path}.part", f"{path}.part.json", f"{path}.part.json.new"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)
        except OSError as error:
            raise CommandError(f"{error.filename}: {error.strerror}") from None


@contextlib.contextmanager
def backup_directory(path: str, vdi: BackedUpDisk) -> Iterator[BackupDirectory]:
    """The directory for backups of `vdi`, made if it isn't there, and locked as long as the block lasts.

    CommandError if it is another disk's, holds other things, or somebody writes backups to it.
    """
    try:
        _make(path)
        fd = os.open(os.path.join(path, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise CommandError(f"{error.filename or path}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CommandError(f"another vdi-backup is writing to {path}; wait until it has ended") from None
        yield _opened(path, vdi)
    finally:
        os.close(fd)


def _make(path: str) -> None:
    """Make the directory itself; what it is to lie in may be a disk that isn't mounted."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not os.path.isdir(path):
            raise CommandError(
                f"{path} is no directory; give one for the backups of this disk alone"
            ) from None
        others = sorted(set(os.listdir(path)) - _NOT_COUNTED)
        if others and MANIFEST not in others:
            raise CommandError(
                f"{path} holds {others[0]} but no {MANIFEST}; give an empty directory, or a new one"
            ) from None
    except FileNotFoundError:
        if not path:
            raise CommandError(
                "the directory's name is empty; give one for the backups of this disk"
            ) from None
        parent = os.path.dirname(os.path.abspath(path))
        raise CommandError(f"there is no directory {parent}; make it, or mount what belongs there") from None
    else:
        FILES.sync_directory(os.path.dirname(os.path.abspath(path)))


def _opened(path: str, vdi: BackedUpDisk) -> BackupDirectory:
    if not os.path.exists(os.path.join(path, MANIFEST)):
        return BackupDirectory(path, Manifest(vdi))
    manifest = read_manifest(path)
    if manifest.vdi.uuid != vdi.uuid:
        raise CommandError(
            f"{path} holds backups of the disk {manifest.vdi.uuid} ({manifest.vdi.name_label}),"
            f" not of {vdi.uuid}; give each disk a directory of its own"
        )
    return BackupDirectory(path, replace(manifest, vdi=vdi))
