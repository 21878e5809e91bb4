"""Images to take leases of, and what happens to their files meanwhile, for tests."""

import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from gateway.core.leases import Holder, Lease, Step
from gateway.images.vhd.create import create_dynamic
from tests.images.disks import make_child

HOLDER = Holder("root", "export_raw_vdi", "OpaqueRef:vdi")
COALESCE = Holder("the gateway", "coalesce", "OpaqueRef:other")


def make_image(path: Path, content: bytes) -> str:
    path.write_bytes(content * 512)
    return str(path)


def open_images() -> list[str]:
    found = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:
            continue
        if ".raw" in target or ".vhd" in target:
            found.append(target)
    return found


def rename_in_another_process(source: str, target: str) -> None:
    script = "import os, sys; os.rename(sys.argv[1], sys.argv[2])"
    subprocess.run([sys.executable, "-ISc", script, source, target], check=True)


def calling_at(step: Step, call: Callable[[], object]) -> Callable[[Step], Awaitable[None]]:
    pending = [call]

    async def at(reached: Step) -> None:
        if reached == step and pending:
            await trio.to_thread.run_sync(pending.pop())

    return at


def content_of(chain_fd: int) -> bytes:
    return os.pread(chain_fd, 3, 0)


async def until_wanted(lease: Lease) -> None:
    # It is told to threads, which cannot wait for events of trio.
    while not lease.wanted:
        await trio.lowlevel.checkpoint()


def make_chain(directory: Path) -> tuple[str, str]:
    parent, child = str(directory / "parent.vhd"), str(directory / "child.vhd")
    create_dynamic(parent, 2 << 20)
    make_child(Path(child), Path(parent))
    return parent, child
