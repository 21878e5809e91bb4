"""Giving a differencing VHD another parent, in place, so that a crash at any point leaves a whole chain.

Who opens a child tries the names in its locators and the one in its header, and takes the file that has the
parent's id. Id and name stand in the first sector of the header, so one write of one sector changes both;
the locators follow when it is durable, and until then they name a file that has the wrong id. The trap: the
header has a second sector, with the places of the locators, and one checksum for both. When that one must
change, a copy of the old header is kept until the new one is durable, and `restore_header` puts it back.
"""

import os
from dataclasses import replace
from typing import Final

from gateway.images.errors import CorruptImage, ImageError, UnsupportedImage
from gateway.images.files import FILES, FileCalls, pread_exactly
from gateway.images.vhd.format import (
    FOOTER_SIZE,
    HEADER_SIZE,
    SECTOR,
    DiskType,
    DynamicHeader,
    Footer,
    round_up_to_sector,
    vhd_timestamp,
)
from gateway.images.vhd.image import VhdFile, open_vhd
from gateway.images.vhd.locators import place_locators

_READ_WRITE: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def set_parent(path: str, parent_path: str, *, keep: str | None = None, files: FileCalls = FILES) -> None:
    """Make the VHD `parent_path` the parent of the one at `path`, durably. Both are in one directory.

    BAT, batmap and blocks stay as they are. `keep` is the path of a small file for a copy of the header: it
    is made only when a torn write could spoil the header (it hardly ever can), and is gone on return; without
    it such an image is refused. The caller has the file to himself. Raises ImageError, OSError; ValueError
    for a parent in another directory.
    """
    directory, name = os.path.split(parent_path)
    if directory != os.path.dirname(path):
        raise ValueError(f"{parent_path} and {path} are not in the same directory")
    stored_name = name.encode("utf-16-be")
    if not name.endswith(".vhd") or name.startswith(".") or len(stored_name) > SECTOR - 2:
        raise UnsupportedImage(parent_path, "a parent's name ends in .vhd and fits into the header")
    parent_fd = os.open(parent_path, _READ)
    try:
        parent = open_vhd(parent_fd, parent_path)
        modified = os.fstat(parent_fd).st_mtime
    finally:
        os.close(parent_fd)
    fd = files.open(path, _READ_WRITE)
    try:
        image = open_vhd(fd, path)
        if image.header is None or image.footer.disk_type is not DiskType.DIFFERENCING:
            raise UnsupportedImage(path, "it has no parent, so it can't get another one")
        if image.footer_offset is None:
            raise CorruptImage(path, "the footer at its end is damaged; repair it before writing to it")
        if parent.identity == image.identity:
            raise CorruptImage(path, "an image can't be its own parent")
        locators, places = place_locators(image, image.header, name)
        header = replace(
            image.header,
            parent_id=parent.unique_id,
            parent_timestamp=vhd_timestamp(modified),
            parent_name=stored_name.ljust(SECTOR, b"\0"),
            locators=locators,
        )
        _make_room(image, max(offset + len(data) for offset, data in places), files)
        _write_header(image, header.pack(), keep, files)
        for offset, data in places:
            files.pwrite(fd, data, offset)
        files.datasync(fd)
    finally:
        files.close(fd)


def restore_header(path: str, keep: str, files: FileCalls = FILES) -> None:
    """Finish what a crash left of `set_parent`: a torn header is put back from `keep`, which then goes.

    Nothing happens when there is no `keep`. Raises CorruptImage when neither header is whole, OSError.
    """
    try:
        keep_fd = os.open(keep, _READ)
    except FileNotFoundError:
        return
    try:
        kept = pread_exactly(keep_fd, HEADER_SIZE + 1, 0)
    finally:
        os.close(keep_fd)
    fd = files.open(path, _READ_WRITE)
    try:
        offset = _footer_of(fd, path).data_offset
        if not _is_header(pread_exactly(fd, HEADER_SIZE, offset)):
            if not _is_header(kept):
                raise CorruptImage(path, "its dynamic disk header is damaged, and so is the copy kept of it")
            files.pwrite(fd, kept, offset)
        files.datasync(fd)  # a killed predecessor may not have come to that
    finally:
        files.close(fd)
    _remove(keep, files)


def _make_room(image: VhdFile, end: int, files: FileCalls) -> None:
    """Put the footer behind `end`, where the last locator ends; nothing needs the old one from then on."""
    assert image.footer_offset is not None
    if end > image.footer_offset:
        files.pwrite(image.fd, image.footer.pack(), round_up_to_sector(end))
        files.datasync(image.fd)


def _write_header(image: VhdFile, new: bytes, keep: str | None, files: FileCalls) -> None:
    assert image.header is not None
    offset = image.footer.data_offset
    old = image.header.pack()
    changed = [index for index in range(HEADER_SIZE) if new[index] != old[index]]
    if not changed:
        files.datasync(image.fd)  # a killed predecessor may not have come to that
        return
    first, last = changed[0], changed[-1] + 1
    if (offset + first) // SECTOR == (offset + last - 1) // SECTOR:
        files.pwrite(image.fd, new[first:last], offset + first)
        files.datasync(image.fd)
        return
    if keep is None:
        problem = "a new parent would take more than one sector of its header, and no copy of it may be kept"
        raise UnsupportedImage(image.path, problem)
    keep_fd = files.open(keep, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW)
    try:
        files.pwrite(keep_fd, old, 0)
        files.sync(keep_fd)
    finally:
        files.close(keep_fd)
    files.sync_directory(os.path.dirname(keep) or ".")
    files.pwrite(image.fd, new, offset)
    files.datasync(image.fd)
    _remove(keep, files)


def _remove(keep: str, files: FileCalls) -> None:
    files.unlink(keep)
    files.sync_directory(os.path.dirname(keep) or ".")


def _is_header(data: bytes) -> bool:
    try:
        DynamicHeader.unpack(data, "")
    except ImageError:
        return False
    return True


def _footer_of(fd: int, path: str) -> Footer:
    """Read the footer of an image whose header may be damaged."""
    size = os.fstat(fd).st_size
    for offset in (size - FOOTER_SIZE, 0):
        try:
            return Footer.unpack(pread_exactly(fd, FOOTER_SIZE, max(offset, 0)), path)
        except CorruptImage:
            continue
    raise CorruptImage(path, "neither the footer nor its copy is intact")
