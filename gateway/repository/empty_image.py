"""An empty image under a new name: it is there, whole and durable, or not at all.

The trap: until the directory is synced the image may be gone after a crash, so one that can't be synced is
removed again and nobody is told of it.
"""

import os
from contextlib import suppress

from gateway.core.records import ImageFormat
from gateway.images.files import FileCalls
from gateway.images.vhd.create import create_dynamic
from gateway.repository.directory import SRDirectory
from gateway.repository.staging import require_no_image, staging_path


def create_empty_image(
    directory: SRDirectory, uuid: str, virtual_size: int, image_format: ImageFormat, files: FileCalls
) -> str:
    """Make a dynamic VHD or a sparse raw file of `virtual_size` bytes; its path. Under the structure lock.

    Raises OSError (ENOSPC, EEXIST), ImageTooLarge.
    """
    target = directory.image(uuid, image_format)
    path = staging_path(directory, uuid)
    try:
        if image_format == "vhd":
            create_dynamic(path, virtual_size, files=files)
        else:
            _create_raw(path, virtual_size, files)
        require_no_image(target)
    except BaseException:
        with suppress(FileNotFoundError):
            files.unlink(path)
        raise
    try:
        files.rename(path, target)
        files.sync_directory(directory.root)
    except BaseException:
        # A rename over the network may be said to have failed and be done all the same.
        for left in (path, target):
            with suppress(OSError):
                files.unlink(left)
        raise
    return target


def _create_raw(path: str, size: int, files: FileCalls) -> None:
    fd = files.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        files.truncate(fd, size)
        files.sync(fd)
    finally:
        files.close(fd)
