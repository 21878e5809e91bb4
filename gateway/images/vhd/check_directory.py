"""The check of a directory of images in XenServer's file-SR layout.

Beside the files themselves it looks at what they are to each other. The names follow XenServer's storage
manager (drivers/FileSR.py, libs/sm/fjournaler.py): `<uuid>.vhd` or `.raw`, `<uuid>.cbtlog`, journals named
`<operation>_<uuid>`. The storage manager fails the whole scan of a repository over a name it can't parse.
"""

import os
import re
import uuid
from collections import defaultdict
from dataclasses import dataclass
from typing import Final

from gateway.images.errors import ImageError
from gateway.images.vhd.check_file import check_vhd
from gateway.images.vhd.check_parent import known_parent
from gateway.images.vhd.format import DiskType
from gateway.images.vhd.image import open_vhd
from gateway.images.vhd.problems import CheckReport, Problem, ProblemKind

MAX_CHAIN: Final = 30  # levels, the most that XenServer makes

_UUID: Final = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_IMAGE_NAME: Final = re.compile(rf"{_UUID}\.(?:vhd|raw)")
_LEFT_BEHIND: Final = re.compile(rf"OLD_{_UUID}\.(?:vhd|raw)|{_UUID}\.(?:vhd|raw)\.new")
_JOURNAL: Final = re.compile(r"(?P<operation>coalesce|relink|leaf|clone)_?(?P<rest>.*)")


@dataclass(frozen=True, slots=True)
class _Node:
    unique_id: uuid.UUID
    hidden: bool
    parent: str | None


def check_directory(path: str) -> tuple[CheckReport, ...]:
    """Check all VHDs of a directory and what they are to each other.

    Returns the directory's own report first, then one for each `*.vhd`, by name; those that go meanwhile
    have none. Raises OSError if the directory can't be listed; of a file that can't be read its report tells.
    """
    names = sorted(os.listdir(path))
    nodes: dict[str, _Node] = {}
    reports: list[CheckReport] = []
    for name in names:
        if name.endswith(".vhd"):
            full = os.path.join(path, name)
            report = _check(full)
            if report is None:
                continue
            reports.append(report)
            node = _read(full)
            if node is not None:
                nodes[name] = node
    problems = (*_name_problems(path, names), *_family_problems(path, nodes))
    return (CheckReport(path, problems), *reports)


def _check(path: str) -> CheckReport | None:
    """Return None for a file that isn't there any more."""
    try:
        return check_vhd(path)
    except OSError as error:
        if not os.path.lexists(path):
            return None
        detail = f"it can't be read: {error.strerror or error}; look at the disk that it lies on"
        return CheckReport(path, (Problem(ProblemKind.UNREADABLE, path, detail),))


def _read(path: str) -> _Node | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None  # the file's own report says so
    try:
        image = open_vhd(fd, path)
        is_child = image.footer.disk_type is DiskType.DIFFERENCING
        return _Node(image.unique_id, image.footer.hidden, known_parent(image) if is_child else None)
    except (ImageError, OSError):
        return None
    finally:
        os.close(fd)


def _name_problems(path: str, names: list[str]) -> list[Problem]:
    problems: list[Problem] = []
    for name in names:
        full = os.path.join(path, name)
        journal = _JOURNAL.match(name)
        if _LEFT_BEHIND.fullmatch(name):
            detail = "an interrupted snapshot or coalesce left this behind; XenServer's next scan removes it"
            problems.append(Problem(ProblemKind.INTERRUPTED, full, detail))
        elif journal and re.fullmatch(_UUID, journal["rest"]):
            detail = f"a {journal['operation']} of this image was interrupted; its journal says how to go on"
            problems.append(Problem(ProblemKind.INTERRUPTED, full, detail))
        elif journal or (name.endswith((".vhd", ".raw")) and not _IMAGE_NAME.fullmatch(name)):
            detail = "XenServer fails the scan of a repository with a file of this name; rename or move it"
            problems.append(Problem(ProblemKind.STRANGE_NAME, full, detail))
    return problems


def _family_problems(path: str, nodes: dict[str, _Node]) -> list[Problem]:
    problems: list[Problem] = []
    by_id: defaultdict[uuid.UUID, list[str]] = defaultdict(list)
    parents = {node.parent for node in nodes.values() if node.parent is not None}
    for name, node in nodes.items():
        full = os.path.join(path, name)
        by_id[node.unique_id].append(name)
        if node.hidden and name not in parents:
            detail = "it is hidden and has no children: left over from a deleted image; scanning the "
            detail += "repository with XenServer removes it"
            problems.append(Problem(ProblemKind.ORPHAN, full, detail))
        if name in parents and not node.hidden:
            detail = (
                "it is a parent but not hidden: a VM that wrote to it would destroy its children; hide it"
            )
            problems.append(Problem(ProblemKind.VISIBLE_PARENT, full, detail))
        if (depth := _depth(name, nodes)) > MAX_CHAIN:
            detail = f"its chain has {depth} levels, and XenServer stops at {MAX_CHAIN}; coalesce it"
            problems.append(Problem(ProblemKind.CHAIN_TOO_DEEP, full, detail))
    for unique_id, names in by_id.items():
        if len(names) > 1:
            detail = f"{' and '.join(names)} have the same id {unique_id}: a copy that was made by hand; "
            detail += "their children cannot tell them apart, so remove or re-create one"
            problems.append(Problem(ProblemKind.SAME_ID, os.path.join(path, names[0]), detail))
    return problems


def _depth(name: str | None, nodes: dict[str, _Node]) -> int:
    """Return the levels of a chain, counting no further than it matters."""
    depth = 0
    while name is not None and depth <= 2 * MAX_CHAIN:
        depth += 1
        node = nodes.get(name)
        name = node.parent if node is not None else None
    return depth
