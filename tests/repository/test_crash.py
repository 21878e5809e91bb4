import os
import random
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from gateway.core.leases import Holder, Leases
from gateway.core.records import SR, VDI, ImageFormat
from gateway.images.vhd.check import check_vhd
from gateway.repository.directory import SRDirectory, read_marker
from gateway.repository.records_file import encode_records
from gateway.repository.repository import Repository
from tests.crash import CrashState, RecordingFileCalls
from tests.repository.conftest import SR_UUID
from tests.repository.test_repository import read, replace
from tests.repository.test_scan import make_child

PARENT, CHILD, RAW, NEW = (f"{number:08d}-0000-4000-8000-000000000000" for number in range(1, 5))
HOLDER = Holder("root", "test", "OpaqueRef:vdi")
MIB = 1 << 20
SAMPLE = 64 << 10


class Story:
    """What the files of an SR were promised to hold, and what was being done when it crashed.

    `None` as a content means that there is no image.
    """

    def __init__(self, files: RecordingFileCalls, initial: dict[str, bytes | None]) -> None:
        self.files = files
        self.initial = initial

    def begin(self, name: str, content: bytes | None) -> None:
        self.files.mark(("begun", name, content))

    def end(self, name: str, content: bytes | None) -> None:
        self.files.mark(("done", name, content))

    def allowed(self, state: CrashState) -> dict[str, set[bytes | None]]:
        allowed: dict[str, set[bytes | None]] = {name: {content} for name, content in self.initial.items()}
        for mark in state.marks:
            assert isinstance(mark, tuple)
            step, name, content = mark
            if step == "begun":
                allowed[name].add(content)
            else:
                allowed[name] = {content}
        return allowed


async def states(files: RecordingFileCalls, into: Path, per_point: int) -> AsyncIterator[CrashState]:
    def both() -> Iterator[CrashState]:
        yield from files.kill_states(into / "kill")
        yield from files.power_states(into / "power", random.Random(per_point), per_point)

    pending = both()
    while (state := await trio.to_thread.run_sync(next, pending, None)) is not None:
        yield state


def records_of(name: str) -> bytes:
    sr = SR(ref="OpaqueRef:sr", uuid=SR_UUID, name_label=name)
    return encode_records(sr, [VDI(ref="OpaqueRef:vdi", uuid=NEW, sr=sr.ref)])


async def work_through(repository: Repository, story: Story) -> None:
    """Everything that changes an SR, once."""
    for uuid, image_format in ((NEW, "vhd"), (NEW, "raw")):
        kind: ImageFormat = "vhd" if image_format == "vhd" else "raw"
        story.begin(uuid, bytes(SAMPLE))
        await repository.create_image(uuid, 4 * MIB, kind)
        story.end(uuid, bytes(SAMPLE))
        await repository.write_records(records_of(image_format))
        story.begin(uuid, None)
        await repository.destroy_image(uuid, HOLDER)
        story.end(uuid, None)
    for uuid in (CHILD, RAW):
        before = next(iter(story.initial[uuid] or b"")).to_bytes()
        for data, whole in ((b"\x55" * (SAMPLE // 2), False), (b"\x66" * SAMPLE, True)):
            after = data + before * (SAMPLE - len(data))
            story.begin(uuid, after)
            await replace(repository, uuid, data, whole=whole)
            story.end(uuid, after)


async def prepare(path: str, leases: Leases) -> dict[str, bytes | None]:
    repository = await Repository.create(path, SR_UUID, leases, who="before")
    await repository.create_image(PARENT, 4 * MIB, "vhd")
    await repository.create_image(RAW, 4 * MIB, "raw")
    await replace(repository, PARENT, b"\x11" * SAMPLE)
    await replace(repository, RAW, b"\x22" * SAMPLE)
    make_child(Path(path), CHILD, PARENT)
    await repository.detach()
    return {PARENT: b"\x11" * SAMPLE, CHILD: b"\x11" * SAMPLE, RAW: b"\x22" * SAMPLE, NEW: None}


async def assert_every_state_is_whole(tmp_path: Path, leases: Leases, per_point: int) -> None:
    root = str(tmp_path / "sr")
    initial = await prepare(root, leases)
    files = RecordingFileCalls(Path(root))
    story = Story(files, initial)
    repository = await Repository.attach(root, leases, writable=True, who="recorded", files=files)
    await repository.scan()
    await work_through(repository, story)
    await repository.detach()
    count = 0
    async for state in states(files, tmp_path, per_point):
        count += 1
        where = str(state.directory)
        # Its text means nothing without a lock, and the next state must not find ours in it.
        os.unlink(SRDirectory(where).owner)
        again = await Repository.attach(where, leases, writable=True, who="after", uuid=SR_UUID)
        result = await again.scan()
        assert not [*result.errors(), *result.strange], state
        assert os.listdir(again.directory.staging) == [], state
        for uuid, allowed in story.allowed(state).items():
            image = result.images.get(uuid)
            assert (None if image is None else read(image.path, SAMPLE)) in allowed, f"{uuid}: {state}"
            if image is not None and image.format == "vhd":
                assert not check_vhd(image.path).problems, f"{uuid}: {state}"
        copy = await again.read_records()
        assert copy is None or copy.sr.name_label in ("vhd", "raw"), state
        await again.detach()
    assert count > 100


async def test_after_a_crash_at_any_point_every_image_is_old_or_new(tmp_path: Path, leases: Leases) -> None:
    await assert_every_state_is_whole(tmp_path, leases, per_point=1)


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_after_a_crash_at_any_point_every_image_is_old_or_new_in_many_ways(
    tmp_path: Path, leases: Leases
) -> None:
    await assert_every_state_is_whole(tmp_path, leases, per_point=30)


async def test_an_sr_whose_creation_crashed_is_there_or_can_be_created(
    tmp_path: Path, leases: Leases
) -> None:
    (tmp_path / "disk").mkdir()
    files = RecordingFileCalls(tmp_path / "disk")
    made = await Repository.create(str(tmp_path / "disk" / "sr"), SR_UUID, leases, who="first", files=files)
    files.mark("created")
    await made.detach()
    number = 0
    async for state in states(files, tmp_path, per_point=4):
        number += 1
        path = str(tmp_path / f"state {number}" / "sr")
        shutil.copytree(state.directory, tmp_path / f"state {number}")
        if read_marker(SRDirectory(path)) is None:
            assert not state.marks, state
            again = await Repository.create(path, SR_UUID, leases, who="second")
        else:
            again = await Repository.attach(path, leases, writable=True, who="second", uuid=SR_UUID)
        await again.detach()
