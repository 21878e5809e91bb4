"""Lives of several VDIs, step by step, beside a model of plain bytes; for tests that compare and that crash.

The coalescer is paused but for the steps in which it is asked, so a story takes the same course each time. A
step says to a recorder what it may change before it begins, and what stands from then on when it has ended.
"""

import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Final

import trio

from gateway.core.leases import Holder, LeaseMode
from gateway.core.task import Operation
from gateway.images.chain import open_chain_files
from gateway.images.files import Buffer, FileCalls
from gateway.images.layout import raw_layout
from gateway.repository.coalescer import PAUSED_KEY
from gateway.transfers.copy_disk import copy_disk
from gateway.transfers.export_disk import DiskExport
from gateway.transfers.publications import Publications
from tests.repository.coalesce_house import House, open_house_in, until
from tests.repository.vdis import PIECE, sound_content
from tests.transfers.test_export_disk import Collected

MIB: Final = 1 << 20
SIZE: Final = 4 * MIB
LARGEST: Final = 8 * MIB
MOST_VDIS: Final = 7
PLACES: Final = (0, PIECE, 3 * PIECE, 2 * MIB - PIECE, 2 * MIB, SIZE - 2 * PIECE, SIZE, LARGEST - PIECE)
# As often as it takes for deep chains and for merges that have something to copy.
STEPS: Final = (
    *(
        "write",
        "write",
        "write",
        "write",
        "fill",
        "fill",
        "fill",
        "snapshot",
        "snapshot",
        "snapshot",
        "clone",
    ),
    *("clone", "revert", "destroy", "destroy", "destroy", "resize", "copy", "copy over", "import", "export"),
    *("create", "scan", "coalesce", "interrupted coalesce", "interrupted coalesce"),
)
_WRITES: Final = ("write", "fill", "import", "resize")


@dataclass(frozen=True, slots=True)
class Step:
    """`number` chooses the VDI; `place` and `value` what is written where, and `value` when to interrupt."""

    what: str
    number: int
    place: int
    value: int


@dataclass(frozen=True, slots=True)
class Promise:
    """What every VDI reads, by uuid; and beside that, what the step that has begun may have made of it.

    `becomes` are other contents of the VDI `vdi` (None: it is gone), of which a write may have stored any
    sectors if it is `torn`. A VDI that nobody was told of yet reads `made`.
    """

    known: Mapping[str, bytes]
    vdi: str = ""
    becomes: bytes | None = b""
    torn: bool = False
    made: bytes | None = None

    def allows(self, uuid: str, found: bytes | None) -> bool:
        if uuid not in self.known:
            return found is not None and found == self.made
        old = self.known[uuid]
        if found == old or (uuid == self.vdi and found == self.becomes):
            return True
        if uuid != self.vdi or not self.torn or self.becomes is None or found is None:
            return False
        return len(found) == len(old) and all(
            found[start : start + 512] in (old[start : start + 512], self.becomes[start : start + 512])
            for start in range(0, len(old), 512)
        )


class Interrupting(FileCalls):
    """Calls something once, in the thread that writes or copies for the nth time after it was armed."""

    _left = 0
    _call: Callable[[], None] | None = None

    def arm(self, number: int, call: Callable[[], None]) -> None:
        self._left, self._call = number, call

    def disarm(self) -> None:
        self._call = None

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        super().pwrite(fd, data, offset)
        self._count()

    def copy_range(self, source_fd: int, source_offset: int, fd: int, offset: int, length: int) -> None:
        super().copy_range(source_fd, source_offset, fd, offset, length)
        self._count()

    def _count(self) -> None:
        self._left -= 1
        call = self._call
        if call is not None and self._left < 0:
            self._call = None
            call()


