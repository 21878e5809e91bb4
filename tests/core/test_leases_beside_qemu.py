"""A lease to write a child and its parent, as coalescing takes it, and a real QEMU with the same files."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gateway.core.leases import Holder, LeaseMode, LeaseRefused, Leases
from gateway.core.limits import Limits
from gateway.images.vhd.create import create_dynamic
from tests.images.disks import make_child

READ, WRITE = LeaseMode.READ, LeaseMode.WRITE
COALESCE = Holder("the gateway", "coalesce", "OpaqueRef:vdi")
SIZE = 2 << 20


class Chain:
    """`leaf` stands on `child`, that on `parent`, all VHD; `overlay` is QEMU's own image over the last two.

    QEMU knows no parents of a VHD, so it is given the files one by one: a quorum opens them together.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.parent = str(directory / "parent.vhd")
        self.child = self._on(self.parent, "child.vhd")
        self.leaf = self._on(self.child, "leaf.vhd")
        self.overlay = str(directory / "overlay.qcow2")
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", self.overlay, str(SIZE)], check=True, timeout=30
        )

    def _on(self, parent: str, name: str) -> str:
        if not Path(parent).exists():
            create_dynamic(parent, SIZE)
        path = str(self.directory / name)
        make_child(Path(path), Path(parent))
        return path

    def arguments(self, name: str) -> list[str]:
        """How qemu-io is told to open what has this name here."""
        if name == "whole chain, reading":
            return ["-r", "--image-opts", _quorum("", self.leaf, self.child, self.parent)]
        if name == "overlay, writing":
            backing = _quorum("backing.", self.child, self.parent)
            return ["--image-opts", f"driver=qcow2,file.driver=file,file.filename={self.overlay},{backing}"]
        file, use = name.split(", ")
        return [*(["-r"] if use == "reading" else []), "-f", "vpc", getattr(self, file)]


def _quorum(prefix: str, *paths: str) -> str:
    options = [f"{prefix}driver=quorum", f"{prefix}vote-threshold=1"]
    for index, path in enumerate(paths):
        child = f"{prefix}children.{index}."
        options += [f"{child}driver=vpc", f"{child}file.driver=file", f"{child}file.filename={path}"]
    return ",".join(options)


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path)


@contextmanager
def qemu_io(arguments: list[str]) -> Iterator[None]:
    """A qemu-io that has opened its image, and with it the locks, and keeps it."""
    process = subprocess.Popen(
        ["qemu-io", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("length\n")
        process.stdin.flush()
        while "2 MiB" not in process.stdout.readline():
            assert process.poll() is None
        yield
    finally:
        process.kill()
        process.communicate()


def tried(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["qemu-io", "-c", "length", *arguments], capture_output=True, text=True, timeout=30, check=False
    )


@pytest.mark.parametrize(
    "held",
    [
        "whole chain, reading",
        "overlay, writing",
        "child, reading",
        "child, writing",
        "parent, reading",
        "parent, writing",
    ],
)
async def test_a_lease_to_coalesce_is_refused_while_qemu_has_one_of_its_files(
    chain: Chain, held: str
) -> None:
    leases = Leases(Limits(lease_wait=0.05))
    files = [chain.child, chain.parent]
    named = [chain.parent] if held.startswith("parent") else [chain.child]
    began = datetime.now(UTC)
    with qemu_io(chain.arguments(held)):
        for wait in (0, None):
            with pytest.raises(LeaseRefused, match="VDI_IN_USE") as refused:
                await leases.acquire(chain.child, WRITE, COALESCE, parents=(WRITE,), wait=wait)
            (blocker,) = refused.value.blockers
            assert blocker.holder is None
            assert blocker.description == refused.value.params[1]
            assert [file for file in files if file in blocker.description] == named
            assert began <= blocker.since <= datetime.now(UTC)
            assert leases.holders_for(COALESCE.vdi) == ()
    async with leases.hold(chain.child, WRITE, COALESCE, parents=(WRITE,), wait=0) as lease:
        assert [node.path for node in lease.chain.nodes] == files


async def test_a_refused_lease_to_coalesce_leaves_qemu_the_files_that_are_free(chain: Chain) -> None:
    leases = Leases()
    with qemu_io(chain.arguments("parent, reading")):
        with pytest.raises(LeaseRefused):
            await leases.acquire(chain.child, WRITE, COALESCE, parents=(WRITE,), wait=0)
        assert tried(chain.arguments("whole chain, reading")).returncode == 0
        assert tried(chain.arguments("child, writing")).returncode == 0


@pytest.mark.parametrize(
    "wanted", ["whole chain, reading", "overlay, writing", "child, reading", "parent, reading"]
)
async def test_qemu_gets_no_file_of_a_lease_to_coalesce(chain: Chain, wanted: str) -> None:
    leases = Leases()
    async with leases.hold(chain.child, WRITE, COALESCE, parents=(WRITE,), wait=0):
        refused = tried(chain.arguments(wanted))
        assert refused.returncode != 0
        assert "lock" in refused.stderr
    assert tried(chain.arguments(wanted)).returncode == 0


async def test_qemu_reads_the_chain_while_it_is_only_being_made_durable(chain: Chain) -> None:
    async with Leases().hold(chain.child, READ, COALESCE, wait=0):
        assert tried(chain.arguments("whole chain, reading")).returncode == 0
        assert tried(chain.arguments("overlay, writing")).returncode == 0
        for file in ("child", "parent"):
            refused = tried(chain.arguments(f"{file}, writing"))
            assert refused.returncode != 0
            assert "lock" in refused.stderr
