"""What is in the directory of an SR: every image with its size, its parent and what is wrong with it.

Reads two kilobytes of each VHD and changes nothing, so it may run beside anything. One file that cannot be
understood is an entry with an error, not the end of the scan; names that no SR has are listed. All calls here
block.

The traps: a file may change between two scans without changing its size, and within one tick of the file
system's clock. What is remembered about a file is believed only once its time stamp has become old. And a
copy that somebody has put beside its VDI, under any name, stands on the same parent.
"""

import os
import re
import stat
import time
import uuid as uuids
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final

from gateway.core.records import ImageFormat
from gateway.images.errors import ImageError
from gateway.images.vhd.format import NO_ID, DiskType
from gateway.images.vhd.image import open_vhd, parent_names
from gateway.repository.directory import SERVICE_NAME, SRDirectory

UUID_PATTERN: Final = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_IMAGE: Final = re.compile(rf"({UUID_PATTERN})\.(vhd|raw)")
# Operations of SM in progress (cleanup.py, fjournaler.py, FileSR.py, vhd-util resize).
JOURNAL_NAME: Final = re.compile(
    rf"(?:coalesce|relink|leaf|clone)_{UUID_PATTERN}|OLD_{UUID_PATTERN}\.vhd|{UUID_PATTERN}\.vhd\.new|\.journal-{UUID_PATTERN}"
)
# What SM and file systems keep beside images. A file on NFS that is removed or renamed over while open here
# is called .nfs… until it is closed (fs/nfs/unlink.c), one on a file system of libfuse .fuse_hidden…
# (lib/fuse.c): it has gone, whatever it stands on.
_KNOWN: Final = re.compile(
    rf"{UUID_PATTERN}\.(?:cbtlog|vhdcache)|filelog\.txt|lost\+found|{re.escape(SERVICE_NAME)}"
    r"|\.nfs[0-9a-f]{24}|\.fuse_hidden[0-9a-f]{16}"
)
_SETTLED_NS: Final = 2_000_000_000


@dataclass(frozen=True, slots=True)
class FileStamp:
    """By what a change of a file is noticed. The device is left out: it differs after each mount."""

    inode: int
    size: int
    modified_ns: int

    def __str__(self) -> str:
        return f"{self.inode}:{self.size}:{self.modified_ns}"

    @classmethod
    def of(cls, status: os.stat_result) -> "FileStamp":
        """The stamp in the result of a stat."""
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class ScannedImage:
    """One image file. Sizes are bytes; `parent` is the name of the parent's file without its suffix.

    With an `error` (one sentence, without the file's name) the image cannot be used, and what could not be
    read is zero or None.
    """

    uuid: str
    path: str
    format: ImageFormat
    stamp: FileStamp
    virtual_size: int = 0
    physical_utilisation: int = 0
    parent: str | None = None
    hidden: bool = False
    error: str | None = None

    @property
    def name(self) -> str:
        """The file's name."""
        return os.path.basename(self.path)


@dataclass(frozen=True, slots=True)
class ScanResult:
    """Everything in one SR. `journals` are files that SM leaves while it rearranges a chain.

    A repository adds why it could not recover from them, by name.
    """

    images: Mapping[str, ScannedImage]
    journals: tuple[str, ...] = ()
    strange: tuple[str, ...] = ()
    unresolved: Mapping[str, str] = field(default_factory=dict)
    logs: frozenset[str] = frozenset()
    """The uuids of the VDIs that have a log of changed blocks."""
    strangers: Mapping[str, str] = field(default_factory=dict)
    """Of the strange names those of VHDs that stand on an image of the SR, with the name of that."""

    def children(self, uuid: str) -> tuple[str, ...]:
        """The uuids of the images that stand on this one."""
        return tuple(image.uuid for image in self.images.values() if image.parent == uuid)

    def errors(self) -> Iterator[str]:
        """One sentence for each image that cannot be used or looked after, beginning with the file's name."""
        for image in self.images.values():
            if image.error is not None:
                yield f"{image.name}: {image.error}"
        yield from self.misnamed()

    def misnamed(self) -> Iterator[str]:
        """One sentence for each VHD that nobody looks after, though it stands on an image of the SR."""
        for name, parent in self.strangers.items():
            yield f"{name}: it stands on {parent} and has no name of an image; name it UUID.vhd, or remove it"

    def unfinished(self) -> Iterator[str]:
        """One sentence for each journal, beginning with its name."""
        for name in self.journals:
            yield f"{name}: {self.unresolved.get(name, 'an operation of SM')}"


@dataclass(frozen=True, slots=True)
class _Structure:
    """What the bytes of an image say, as far as a scan needs them."""

    virtual_size: int = 0
    unique_id: uuids.UUID = NO_ID
    hidden: bool = False
    parent_id: uuids.UUID | None = None
    parent_names: tuple[str, ...] = ()
    error: str | None = None


