"""The check of what a differencing VHD says about its parent.

A parent is found by a name in the child's own directory and proves itself by its id. Programs differ in
which of the locators they read, so all three have to be there, relative, and name the same file.
"""

import os
import stat
import urllib.parse
import uuid
from dataclasses import dataclass
from typing import Final, TypeAlias

from gateway.images.errors import ImageError
from gateway.images.files import FileIdentity, identity_of, pread_exactly
from gateway.images.vhd.format import NO_ID, DiskType, ParentLocator, Platform
from gateway.images.vhd.image import MAX_DEPTH, MAX_LOCATOR, VhdFile, open_vhd, parent_names
from gateway.images.vhd.problems import ProblemKind

LOCATOR_PLATFORMS: Final = (Platform.MACX, Platform.W2KU, Platform.W2RU)

Finding: TypeAlias = tuple[ProblemKind, str, bool]  # kind, sentence, repairable

_REWRITE: Final = "repairing writes the locators anew"


@dataclass(frozen=True, slots=True)
class _Node:
    """A file that stands in a chain."""

    name: str
    identity: FileIdentity
    unique_id: uuid.UUID  # NO_ID for a raw image
    size: int
    parent_names: tuple[str, ...] | None  # None for a root
    parent_id: uuid.UUID = NO_ID


def parent_problems(image: VhdFile) -> list[Finding]:
    """Return what is wrong with the parents of a differencing image and with its way of naming them."""
    assert image.header is not None
    directory = os.path.dirname(image.path)
    parent_id = image.header.parent_id
    try:
        names = tuple(parent_names(image))
    except ImageError as error:
        known = _find_by_id(directory, parent_id)
        remedy = f"its parent is {known}, {_REWRITE}" if known else "name it with vhd-util modify -p"
        return [(ProblemKind.PARENT_UNNAMED, f"{error.problem}; {remedy}", known is not None)]
    child = _Node(os.path.basename(image.path), image.identity, image.unique_id, image.size, names, parent_id)
    parent, findings = _find_parent(directory, child)
    if parent is None:
        return findings
    if parent.size > image.size:
        detail = f"its parent {parent.name} is larger ({parent.size} bytes) than itself ({image.size})"
        findings.append((ProblemKind.PARENT_LARGER, f"{detail}; what lies beyond is not seen", False))
    findings += _ancestor_problems(directory, child, parent)
    findings += _locator_problems(image, parent.name)
    return findings


def known_parent(image: VhdFile) -> str | None:
    """Return the name of the one file in the directory that is the parent of `image`, if there is one."""
    assert image.header is not None
    directory = os.path.dirname(image.path)
    try:
        names = parent_names(image)
    except ImageError:
        names = []
    for name in names:
        try:
            node = _read_node(os.path.join(directory, name))
        except (ImageError, OSError):
            continue
        if node.unique_id == image.header.parent_id:
            return name
    return _find_by_id(directory, image.header.parent_id)


def locator_text(platform: int, parent: str) -> bytes:
    """Return what a locator of this platform holds for a parent in the same directory, as blktap does."""
    if platform == Platform.MACX:
        return f"file://./{parent}".encode()
    return f".\\{parent}".encode("utf-16-le")


def _find_parent(directory: str, child: _Node) -> tuple[_Node | None, list[Finding]]:
    """Return the parent, or what keeps it from being found."""
    problem: Finding | None = None
    for name in child.parent_names or ():
        try:
            node = _read_node(os.path.join(directory, name))
        except FileNotFoundError:
            continue
        except (ImageError, OSError) as error:
            why = error.problem if isinstance(error, ImageError) else error.strerror or error
            detail = f"its parent {name} cannot be read: {why}; check that file"
            problem = problem or (ProblemKind.PARENT_UNREADABLE, detail, False)
            continue
        if node.unique_id == child.parent_id:
            return node, []
        detail = f"its parent should have the id {child.parent_id}, but {name} has {node.unique_id}"
        problem = (ProblemKind.PARENT_ID_WRONG, detail, False)
    known = _find_by_id(directory, child.parent_id)
    if known is not None:
        detail = f"the parent it names is not the right one, but {known} has the right id; {_REWRITE}"
        return None, [(ProblemKind.PARENT_MISSING, detail, True)]
    if problem is None:
        named = " or ".join(child.parent_names or ())
        detail = f"its parent {named} is not in the directory; bring it back, or the data cannot be read"
        problem = (ProblemKind.PARENT_MISSING, detail, False)
    return None, [problem]


