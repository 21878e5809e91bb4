"""What a crashed SM leaves in an SR, step by step; each is a function of the SR's directory."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from gateway.images.files import FILES
from gateway.images.vhd.check import check_vhd
from gateway.images.vhd.create import create_differencing, create_dynamic, set_hidden
from gateway.images.vhd.image import open_vhd
from gateway.images.vhd.merge import Merge
from gateway.images.vhd.relink import set_parent
from tests.images.disks import inspect
from tests.images.merges import merge, opened, stop_after
from tests.repository.chains import BLOCK, K1, K2, SIZE, C, L, P, Q, image

NEW = "00000109-0000-4000-8000-000000000000"
SNAPSHOT = "00000110-0000-4000-8000-000000000000"

Step = Callable[[Path], None]


def file(name: str, content: str | bytes = "1") -> Step:
    data = content.encode() if isinstance(content, str) else content

    def write(root: Path) -> None:
        (root / name).write_bytes(data)

    return write


def journal(kind: str, uuid: str, content: str = "1") -> Step:
    return file(f"{kind}_{uuid}", content)


def copied(child: str, parent: str) -> Step:
    return lambda root: merge(image(root, child), image(root, parent))


def copied_in_part(root: Path) -> None:
    with opened(image(root, C), image(root, P)) as (child, parent):
        work = Merge(child, parent, files=FILES)
        assert not work.copy_some(stop_after(1))
        work.flush()


def lost_its_end(root: Path) -> None:
    """vhd-util was killed between growing the parent and writing the footer behind the new block."""
    path = image(root, P)
    with path.open("r+b") as file:
        file.seek(-512, os.SEEK_END)
        file.write(bytes(512 + 4096))
    assert check_vhd(str(path)).errors


def relinked(uuid: str) -> Step:
    return lambda root: set_parent(str(image(root, uuid)), str(image(root, P)))


def relinked_but_for_its_locators(root: Path) -> None:
    """Killed after the header's first sector: locators still lead to the old parent."""
    path = image(root, K1)
    header = inspect(path).footer.data_offset
    before = path.read_bytes()
    relinked(K1)(root)
    after = path.read_bytes()
    assert after[header : header + 512] != before[header : header + 512]
    path.write_bytes(before[:header] + after[header : header + 512] + before[header + 512 :])


def unhidden(uuid: str) -> Step:
    return lambda root: set_hidden(str(image(root, uuid)), False)


def hidden(uuid: str) -> Step:
    return lambda root: set_hidden(str(image(root, uuid)), True)


def renamed(old: str, new: str) -> Step:
    return lambda root: os.rename(root / old, root / new)


def removed(name: str) -> Step:
    return lambda root: (root / name).unlink()


def new_leaf(root: Path) -> None:
    """FileSR makes an empty child of the base copy that has the leaf's blocks, beside the leaf."""
    path = image(root, L)
    with path.open("rb") as file:
        create_differencing(
            str(root / f"{L}.vhd.new"),
            str(path),
            open_vhd(file.fileno(), str(path)),
            parent_name=f"{NEW}.vhd",
        )


def linked(root: Path) -> None:
    os.link(image(root, L), image(root, NEW))


def on_the_base_copy(root: Path) -> None:
    set_parent(str(image(root, K2)), str(image(root, NEW)))


def torn(root: Path) -> None:
    os.truncate(root / f"{L}.vhd.new", 700)


def visible_stranger(root: Path) -> None:
    create_dynamic(str(image(root, NEW)), SIZE, block_size=BLOCK)


def unreadable(uuid: str) -> Step:
    return file(f"{uuid}.vhd", b"broken" * 1000)


def a_new_leaf_with_blocks(root: Path) -> None:
    new_leaf(root)
    visible_stranger(root)
    path = root / f"{L}.vhd.new"
    shutil.copy(image(root, L), path)


LEAF_JOURNAL = journal("leaf", L, Q)
MOVED_ASIDE = renamed(f"{L}.vhd", f"OLD_{L}.vhd")
TOOK_ITS_NAME = renamed(f"{Q}.vhd", f"{L}.vhd")
RELINK = (copied(C, P), journal("relink", C))
LEAF = (LEAF_JOURNAL, unhidden(Q), copied(L, Q))