@dataclass(slots=True)
class Scanner:
    """Scans one directory again and again, reading only those files that have changed."""

    directory: SRDirectory
    _remembered: dict[str, tuple[FileStamp, _Structure]] = field(default_factory=dict)

    def scan(self) -> ScanResult:
        """Look at every file. Raises OSError only if the directory itself cannot be listed."""
        images: dict[str, ScannedImage] = {}
        structures: dict[str, _Structure] = {}
        journals: list[str] = []
        strange: dict[str, _Structure] = {}
        names: set[str] = set()
        with os.scandir(self.directory.root) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            names.add(entry.name)
            match = _IMAGE.fullmatch(entry.name)
            if match is None:
                if JOURNAL_NAME.fullmatch(entry.name):
                    journals.append(entry.name)
                elif not _KNOWN.fullmatch(entry.name):
                    strange[entry.name] = self._strange(entry)
                continue
            uuid = match[1]
            image_format: ImageFormat = "vhd" if match[2] == "vhd" else "raw"
            status: os.stat_result | None = None
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # destroyed or renamed a moment ago
            except OSError as error:
                # A damaged inode: the other images are none the worse for it.
                structure = _Structure(error=error.strerror or str(error))
            else:
                structure = self._structure(entry.path, image_format, status)
            if uuid in images:
                problem = f"there is {images[uuid].name} too, which of the two is the VDI is not known"
                structure = replace(structure, error=problem)
            structures[entry.name] = structure
            images[uuid] = _scanned(uuid, entry.path, image_format, status, structure)
        for uuid, image in images.items():
            images[uuid] = _with_parent(image, structures, names)
        self._remembered = {
            path: kept for path, kept in self._remembered.items() if os.path.basename(path) in names
        }
        suffix = ".cbtlog"
        logs = frozenset(name.removesuffix(suffix) for name in names if name.endswith(suffix))
        strangers = {
            name: parent
            for name, structure in strange.items()
            if (parent := _parent_of(structure, structures, structures.keys())) is not None
        }
        return ScanResult(images, tuple(journals), tuple(strange), logs=logs, strangers=strangers)

    def scan_one(self, path: str) -> ScannedImage:
        """Look at one image file anew, without remembering. Raises ImageError, OSError."""
        match = _IMAGE.fullmatch(os.path.basename(path))
        assert match is not None, "an image is named by its uuid"
        status = os.lstat(path)
        image_format: ImageFormat = "vhd" if match[2] == "vhd" else "raw"
        structure = _Structure(virtual_size=status.st_size) if image_format == "raw" else _read_vhd(path)
        structures = {os.path.basename(path): structure}
        names: set[str] = set()
        for name in structure.parent_names:
            parent = os.path.join(self.directory.root, name)
            # The directory isn't listed: whatever is done to one VDI comes here, and there may be thousands.
            if os.path.lexists(parent):
                names.add(name)
            with suppress(OSError, ImageError):
                structures[name] = _read_vhd(parent) if name.endswith(".vhd") else _Structure()
        image = _scanned(match[1], path, image_format, status, structure)
        return _with_parent(image, structures, names)

    def _strange(self, entry: os.DirEntry[str]) -> _Structure:
        try:
            return self._structure(entry.path, "vhd", entry.stat(follow_symlinks=False))
        except OSError as error:
            return _Structure(error=error.strerror or str(error))

    def _structure(self, path: str, image_format: ImageFormat, status: os.stat_result) -> _Structure:
        if not stat.S_ISREG(status.st_mode):
            return _Structure(error="this is not a regular file")
        if image_format == "raw":
            return _Structure(virtual_size=status.st_size)
        stamp = FileStamp.of(status)
        remembered = self._remembered.get(path)
        if remembered is not None and remembered[0] == stamp:
            return remembered[1]
        self._remembered.pop(path, None)
        try:
            structure = _read_vhd(path)
        except ImageError as error:
            structure = _Structure(error=error.problem)
        except OSError as error:
            return _Structure(error=error.strerror or str(error))
        if time.time_ns() - stamp.modified_ns > _SETTLED_NS:
            self._remembered[path] = (stamp, structure)
        return structure


def _scanned(
    uuid: str, path: str, image_format: ImageFormat, status: os.stat_result | None, structure: _Structure
) -> ScannedImage:
    return ScannedImage(
        uuid=uuid,
        path=path,
        format=image_format,
        stamp=FileStamp(0, 0, 0) if status is None else FileStamp.of(status),
        virtual_size=structure.virtual_size,
        physical_utilisation=0 if status is None else status.st_blocks * 512,
        hidden=structure.hidden,
        error=structure.error,
    )


def _read_vhd(path: str) -> _Structure:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        image = open_vhd(fd, path)
        differencing = image.footer.disk_type is DiskType.DIFFERENCING
        return _Structure(
            virtual_size=image.size,
            unique_id=image.unique_id,
            hidden=image.footer.hidden,
            parent_id=image.header.parent_id if differencing and image.header is not None else None,
            parent_names=tuple(parent_names(image)) if differencing else (),
        )
    finally:
        os.close(fd)


def _with_parent(image: ScannedImage, structures: Mapping[str, _Structure], names: Set[str]) -> ScannedImage:
    structure = structures[image.name]
    if image.error is not None or structure.parent_id is None:
        return image
    parent = _parent_of(structure, structures, names)
    if parent is not None:
        return replace(image, parent=parent.rpartition(".")[0])
    present = [name for name in structure.parent_names if name in names]
    if present:
        problem = f"its parent should have the id {structure.parent_id}, but {present[0]} is another disk"
    else:
        problem = f"its parent {structure.parent_names[0]} is missing"
    return replace(image, error=problem)


def _parent_of(structure: _Structure, structures: Mapping[str, _Structure], names: Set[str]) -> str | None:
    """Find the parent's file as images/chain.py does: the first of its names whose file has the right id."""
    for name in structure.parent_names:
        parent = structures.get(name)
        # A parent that cannot be read has an error of its own; a strange name is not looked into.
        if name in names and (
            parent is None or parent.error or name.endswith(".raw") or parent.unique_id == structure.parent_id
        ):
            return name
    return None
