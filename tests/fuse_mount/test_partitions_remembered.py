"""The partitions of VDIs: who reads them when, and for how long an answer is good."""

from pathlib import Path

import pytest
import trio
import trio.testing

from fuse_mount.partitions import Partitions
from tests.fuse_mount.askers import asking
from tests.fuse_mount.partition_tables import GIB, MIB, Reads, made, places, told


class FakeDisk:
    def __init__(self, disks: "FakeDisks", path: Path) -> None:
        self._disks = disks
        self._reads = Reads(path)
        self.size = self._reads.size

    async def read(self, offset: int, length: int) -> memoryview:
        await self._disks.gate.wait()
        # Short, as a read may be, and gone at the next one.
        self._disks.buffer[:] = b"\xee" * len(self._disks.buffer)
        data = self._reads.at(offset, min(length, 300_000))
        self._disks.buffer[: len(data)] = data
        return memoryview(self._disks.buffer)[: len(data)]

    async def close(self) -> None:
        await trio.lowlevel.checkpoint()
        self._disks.open_now -= 1


class FakeDescription:
    def __init__(self, content_id: str) -> None:
        self.content_id = content_id


def nothing() -> None:
    pass


class FakeDisks:
    """VDIs by their names, each a file; opens are counted."""

    def __init__(self, files: dict[str, Path]) -> None:
        self.files = files
        self.contents = {vdi: f"content of {vdi}" for vdi in files}
        self.remembered: dict[str, str] = {}
        self.held: dict[str, str] = {}
        self.opened = 0
        self.open_now = 0
        self.buffer = bytearray(MIB)
        self.gate = trio.Event()
        self.gate.set()
        self.on_open = nothing

    async def open(self, vdi: str) -> FakeDisk:
        await trio.lowlevel.checkpoint()
        self.opened += 1
        self.on_open()
        self.open_now += 1
        return FakeDisk(self, self.files[vdi])

    async def describe(self, vdi: str) -> FakeDescription:
        await trio.lowlevel.checkpoint()
        return FakeDescription(self.remembered.setdefault(vdi, self.contents[vdi]))

    def forget(self, vdi: str) -> None:
        self.remembered.pop(vdi, None)

    def partitions(self, most_cached: int = 10) -> Partitions:
        return Partitions(self.open, self, self.held, most_cached=most_cached)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("tables")
    script = (
        "label: dos\nstart=64, size=60000000, type=f\n5: start=128, size=1024\n6: start=6000000, size=1024\n"
    )
    return {
        "logical": made(directory / "logical", 40 * GIB, script),
        "other": made(directory / "other", 16 * MIB, "label: gpt\nsize=5MiB\n"),
        "none": made(directory / "none", 16 * MIB, "label: gpt\n"),
    }


@pytest.fixture
def disks(tables: dict[str, Path]) -> FakeDisks:
    return FakeDisks(dict(tables))


async def test_the_partitions_of_a_vdi_are_read_under_a_lease_that_ends(disks: FakeDisks) -> None:
    partitions = disks.partitions()
    assert places(await partitions.of("logical")) == told(disks.files["logical"])
    assert await partitions.of("none") == ()
    assert (disks.opened, disks.open_now) == (2, 0)


async def test_a_table_is_read_once_for_each_content(disks: FakeDisks) -> None:
    partitions = disks.partitions()
    for _ in range(3):
        assert len(await partitions.of("other")) == 1
        assert await partitions.of("none") == ()
    assert disks.opened == 2
    disks.contents["none"] = disks.contents["other"]  # as a snapshot has its source's
    disks.forget("none")
    assert len(await partitions.of("none")) == 1
    assert disks.opened == 2
    disks.contents["other"] = "another content"
    disks.forget("other")
    await partitions.of("other")
    assert disks.opened == 3


async def test_no_more_tables_are_remembered_than_was_said(disks: FakeDisks) -> None:
    partitions = disks.partitions(most_cached=1)
    for vdi in ("other", "none", "other", "other"):
        await partitions.of(vdi)
    assert disks.opened == 3


async def test_equal_questions_at_one_time_are_one(disks: FakeDisks) -> None:
    disks.gate = trio.Event()
    async with asking(disks.partitions().of) as askers:
        await askers.more(*["other"] * 20)
        disks.gate.set()
    [found] = set(askers.outcomes)
    assert isinstance(found, tuple)
    assert (disks.opened, disks.open_now) == (1, 0)


async def test_when_the_one_who_asked_is_cancelled_the_others_get_their_answer(disks: FakeDisks) -> None:
    disks.gate = trio.Event()
    async with asking(disks.partitions().of) as askers:
        await askers.more(*["other"] * 4)
        await askers.cancel(0)
        disks.gate.set()
    assert askers.outcomes[0] is None
    assert [len(each) for each in askers.outcomes[1:] if isinstance(each, tuple)] == [1, 1, 1]
    assert (disks.opened, disks.open_now) == (2, 0)


async def test_a_refusal_is_everybodys_and_is_not_remembered(disks: FakeDisks) -> None:
    partitions = disks.partitions()
    refusals = []

    def refuse() -> None:
        raise PermissionError("somebody writes")

    async def ask() -> None:
        try:
            await partitions.of("other")
        except PermissionError as error:
            refusals.append(str(error))

    disks.on_open = refuse
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask)
    assert refusals == ["somebody writes"] * 3
    assert disks.opened == 1
    disks.on_open = nothing
    assert len(await partitions.of("other")) == 1


async def test_what_is_read_while_the_mount_itself_writes_is_not_remembered(
    disks: FakeDisks, tmp_path: Path
) -> None:
    partitions = disks.partitions()
    disks.held["other"] = "writing"
    assert len(await partitions.of("other")) == 1
    disks.files["other"] = made(tmp_path / "two", 16 * MIB, "label: gpt\nsize=1MiB\nsize=1MiB\n")
    assert len(await partitions.of("other")) == 2
    del disks.held["other"]
    disks.files["other"] = disks.files["none"]
    assert await partitions.of("other") == ()


async def test_a_table_is_remembered_for_the_content_that_was_read(disks: FakeDisks) -> None:
    """A snapshot keeps the id that its source had; the source may change before it is opened."""
    partitions = disks.partitions()
    disks.contents["none"] = disks.contents["other"]

    def change() -> None:
        disks.contents["other"] = "another content"

    disks.on_open = change
    assert len(await partitions.of("other")) == 1
    disks.on_open = nothing
    assert await partitions.of("none") == ()