class Story:
    """One SR, its VDIs, and what they have to read. `tell` hears each promise."""

    def __init__(
        self, house: House, sr: str, files: Interrupting, tell: Callable[[Promise], None] = lambda _: None
    ) -> None:
        self.house = house
        self.inventory: Final = house.inventory
        self.sr = sr
        self.plain: dict[str, bytes] = {}
        self.done: list[Step] = []
        self._files = files
        self._tell = tell
        self._sound: dict[str, tuple[object, ...]] = {}
        self._named: dict[str, bytes] = {}

    def promise(self) -> Promise:
        """What stands between two steps."""
        return Promise({self._uuid(ref): data for ref, data in self.plain.items()})

    async def do(self, step: Step) -> None:
        """One step, or nothing where it can't be done."""
        self.done.append(step)
        refs = [ref for ref in self.plain if self._is_for(ref, step)]
        if refs:
            await getattr(self, "_" + step.what.replace(" ", "_"))(refs[step.number % len(refs)], step)
        self._tell(self.promise())

    def _is_for(self, ref: str, step: Step) -> bool:
        vdi = self.inventory.records.vdis.get(ref)
        if step.what == "revert":
            return vdi.is_a_snapshot and vdi.snapshot_of in self.plain
        return not (vdi.is_a_snapshot and step.what in _WRITES)

    def _uuid(self, ref: str) -> str:
        return self.inventory.records.vdis.get(ref).uuid

    def _begin(
        self,
        ref: str | None = None,
        becomes: bytes | None = b"",
        *,
        torn: bool = False,
        made: bytes | None = None,
    ) -> None:
        known = self.promise().known
        self._tell(Promise(known, "" if ref is None else self._uuid(ref), becomes, torn, made))

    # The steps

    async def _create(self, _: str, step: Step) -> None:
        if len(self.plain) < MOST_VDIS:
            size = SIZE + step.value % 2 * 2 * MIB
            self._begin(made=bytes(size))
            self.plain[await self.inventory.vdi_create(sr=self.sr, virtual_size=size)] = bytes(size)

    async def _write(self, ref: str, step: Step) -> None:
        await self._write_at(ref, step.place, bytes([step.value]) * PIECE * (1 + step.value % 3))

    async def _fill(self, ref: str, step: Step) -> None:
        # A whole block, which a merge copies in one piece; some of zeroes, which let no old bytes through.
        value = step.value if step.value % 4 else 0
        await self._write_at(ref, step.place // (2 * MIB) * 2 * MIB, bytes([value]) * 2 * MIB)

    async def _write_at(self, ref: str, place: int, data: bytes) -> None:
        old = self.plain[ref]
        place %= len(old)
        data = data[: len(old) - place]
        new = old[:place] + data + old[place + len(data) :]
        self._begin(ref, new, torn=True)
        lease = await self.inventory.lease(ref, LeaseMode.WRITE, Holder("root", "write", ref))
        disk = await trio.to_thread.run_sync(partial(lease.open_disk, files=self._files))
        await trio.to_thread.run_sync(disk.pwrite, data, place)
        await trio.to_thread.run_sync(disk.close)
        lease.release()
        await lease.released()
        await self.inventory.vdi_changed(ref)
        self.plain[ref] = new

    async def _import(self, ref: str, step: Step) -> None:
        old, whole = self.plain[ref], bool(step.value % 2)
        data = bytes([step.value]) * (PIECE * (step.value % 7))
        new = data + (bytes(len(old) - len(data)) if whole else old[len(data) :])
        self._begin(ref, new)
        lease = await self.inventory.lease(ref, LeaseMode.REPLACE, Holder("root", "import", ref))
        async with self.inventory.repository_of(ref).staging(lease, whole=whole) as staging:
            await trio.to_thread.run_sync(staging.disk.pwrite, data, 0)
            await staging.commit()
            await self.inventory.vdi_changed(ref)
        lease.release()
        await lease.released()
        self.plain[ref] = new

    async def _export(self, ref: str, _: Step) -> None:
        lease = await self.inventory.lease(ref, LeaseMode.READ, Holder("root", "export", ref))
        disk = await trio.to_thread.run_sync(lease.open_disk)
        sink = Collected()
        await trio.to_thread.run_sync(DiskExport(raw_layout(disk)).send, sink, 0, disk.size)
        disk.close()
        lease.release()
        await lease.released()
        assert sink.data == self.plain[ref], self.done

    async def _snapshot(self, ref: str, _: Step) -> None:
        if len(self.plain) < MOST_VDIS:
            self._begin(made=self.plain[ref])
            self.plain[await self.inventory.vdi_snapshot(ref)] = self.plain[ref]

    async def _clone(self, ref: str, _: Step) -> None:
        if len(self.plain) < MOST_VDIS:
            self._begin(made=self.plain[ref])
            self.plain[await self.inventory.vdi_clone(ref)] = self.plain[ref]

    async def _revert(self, ref: str, _: Step) -> None:
        vdi = self.inventory.records.vdis.get(ref).snapshot_of
        self._begin(vdi, self.plain[ref])
        await self.inventory.vdi_revert(ref)
        self.plain[vdi] = self.plain[ref]

    async def _destroy(self, ref: str, _: Step) -> None:
        if len(self.plain) > 1:
            self._begin(ref, None)
            await self.inventory.vdi_destroy(ref)
            del self.plain[ref]

    async def _resize(self, ref: str, step: Step) -> None:
        size = len(self.plain[ref]) + (1 + step.value % 2) * 2 * MIB
        if size > LARGEST:
            return
        new = self.plain[ref].ljust(size, b"\0")
        self._begin(ref, new)
        await self.inventory.vdi_resize(ref, size)
        self.plain[ref] = new

    async def _copy(self, ref: str, _: Step) -> None:
        if len(self.plain) < MOST_VDIS:
            self._begin(made=self.plain[ref])
            made = await self._copy_disk(ref, sr=self.sr)
            self.plain[made] = self.plain[ref]

    async def _copy_over(self, ref: str, step: Step) -> None:
        for into in list(self.plain)[step.value % len(self.plain) :]:
            room = len(self.plain[into]) - len(self.plain[ref])
            snapshot = self.inventory.records.vdis.get(into).is_a_snapshot
            if into != ref and room >= 0 and not snapshot:
                new = self.plain[ref] + bytes(room)
                self._begin(into, new)
                await self._copy_disk(ref, into=into)
                self.plain[into] = new
                return

    async def _copy_disk(self, ref: str, **where: str) -> str:
        return await copy_disk(
            self.inventory,
            Publications(),
            Operation("OpaqueRef:task", None),
            vdi=ref,
            who="the test",
            turns=trio.CapacityLimiter(1),
            **where,  # type: ignore[arg-type] # sr or into, both are references
        )

    async def _scan(self, _: str, __: Step) -> None:
        await self.inventory.sr_scan(self.sr)

    async def _coalesce(self, _: str, __: Step) -> None:
        self._begin()
        await self._set_paused(False)
        await self.house.settled(self.sr)
        await self._set_paused(True)

    async def _complete_coalesce(self, _: str, __: Step) -> None:
        self._begin()
        await self.assert_all_merged()
        await self._set_paused(True)

    async def _interrupted_coalesce(self, ref: str, step: Step) -> None:
        """Paused in the middle of a copy, as if by somebody; what is left is the next one's."""
        self._files.arm(step.value % 5, self._pause_now)
        await self._coalesce(ref, step)
        self._files.disarm()

    def _pause_now(self) -> None:
        # Whoever is interrupted right here learns it as soon as he looks. He can be told only by a task that
        # waits for his thread again, which it does at the latest before the second call.
        with suppress(trio.Cancelled):
            trio.from_thread.run(self._set_paused, True)
            trio.from_thread.run_sync(self._files.disarm)

    async def _set_paused(self, paused: bool) -> None:
        records = self.inventory.records.srs
        await records.change(self.sr, other_config={PAUSED_KEY: "true"} if paused else {})
        if paused:
            self.house.coalescer(self.sr).switches_may_have_changed()

    # What has to be true

    async def assert_true(self, *, again: bool = False) -> None:
        """The records are those of the model, and every node is sound; those that changed, or all `again`."""
        vdis = self.inventory.records.vdis_of_sr(self.sr)
        assert {vdi.ref for vdi in vdis if vdi.managed} == set(self.plain), self.done
        assert {vdi.ref: vdi.virtual_size for vdi in vdis if vdi.managed} == {
            ref: len(data) for ref, data in self.plain.items()
        }, self.done
        if again:
            self._sound.clear()
        repository = self.inventory.repository(self.sr)
        for vdi in vdis:
            path = repository.image_path(vdi.uuid)
            await trio.to_thread.run_sync(self._assert_sound, path, vdi.content_id, self.plain.get(vdi.ref))

    def _assert_sound(self, path: str, content_id: str, expected: bytes | None) -> None:
        chain = open_chain_files(path, writable=False)
        stats = [os.fstat(node.fd) for node in chain.nodes]
        paths = [node.path for node in chain.nodes]
        chain.close()
        state = (content_id, *((s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats))
        if self._sound.get(path) == state:
            return
        found = sound_content(paths, self.done)
        assert expected is None or found == expected, (path, self.done)
        # Downloads go on where they were interrupted as long as the id is the same.
        assert self._named.setdefault(content_id, sha256(found).digest()) == sha256(found).digest(), self.done
        self._sound[path] = state

    async def assert_all_merged(self) -> None:
        """Once the coalescer has been let do all it can, no more is hidden than is shared."""
        await self._set_paused(False)
        await self.house.settled(self.sr)
        # What was written to while it was being merged rests for some seconds.
        await until(lambda: not self.inventory.sr_coalesce_state(self.sr))
        images = (await self.inventory.repository(self.sr).scan()).images
        for image in images.values():
            children = [child for child in images.values() if child.parent == image.uuid]
            assert not image.hidden or len(children) > 1, (image, self.done)


@asynccontextmanager
async def told(
    directory: Path, files: Interrupting, tell: Callable[[Promise], None] = lambda _: None
) -> AsyncIterator[Story]:
    """A story that goes on in `directory`/sr, whose first VDI is there."""
    async with open_house_in(directory, files=files) as house:
        (sr,) = (sr.ref for sr in house.inventory.records.srs.all())
        story = Story(house, sr, files, tell)
        for vdi in house.inventory.records.vdis_of_sr(sr):
            story.plain[vdi.ref] = bytes(vdi.virtual_size)
        yield story


async def begin(directory: Path) -> Promise:
    """Make an SR with an empty VDI, in which the coalescer is paused; what stands there."""
    async with open_house_in(directory) as house:
        sr = await house.inventory.sr_create("sr", str(directory / "sr"))
        await house.inventory.records.srs.change(sr, other_config={PAUSED_KEY: "true"})
        ref = await house.inventory.vdi_create(sr=sr, virtual_size=SIZE)
        return Promise({house.inventory.records.vdis.get(ref).uuid: bytes(SIZE)})