def _ancestor_problems(directory: str, child: _Node, parent: _Node) -> list[Finding]:
    seen = {child.identity}
    node = parent
    while True:
        if node.identity in seen:
            detail = f"the chain of parents comes back to {node.name}; restore the right parent"
            return [(ProblemKind.PARENT_LOOP, detail, False)]
        seen.add(node.identity)
        if len(seen) > MAX_DEPTH:
            return [(ProblemKind.PARENT_LOOP, f"the chain has more than {MAX_DEPTH} levels", False)]
        if node.parent_names is None:
            return []
        above, findings = _find_parent(directory, node)
        if above is None:
            return [(kind, f"of its ancestor {node.name}: {detail}", False) for kind, detail, _ in findings]
        node = above


def _locator_problems(image: VhdFile, parent: str) -> list[Finding]:
    assert image.header is not None
    findings: list[Finding] = []
    by_platform = {locator.platform: locator for locator in image.header.locators}
    for platform in LOCATOR_PLATFORMS:
        locator = by_platform.get(platform)
        if locator is None:
            detail = f"there is no parent locator {platform.name}, which some programs need; {_REWRITE}"
            findings.append((ProblemKind.LOCATOR_MISSING, detail, True))
            continue
        finding = _judge(image, platform, locator, parent)
        if finding is not None:
            findings.append((*finding, True))
    stored = image.header.parent_name.decode("utf-16-be", "replace").split("\0", 1)[0]
    if stored.replace("\\", "/").rsplit("/", 1)[-1] != parent:
        detail = f"the header calls the parent {stored!r}, but it is {parent}; {_REWRITE}"
        findings.append((ProblemKind.PARENT_NAME_WRONG, detail, True))
    return findings


def _judge(
    image: VhdFile, platform: Platform, locator: ParentLocator, parent: str
) -> tuple[ProblemKind, str] | None:
    where = f"the parent locator {platform.name} at {locator.data_offset}"
    if not 0 < locator.data_length <= MAX_LOCATOR or (
        locator.data_offset + locator.data_length > image.data_end
    ):
        return ProblemKind.LOCATOR_OUTSIDE, f"{where} lies outside of the file; {_REWRITE}"
    data = pread_exactly(image.fd, locator.data_length, locator.data_offset)
    text = data.decode("utf-8" if platform == Platform.MACX else "utf-16-le", "replace").rstrip("\0")
    if platform == Platform.MACX:
        path = urllib.parse.unquote(text.removeprefix("file://"))
        absolute = path.startswith("/")
    else:
        path = text.replace("\\", "/")
        absolute = path.startswith("/") or path[1:2] == ":"
    if absolute:
        return ProblemKind.LOCATOR_ABSOLUTE, f"{where} holds the absolute path {text!r}; {_REWRITE}"
    if os.path.normpath(path) != parent:
        return ProblemKind.LOCATOR_WRONG, f"{where} names {text!r}, but the parent is {parent}; {_REWRITE}"
    return None


def _read_node(path: str) -> _Node:
    """Read one file of a chain. Raises OSError, ImageError."""
    name = os.path.basename(path)
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(path, "this is not a regular file")
        if name.endswith(".raw"):
            return _Node(name, identity_of(fd), NO_ID, status.st_size, None)
        image = open_vhd(fd, path)
        if image.footer.disk_type is not DiskType.DIFFERENCING or image.header is None:
            return _Node(name, image.identity, image.unique_id, image.size, None)
        try:
            names = tuple(parent_names(image))
        except ImageError:
            names = ()
        return _Node(name, image.identity, image.unique_id, image.size, names, image.header.parent_id)
    finally:
        os.close(fd)


def _find_by_id(directory: str, unique_id: uuid.UUID) -> str | None:
    """Return the one VHD of the directory with this id; None if there is none, or more than one."""
    if unique_id == NO_ID:
        return None
    found: list[str] = []
    with os.scandir(directory or ".") as entries:
        for entry in entries:
            if entry.name.endswith(".vhd") and entry.is_file(follow_symlinks=False):
                try:
                    if _read_node(entry.path).unique_id == unique_id:
                        found.append(entry.name)
                except (ImageError, OSError):
                    continue
    return found[0] if len(found) == 1 else None
