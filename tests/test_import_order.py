"""Imports run downwards only.

cli > app > http, xenapi, fuse_mount > access > transfers > repository > core > images. `images`,
`access.client` and `nbd_plugin` stand at the bottom: they import images and the standard library alone,
because nbdkit's embedded interpreter runs them without our environment.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("gateway", "nbd_plugin", "fuse_mount")

# The rank of each room; a room imports rooms of a lower rank, and never another one of its own.
RANKS = {
    "cli": 8,
    "app": 7,
    "http": 6,
    "xenapi": 6,
    "fuse_mount": 6,
    "access": 5,
    "transfers": 4,
    "repository": 3,
    "core": 2,
    "access.client": 1,
    "nbd_plugin": 2,
    "images": 0,
}
STANDARD_LIBRARY_ROOMS = {"images", "access.client", "nbd_plugin"}
# What the bottom may import beside the standard library. `nbdkit` exists inside nbdkit only.
BESIDE_IMAGES = {"nbd_plugin": {"access.client", "images"}, "access.client": {"images"}, "images": set[str]()}


# The mount is a process without the gateway's rooms: what they do, it asks for at the sockets.
OF_THE_MOUNT = {"access.client", "images", "fuse_mount"}
BESIDE_THE_MOUNT = {"pyfuse3", "structlog", "trio"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room a module belongs to; single files directly in gateway/ are the app's."""
    package, _, rest = module.partition(".")
    if package != "gateway":
        return package
    if rest == "access.protocol" or rest.startswith("access.client"):
        return "access.client"  # both halves speak the protocol
    first = rest.partition(".")[0]
    return first if (ROOT / "gateway" / first).is_dir() else "app"


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that `path` names in an import anywhere, also inside functions and under TYPE_CHECKING."""
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]) if base else ".".join(above)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if is_module(inner) else base


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path.is_dir() and name.partition(".")[0] in PACKAGES)


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def test_every_room_has_a_rank() -> None:
    assert {room_of(module_name(path)) for path in sources() if module_name(path) != "gateway"} <= set(RANKS)


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_a_module_imports_downwards_only(path: Path) -> None:
    room = room_of(module_name(path))
    wrong = []
    for line, imported in imports_of(path):
        if imported.partition(".")[0] not in PACKAGES or imported in PACKAGES:
            continue
        target = room_of(imported)
        if target != room and RANKS[target] >= RANKS[room]:
            wrong.append(f"{path.relative_to(ROOT)}:{line}: {room} imports {imported}")
    assert wrong == []


@pytest.mark.parametrize(
    "path",
    [path for path in sources() if room_of(module_name(path)) in STANDARD_LIBRARY_ROOMS],
    ids=module_name,
)
def test_the_bottom_imports_images_and_the_standard_library_alone(path: Path) -> None:
    room = room_of(module_name(path))
    wrong = []
    for line, imported in imports_of(path):
        top = imported.partition(".")[0]
        if top in PACKAGES:
            allowed = imported in PACKAGES or room_of(imported) in BESIDE_IMAGES[room] | {room}
        else:
            allowed = top in sys.stdlib_module_names or (room == "nbd_plugin" and top == "nbdkit")
        if not allowed:
            wrong.append(f"{path.relative_to(ROOT)}:{line}: {room} imports {imported}")
    assert wrong == []


@pytest.mark.parametrize("path", sorted((ROOT / "fuse_mount").rglob("*.py")), ids=module_name)
def test_the_mount_does_not_load_the_gateway(path: Path) -> None:
    wrong = []
    for line, imported in imports_of(path):
        top = imported.partition(".")[0]
        if top in PACKAGES:
            allowed = imported in PACKAGES or room_of(imported) in OF_THE_MOUNT
        else:
            allowed = top in sys.stdlib_module_names or top in BESIDE_THE_MOUNT
        if not allowed:
            wrong.append(f"{path.relative_to(ROOT)}:{line}: {imported}")
    assert wrong == []
