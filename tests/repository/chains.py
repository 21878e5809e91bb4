"""A chain of hidden nodes under two VDIs, in an SR, for tests of what happens to it; and what has to be true.

G <- P <- C <- K1, K2 for an inline coalesce of C into P, and H <- Q <- L for a leaf coalesce of L into Q.
"""

import os
import shutil
from pathlib import Path

from gateway.core.leases import Leases
from gateway.images.chain import open_chain_files
from gateway.images.vhd.check import check_vhd
from gateway.images.vhd.create import create_dynamic, set_hidden
from gateway.repository.directory import SRDirectory, make_service_directory, write_marker
from gateway.repository.repository import Repository
from gateway.repository.scan import ScanResult
from tests.images.disks import content, inspect, libvhdi_reads, make_child, noise, put
from tests.repository.conftest import SR_UUID

G, P, C, K1, K2, H, Q, L = (f"{number:08d}-0000-4000-8000-000000000000" for number in range(101, 109))
VISIBLE = (K1, K2, L)
GRAIN = 4096  # libvhdi reads blocks that are written in finer parts wrongly
BLOCK = 4 * GRAIN
SIZE = 8 * BLOCK
# Who stands on whom, and what is written into each: overlapping, in part, whole blocks.
_NODES: tuple[tuple[str, str | None, tuple[tuple[int, int], ...]], ...] = (
    (G, None, ((0, 5 * BLOCK),)),
    (P, G, ((BLOCK + GRAIN, BLOCK),)),
    (C, P, ((2 * BLOCK, BLOCK), (GRAIN, 2 * GRAIN), (6 * BLOCK, BLOCK))),
    (K1, C, ((GRAIN, GRAIN),)),
    (K2, C, ((2 * BLOCK + GRAIN, BLOCK),)),
    (H, None, ((0, 3 * BLOCK),)),
    (Q, H, ((BLOCK, BLOCK + GRAIN),)),
    (L, Q, ((BLOCK + 2 * GRAIN, BLOCK), (7 * BLOCK, BLOCK))),
)

Bytes = dict[str, bytes]


def image(root: Path, uuid: str) -> Path:
    return root / f"{uuid}.vhd"


class Chains:
    """Both chains, made once in `root`; each test has copies of them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        directory = SRDirectory(str(root))
        make_service_directory(directory)
        write_marker(directory, SR_UUID)
        for number, (uuid, parent, writes) in enumerate(_NODES):
            path = image(root, uuid)
            if parent is None:
                create_dynamic(str(path), SIZE, block_size=BLOCK)
            else:
                make_child(path, image(root, parent), block_size=BLOCK)
            put(path, *((start, noise(length, number + 1)) for start, length in writes))
        for uuid, _, _ in _NODES:
            if uuid not in VISIBLE:
                set_hidden(str(image(root, uuid)), True)
        self._bytes = {uuid: content(image(root, uuid)) for uuid in VISIBLE}

    def place(self, root: Path, *uuids: str) -> Bytes:
        """Make an SR with those nodes, or with all; what the VDIs among them read."""
        shutil.copytree(self._root, root)
        for uuid, _, _ in _NODES:
            if uuids and uuid not in uuids:
                image(root, uuid).unlink()
        return {uuid: data for uuid, data in self._bytes.items() if not uuids or uuid in uuids}


async def attach_and_scan(root: Path, leases: Leases) -> ScanResult:
    """What the gateway sees once it has recovered."""
    # What a crash left in it means nothing without a lock.
    (root / ".vdi-gateway" / "owner").unlink(missing_ok=True)
    repository = await Repository.attach(str(root), leases, writable=True, who="after", uuid=SR_UUID)
    try:
        return await repository.scan()
    finally:
        await repository.detach()
        (root / ".vdi-gateway" / "owner").unlink()


def names(root: Path) -> set[str]:
    return {name for name in os.listdir(root) if name != ".vdi-gateway"}


def assert_sound(
    root: Path, found: ScanResult, expected: Bytes, story: object, *, libvhdi: bool, warnings: bool = True
) -> None:
    """Only whole images are left, hidden unless they are VDIs, and those read as before.

    Without `warnings` an image may say less about its parent than SM would write.
    """
    assert not [*found.errors(), *found.journals, *found.strange], story
    assert names(root) == {f"{uuid}.vhd" for uuid in found.images}, story
    service = set(os.listdir(root / ".vdi-gateway"))
    assert service == {"sr.json", "staging"}, story
    assert not os.listdir(root / ".vdi-gateway" / "staging"), story
    assert {uuid for uuid, node in found.images.items() if not node.hidden} == set(expected), story
    for uuid in found.images:
        path = image(root, uuid)
        report = check_vhd(str(path))
        assert not (report.problems if warnings else report.errors), (uuid, story)
        assert not inspect(path).footer.hidden or uuid not in expected
    for uuid, data in expected.items():
        path = image(root, uuid)
        assert content(path) == data, (uuid, story)
        if libvhdi:
            chain = open_chain_files(str(path), writable=False)
            paths = [Path(node.path) for node in chain.nodes]
            chain.close()
            assert libvhdi_reads(paths) == data, (uuid, story)
