"""A mount of VDIs that exist nowhere, as a process: `python -m tests.fuse_mount.generated DIR COUNT`.

Nothing can be opened in it but records. It says so on stdout when it is mounted.
"""

import json
import sys
import threading
import uuid
from collections.abc import Mapping
from typing import Any

import trio

from fuse_mount import mounting
from fuse_mount.attributes import Access
from fuse_mount.catalogue import Catalogue, Changes, Sr, Vdi
from fuse_mount.operations import VdiOperations
from fuse_mount.tree import Tree
from gateway.core.log import configure

SIZE = 1 << 30
SR = Sr("sr", "00000000-0000-4000-8000-000000000000", "disks")


def generated(count: int) -> list[Vdi]:
    """VDIs: each third has a name of its own, the others share in pairs; each fifth is a snapshot."""
    vdis = []
    for number in range(count):
        name = f"disk {number // 3 * 3 + bool(number % 3)}"
        above = "vdi 0" if number and number % 5 == 0 else ""
        record = json.dumps({"name_label": name, "uuid": str(number), "other_config": {"a": "b"}}).encode()
        vdis.append(
            Vdi(
                f"vdi {number}",
                str(uuid.UUID(int=number + (1 << 127))),
                name,
                SR.ref,
                SIZE,
                SIZE // 2,
                above,
                record=record,
            )
        )
    return vdis


class GeneratedFeed:
    """Tells everything once, and then nothing any more."""

    session = None

    def __init__(self, vdis: list[Vdi]) -> None:
        self._first: list[Vdi] | None = vdis
        self._ended = threading.Event()

    def wait(self) -> Changes:
        if self._first is not None:
            vdis, self._first = self._first, None
            return Changes({vdi.ref: vdi for vdi in vdis}, {SR.ref: SR}, frozenset({SR.ref}), whole=True)
        self._ended.wait()
        return Changes({}, {}, frozenset({SR.ref}))

    def close(self) -> None:
        self._ended.set()


class NoDisks:
    """Nothing can be opened, and no sizes are known."""

    held: Mapping[str, str] = {}

    async def open(self, vdi: str, part: Any, *, write: bool) -> Any:
        raise FileNotFoundError(vdi)

    async def close(self) -> None:
        pass

    def known(self, vdi: str) -> None:
        return None

    last_known = known

    async def describe(self, vdi: str) -> Any:
        raise ConnectionError("there is no gateway")

    async def of(self, vdi: str) -> tuple[Any, ...]:
        return ()

    def forget(self, vdi: str) -> None:
        pass

    remove = forget


def main() -> int:
    configure("warning")
    directory, count = sys.argv[1], int(sys.argv[2])
    path = mounting.claim(directory)
    feed = GeneratedFeed(generated(count))
    tree = Tree(Catalogue())
    tree.apply(feed.wait())
    nothing: Any = NoDisks()
    operations = VdiOperations(tree, nothing, nothing, nothing, Access())
    mount = mounting.Mount(path, operations, tree, feed, nothing, nothing)
    return trio.run(mounting.serve, mount, lambda: print(f"{count} VDIs are mounted on {path}", flush=True))


if __name__ == "__main__":
    sys.exit(main())
