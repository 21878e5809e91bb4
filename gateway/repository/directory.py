"""The directory of an SR: where things are in it, whose it is, and whether it is really there.

The layout is XenServer's for file SRs: one `<uuid>.vhd` or `<uuid>.raw` per image in the directory itself.
Everything that is only ours lies in `.vdi-gateway/`, since SM fails the scan of a whole SR over a file name
it doesn't know. All calls here block.

The trap: the directory of a network share that is not mounted exists, and is empty. So a writable SR carries
a marker, and without it nothing is concluded from files that cannot be seen.
"""

import contextlib
import errno
import json
import os
import stat
from dataclasses import dataclass
from typing import Final

from gateway.core.errors import XenAPIError
from gateway.core.records import ImageFormat
from gateway.images.file_locks import lock_wholly
from gateway.images.files import FILES, FileCalls

SERVICE_NAME: Final = ".vdi-gateway"
MARKER_FORMAT: Final = 1

_MOST_OWNER_TEXT: Final = 4096


class DirectoryUnavailable(XenAPIError):  # noqa: N818 - a state of the directory
    """The directory is not there, or not mounted, or not the one that it should be.

    Clients see SM's code for it (XE_SR_ERRORCODES.xml: 47, SRUnavailable).
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(
            "SR_BACKEND_FAILURE_47", "", f"The SR is not available [opterr={path}: {problem}]", ""
        )
        self.path = path
        self.problem = problem


class DirectoryOwned(XenAPIError):  # noqa: N818 - a state of the directory
    """Another gateway, `owner`, has the directory attached writable (SM's code 16, SRInUse)."""

    def __init__(self, path: str, owner: str) -> None:
        text = f"The SR device is currently in use [opterr={path}: attached writable by {owner}]"
        super().__init__("SR_BACKEND_FAILURE_16", "", text, "")
        self.path = path
        self.owner = owner


@dataclass(frozen=True, slots=True)
class SRDirectory:
    """The paths of one SR."""

    root: str

    @property
    def service(self) -> str:
        """Our own directory."""
        return os.path.join(self.root, SERVICE_NAME)

    @property
    def marker(self) -> str:
        """Says that this is an SR of ours, and which."""
        return os.path.join(self.service, "sr.json")

    @property
    def owner(self) -> str:
        """Locked by the gateway that has the SR attached writable; its text says which one that is."""
        return os.path.join(self.service, "owner")

    @property
    def records(self) -> str:
        """A copy of the SR's records."""
        return os.path.join(self.service, "records.json")

    @property
    def staging(self) -> str:
        """Files that are being filled, before they get the name of an image."""
        return os.path.join(self.service, "staging")

    def image(self, uuid: str, image_format: ImageFormat) -> str:
        """The file of a VDI."""
        return os.path.join(self.root, f"{uuid}.{image_format}")


def is_there(path: str) -> bool:
    """Whether there is anything of this name. Raises OSError if that can't be said.

    The trap: os.path.lexists says no then, and what must not be renamed over would seem to be gone.
    """
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def require_directory(directory: SRDirectory) -> None:
    """Raise DirectoryUnavailable unless the directory is there and can be listed."""
    try:
        mode = os.stat(directory.root).st_mode
    except OSError as error:
        raise DirectoryUnavailable(directory.root, error.strerror or str(error)) from error
    if not stat.S_ISDIR(mode):
        raise DirectoryUnavailable(directory.root, "not a directory")
    if not os.access(directory.root, os.R_OK | os.X_OK):
        raise DirectoryUnavailable(directory.root, "its files cannot be listed")


def make_directory(directory: SRDirectory, files: FileCalls = FILES) -> None:
    """Make the directory of a new SR. It may exist if it is empty. Raises OSError (ENOTEMPTY, ENOTDIR …)."""
    try:
        files.mkdir(directory.root, 0o700)
    except FileExistsError:
        # What mkfs or a destroyed SR leaves behind is not content; another SR's marker is.
        if set(os.listdir(directory.root)) - {"lost+found", SERVICE_NAME} or is_there(directory.marker):
            raise OSError(
                errno.ENOTEMPTY, "a new SR needs an empty or absent directory", directory.root
            ) from None
        # Who made it, or was killed while doing so, may not have made its name durable.
        with contextlib.suppress(PermissionError):
            files.sync_directory(os.path.dirname(os.path.abspath(directory.root)))
    else:
        files.sync_directory(os.path.dirname(os.path.abspath(directory.root)))


def make_service_directory(directory: SRDirectory, files: FileCalls = FILES) -> None:
    """Make what a writable SR needs beside its images. Existing parts are left as they are."""
    for path in (directory.service, directory.staging):
        try:
            files.mkdir(path, 0o700)
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                raise
        files.sync_directory(os.path.dirname(path))  # also if a killed predecessor made it


def read_regular(path: str, longest: int = -1) -> bytes:
    """The content of a file of ours, at most `longest` bytes. Raises OSError.

    Others may be able to write to the directory: a pipe or a link of that name is neither waited for nor
    followed.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "this is not a regular file", path)
        with open(fd, "rb", closefd=False) as file:
            return file.read(longest)
    finally:
        os.close(fd)


def read_marker(directory: SRDirectory) -> str | None:
    """The uuid in the marker, or None without one. Raises DirectoryUnavailable if it cannot be understood."""
    try:
        content = json.loads(read_regular(directory.marker, 65536))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DirectoryUnavailable(directory.marker, error.strerror or str(error)) from error
    except ValueError as error:
        raise DirectoryUnavailable(directory.marker, "not the marker of an SR") from error
    if not isinstance(content, dict) or not isinstance(content.get("uuid"), str):
        raise DirectoryUnavailable(directory.marker, "not the marker of an SR")
    if content.get("format") != MARKER_FORMAT:
        raise DirectoryUnavailable(
            directory.marker, f"format {content.get('format')} was made by another version of the gateway"
        )
    uuid: str = content["uuid"]
    return uuid


def check_marker(directory: SRDirectory, uuid: str | None) -> str | None:
    """The uuid in the marker; raises DirectoryUnavailable if it is not `uuid`, should that be given."""
    found = read_marker(directory)
    if found is not None and uuid is not None and found != uuid:
        raise DirectoryUnavailable(directory.root, f"the SR {found} is there, not {uuid}")
    return found


def write_marker(directory: SRDirectory, uuid: str, files: FileCalls = FILES) -> None:
    """Mark the directory as the SR `uuid`. The marker is whole or absent, whatever happens."""
    content = json.dumps({"format": MARKER_FORMAT, "uuid": uuid}).encode() + b"\n"
    replace_file(directory.marker, content, files)


def replace_file(path: str, content: bytes, files: FileCalls = FILES) -> None:
    """Write a small file so that at each moment either its old or its new content is there, durably."""
    new = f"{path}.new"
    fd = files.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        files.pwrite(fd, content, 0)
        files.sync(fd)
    finally:
        files.close(fd)
    files.rename(new, path)
    files.sync_directory(os.path.dirname(path))


def remove_service_files(directory: SRDirectory, files: FileCalls = FILES) -> None:
    """Make the directory of an SR an ordinary one again; our empty directories stay."""
    for path in (directory.records, directory.marker, directory.owner):
        with contextlib.suppress(FileNotFoundError):
            files.unlink(path)
    files.sync_directory(directory.service)


class OwnerLock:
    """Keeps a second gateway from attaching the SR writable; ends with `release` or with the process."""

    def __init__(self, directory: SRDirectory, who: str, files: FileCalls = FILES) -> None:
        """Take the lock, or raise DirectoryOwned. `who` is what others are told: host, process, state."""
        self._files = files
        # Never truncated by opening: until the lock is ours, the text belongs to the one who has it.
        self._fd = files.open(directory.owner, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            lock_wholly(self._fd)
            files.truncate(self._fd, 0)
            files.pwrite(self._fd, who.encode(), 0)
        except OSError as error:
            try:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    text = os.pread(self._fd, _MOST_OWNER_TEXT, 0).decode(errors="replace").strip()
                    raise DirectoryOwned(directory.root, text or "another gateway") from None
                raise
            finally:
                files.close(self._fd)

    def release(self) -> None:
        """Let another gateway have it. The text stays; without the lock it says nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._files.close(fd)
