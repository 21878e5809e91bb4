"""GET /export_raw_vdi in formats other than raw: whole, as deltas, and while chains are coalesced."""

import os
import random
from collections.abc import AsyncIterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pytest
import trio

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, LeaseMode
from gateway.core.records import VDI
from gateway.core.refs import NULL_REF
from gateway.core.tasks import TaskStatus
from gateway.images.files import FILES
from gateway.images.vhd.check import check_vhd
from gateway.images.vhd.format import Footer
from tests.http.gate import MIB, Answer, Gate, chain, coalesce, open_gate, until
from tests.http.test_refusals import UNKNOWN
from tests.images.disks import libvhdi_reads, open_leaf, pattern, qemu_compare, read_all
from tests.images.exports import libqcow_reads
from tests.repository.vdis import write

BLOCK = 2 * MIB
SIZE = 10 * BLOCK
DATA = pattern(BLOCK)
FORMATS = ["vhd", "qcow2"]
TYPES = {"vhd": "application/vhd", "qcow2": "application/x-qemu-disk"}


@pytest.fixture
async def gate(memory: Path) -> AsyncIterator[Gate]:
    async with open_gate(memory) as opened:
        yield opened


async def export(
    gate: Gate, vdi: VDI | str, image_format: str, base: VDI | None = None, **headers: str
) -> Answer:
    parameters = {"format": image_format} | ({} if base is None else {"base": base.uuid})
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return await gate.ask("GET", gate.target(vdi, "export_raw_vdi", **parameters), given)


async def snapshot(gate: Gate, vdi: VDI) -> VDI:
    return gate.inventory.records.vdis.get(await gate.inventory.vdi_snapshot(vdi.ref))


async def history(gate: Gate, count: int) -> tuple[VDI, list[VDI]]:
    """A disk, written to at a few places between snapshots."""
    vdi = await gate.vdi(SIZE)
    snapshots = []
    for number in range(count):
        await write(gate.inventory, vdi.ref, DATA, number * BLOCK + 4096)
        await write(gate.inventory, vdi.ref, bytes(BLOCK), (number + 3) % 10 * BLOCK)
        snapshots.append(await snapshot(gate, vdi))
    await write(gate.inventory, vdi.ref, DATA[4096:12288], 9 * BLOCK)
    return vdi, snapshots


def saved(directory: Path, vdi: VDI, image_format: str, answer: Answer) -> Path:
    assert (answer.status, answer.whole) == (200, True), answer.body[:200]
    path = directory / f"{vdi.uuid}.{image_format}"
    path.write_bytes(answer.body)
    return path


@pytest.mark.parametrize("image_format", FORMATS)
async def test_a_whole_disk_under_a_task(gate: Gate, memory: Path, image_format: str) -> None:
    vdi, _ = await history(gate, 2)
    answer = await export(gate, vdi, image_format.upper())
    image = saved(memory, vdi, image_format, answer)
    (memory / "raw").write_bytes(gate.content(vdi))
    qemu_compare(image, "vpc" if image_format == "vhd" else "qcow2", memory / "raw", "raw")
    assert answer.headers["content-type"] == TYPES[image_format]
    assert answer.headers["content-disposition"] == f'attachment; filename="{vdi.uuid}.{image_format}"'
    assert answer.headers["accept-ranges"] == "bytes"
    ended = await gate.ended(answer.headers["task-id"])
    assert ended.status is TaskStatus.SUCCESS


@pytest.mark.parametrize("image_format", FORMATS)
async def test_deltas_fit_on_each_other(gate: Gate, memory: Path, image_format: str) -> None:
    vdi, snapshots = await history(gate, 3)
    disks = [vdi, *reversed(snapshots)]
    images = []
    for disk, base in zip(disks, [*disks[1:], None], strict=True):
        images.append(saved(memory, disk, image_format, await export(gate, disk, image_format, base)))
    for number, disk in enumerate(disks):
        (memory / "raw").write_bytes(gate.content(disk))
        if image_format == "qcow2":
            qemu_compare(images[number], "qcow2", memory / "raw", "raw")
            assert libqcow_reads(images[number:]) == gate.content(disk)
        else:
            assert libvhdi_reads(images[number:]) == gate.content(disk)
            assert not check_vhd(str(images[number])).problems
    assert images[0].stat().st_size < images[-1].stat().st_size


async def test_a_delta_of_two_with_the_same_content_is_empty(gate: Gate, memory: Path) -> None:
    vdi, _ = await history(gate, 1)
    one, other = await snapshot(gate, vdi), await snapshot(gate, vdi)
    full = saved(memory, one, "vhd", await export(gate, one, "vhd"))
    delta = saved(memory, other, "vhd", await export(gate, other, "vhd", one))
    assert delta.stat().st_size < 5000
    assert libvhdi_reads([delta, full]) == gate.content(vdi)
    ids = [Footer.unpack(path.read_bytes()[:512], "").unique_id for path in (full, delta)]
    assert ids[0] == ids[1]


async def test_a_disk_that_has_grown_stands_on_a_smaller_one(gate: Gate, memory: Path) -> None:
    vdi, (base,) = await history(gate, 1)
    await gate.inventory.vdi_resize(vdi.ref, SIZE + 3 * BLOCK)
    await write(gate.inventory, vdi.ref, DATA, SIZE + BLOCK)
    vdi = gate.inventory.records.vdis.get(vdi.ref)
    for image_format in FORMATS:
        saved(memory, base, image_format, await export(gate, base, image_format))
        delta = saved(memory, vdi, image_format, await export(gate, vdi, image_format, base))
        if image_format == "qcow2":
            (memory / "raw").write_bytes(gate.content(vdi))
            qemu_compare(delta, "qcow2", memory / "raw", "raw")
        else:
            assert read_vhd(delta) == gate.content(vdi)


def read_vhd(path: Path) -> bytes:
    disk = open_leaf(path)
    try:
        return read_all(disk)
    finally:
        disk.close()


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
async def test_random_histories(coalescing: Gate, memory: Path, seed: int) -> None:
    """Any pair of VDIs of a family, at any time: right, and the same bytes again after a coalesce."""
    gate, choose = coalescing, random.Random(seed)
    family = [await gate.vdi(SIZE)]
    for _ in range(30):
        vdi = choose.choice(family)
        step = choose.choice(["write", "write", "write", "snapshot", "clone", "destroy", "grow", "coalesce"])
        if step == "write" and not vdi.is_a_snapshot:
            length = choose.randrange(1, 600) * 4096
            offset = choose.randrange(0, (vdi.virtual_size - length) // 4096) * 4096
            data = bytes(length) if not choose.randrange(4) else DATA[:4096] * (length // 4096)
            await write(gate.inventory, vdi.ref, data, offset)
        elif step in ("snapshot", "clone") and len(family) < 6:
            fork = gate.inventory.vdi_snapshot if step == "snapshot" else gate.inventory.vdi_clone
            family.append(gate.inventory.records.vdis.get(await fork(vdi.ref)))
        elif step == "destroy" and len(family) > 2:
            await gate.inventory.vdi_destroy(vdi.ref, wait=5)
            family.remove(vdi)
        elif step == "coalesce" and len(family) > 1:
            pairs = [choose.sample(family, 2) for _ in range(3)]
            before = [await in_all_ways(gate, *pair) for pair in pairs]
            await coalesce(gate)
            assert before == [await in_all_ways(gate, *pair) for pair in pairs]
        elif step == "grow" and not vdi.is_a_snapshot and vdi.virtual_size < 2 * SIZE:
            with suppress(XenAPIError):  # beside a larger parent
                await gate.inventory.vdi_resize(vdi.ref, vdi.virtual_size + BLOCK)
        family = [gate.inventory.records.vdis.get(vdi.ref) for vdi in family]
    one, other = family[0], family[-1]
    for base, vdi in ((one, other), (other, one)):
        if one == other:
            break
        for image_format in FORMATS:
            full = saved(memory, base, image_format, await export(gate, base, image_format))
            delta = saved(memory, vdi, image_format, await export(gate, vdi, image_format, base))
            if image_format == "qcow2":
                (memory / "raw").write_bytes(gate.content(vdi))
                qemu_compare(delta, "qcow2", memory / "raw", "raw")
            else:
                assert read_vhd(delta) == gate.content(vdi)
                if base.virtual_size >= vdi.virtual_size:
                    assert libvhdi_reads([delta, full]) == gate.content(vdi)
            full.unlink()
            delta.unlink()


async def in_all_ways(gate: Gate, vdi: VDI, base: VDI) -> list[tuple[str, str]]:
    """ETag and content of each export of `vdi` that there is."""
    answers = [
        await export(gate, vdi, image_format, chosen) for image_format in FORMATS for chosen in (None, base)
    ]
    return [(answer.headers["etag"], sha256(answer.body).hexdigest()) for answer in answers]


async def test_a_delta_may_go_back_in_time(gate: Gate, memory: Path) -> None:
    _, (older, newer) = await history(gate, 2)
    full = saved(memory, newer, "vhd", await export(gate, newer, "vhd"))
    back = saved(memory, older, "vhd", await export(gate, older, "vhd", newer))
    assert libvhdi_reads([back, full]) == gate.content(older)


@pytest.mark.parametrize("image_format", FORMATS)
async def test_head_tags_and_ranges(gate: Gate, image_format: str) -> None:
    vdi, (base,) = await history(gate, 1)
    for chosen in (None, base):
        whole = await export(gate, vdi, image_format, chosen)
        size, tag = len(whole.body), whole.headers["etag"]
        parameters = {"format": image_format} | ({} if chosen is None else {"base": chosen.ref})
        head = await gate.ask("HEAD", gate.target(vdi, "export_raw_vdi", **parameters))
        assert (head.status, head.headers["content-length"], head.headers["etag"]) == (200, str(size), tag)
        assert "task-id" not in head.headers
        for start, stop in [(0, 1), (100, 3000), (3000, size), (size - 600, size)]:
            part = await export(
                gate, vdi, image_format, chosen, range=f"bytes={start}-{stop - 1}", if_range=tag
            )
            assert (part.status, part.body) == (206, whole.body[start:stop])
            assert part.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"
        assert (await export(gate, vdi, image_format, chosen, if_none_match=tag)).status == 304
        assert (await export(gate, vdi, image_format, chosen, range=f"bytes={size}-")).status == 416
        other = await export(gate, vdi, image_format, chosen, range="bytes=0-0", if_range='"other"')
        assert (other.status, len(other.body)) == (200, size)


async def test_every_choice_has_a_tag_of_its_own(gate: Gate) -> None:
    vdi, (one, other) = await history(gate, 2)
    choices = [("raw", None), *((name, base) for name in FORMATS for base in (None, one, other))]
    tags = {
        (await export(gate, vdi, name, base, range="bytes=0-0")).headers["etag"] for name, base in choices
    }
    assert len(tags) == 7
    await write(gate.inventory, vdi.ref, b"new")
    after = {
        (await export(gate, vdi, name, base, range="bytes=0-0")).headers["etag"] for name, base in choices
    }
    assert not tags & after


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("with_base", [False, True])
async def test_a_download_that_is_cut_again_and_again_goes_on_while_its_chain_is_coalesced(
    coalescing: Gate, image_format: str, with_base: bool
) -> None:
    gate, choose = coalescing, random.Random(image_format)
    vdi, (base, *others) = await history(gate, 4)
    chosen = base if with_base else None
    whole = await export(gate, vdi, image_format, chosen)
    tag, depth = whole.headers["etag"], len(chain(gate, vdi))
    destroyed = others if with_base else [base, *others]
    received = b""
    cuts = sorted(choose.sample(range(len(whole.body)), 2 * len(destroyed)))
    for number, cut in enumerate(cuts):
        headers = {"range": f"bytes={len(received)}-", "if-range": tag}
        async with gate.client() as client:
            parameters = {"format": image_format} | ({} if chosen is None else {"base": chosen.ref})
            await client.head("GET", gate.target(vdi, "export_raw_vdi", **parameters), headers)
            status, answered = await client.answer_head()
            assert (status, answered["etag"]) == (206, tag)
            received += await client.answer_body(cut - len(received))
        if number % 2:
            await gate.inventory.vdi_destroy(destroyed[number // 2].ref, wait=5)
            await coalesce(gate)
    assert len(chain(gate, vdi)) < depth
    received += (
        await export(gate, vdi, image_format, chosen, range=f"bytes={len(received)}-", if_range=tag)
    ).body
    assert received == whole.body
    assert (await export(gate, vdi, image_format, chosen)).body == whole.body


async def test_a_hole_made_in_a_raw_image_is_another_export_of_the_same_bytes(gate: Gate) -> None:
    vdi = await gate.vdi(SIZE, "raw")
    assert (await gate.ask("PUT", gate.target(vdi), body=DATA + bytes(BLOCK) + DATA)).whole
    path = gate.inventory.repository_of(vdi.ref).image_path(vdi.uuid)
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, bytes(BLOCK), BLOCK)
    before = await export(gate, vdi, "vhd")
    FILES.punch(fd, BLOCK, BLOCK)
    os.close(fd)
    after = await export(gate, vdi, "vhd")
    assert len(after.body) == len(before.body) - BLOCK - 512
    assert after.headers["etag"] != before.headers["etag"]


async def refused(gate: Gate, vdi: VDI, *words: str, status: int, **parameters: str) -> None:
    """The refusal is told to the client and to its task, and nothing is held any more."""
    task = await gate.task()
    answer = await gate.ask("GET", gate.target(vdi, "export_raw_vdi", task_id=task.ref, **parameters))
    assert answer.status == status, answer.text
    assert all(word in answer.text for word in words), answer.text
    assert gate.tasks.get(task.ref).status is TaskStatus.FAILURE
    assert gate.tasks.get(task.ref).error_info[0] == answer.text.partition(":")[0]
    await until(lambda: not gate.inventory.leases.holders_for(vdi.ref))  # files are closed in a thread


async def test_bases_that_are_none(gate: Gate, memory: Path) -> None:
    vdi, (base,) = await history(gate, 1)
    hidden = gate.inventory.records.vdis.by_uuid(chain(gate, vdi)[1])
    foreign = gate.inventory.records.vdis.get(
        await gate.inventory.vdi_create(
            sr=await gate.inventory.sr_create("other", str(memory / "other")), virtual_size=SIZE
        )
    )
    code = "EXPORT_ERROR_BASE_UNRELATED"
    await refused(
        gate, vdi, code, "no file is part of both", status=409, format="vhd", base=(await gate.vdi()).uuid
    )
    await refused(gate, vdi, code, "in another SR", status=409, format="qcow2", base=foreign.uuid)
    await refused(gate, vdi, code, "the VDI itself", status=409, format="vhd", base=vdi.uuid)
    await refused(gate, vdi, code, "hidden parent", status=409, format="vhd", base=hidden.ref)
    await refused(gate, vdi, "UUID_INVALID", status=500, format="vhd", base=UNKNOWN)
    await refused(gate, vdi, "HANDLE_INVALID", status=500, format="vhd", base=NULL_REF)
    await refused(gate, vdi, "VALUE_NOT_SUPPORTED", "format=vhd or qcow2", status=404, base=base.uuid)
    await refused(gate, vdi, "VALUE_NOT_SUPPORTED", "chunked", status=404, format="vhd", chunked="true")
    await refused(gate, vdi, "EXPORT_ERROR_UNKNOWN_FORMAT", "'vmdk'", status=404, format="vmdk")


async def test_a_base_that_is_written_to_is_409(gate: Gate) -> None:
    vdi, (base,) = await history(gate, 1)
    lease = await gate.inventory.lease(vdi, LeaseMode.WRITE, Holder("test", "nbd", vdi.ref))
    await refused_while_held(gate, base, vdi)
    lease.release()
    await lease.released()
    assert (await export(gate, base, "vhd", vdi)).status == 200


async def refused_while_held(gate: Gate, vdi: VDI, base: VDI) -> None:
    answer = await export(gate, vdi, "vhd", base)
    assert (answer.status, answer.text.partition(":")[0]) == (409, "VDI_IN_USE")
    await until(lambda: not gate.inventory.leases.holders_for(vdi.ref))


async def test_what_is_too_large_for_a_vhd_goes_out_as_qcow2(gate: Gate) -> None:
    vdi = await gate.vdi((2040 << 30) + 512, "raw")
    await refused(gate, vdi, "VDI_TOO_LARGE", str(2040 << 30), status=409, format="vhd")
    answer = await export(gate, vdi, "qcow2")
    assert (answer.status, len(answer.body)) == (200, 4 * 65536)


async def test_who_waits_for_files_of_both_chains_is_let_in_before_a_delta(gate: Gate) -> None:
    """Whoever wants the common parent alone comes between the two leases of a delta."""
    vdi, (base,) = await history(gate, 1)
    object.__setattr__(gate.services.limits, "lease_wait", 5.0)
    inventory, asked = gate.inventory, 0
    lease_of = inventory.lease
    repository = inventory.repository_of(vdi.ref)
    got = trio.Event()

    async def want_parent() -> None:
        parent = repository.image_path(chain(gate, vdi)[1])
        async with inventory.leases.hold(
            parent, LeaseMode.WRITE, Holder("test", "coalesce", vdi.ref), wait=5
        ):
            got.set()

    async def lease_then_come_between(*arguments: object, **named: object) -> object:
        nonlocal asked
        asked += 1
        lease = await lease_of(*arguments, **named)  # type: ignore[arg-type]
        if asked == 1:
            nursery.start_soon(want_parent)
            await until(lambda: inventory.leases._table.waiting > 0)
        return lease

    async with trio.open_nursery() as nursery:
        object.__setattr__(inventory, "lease", lease_then_come_between)
        with trio.fail_after(4):
            answer = await export(gate, vdi, "vhd", base)
        assert answer.status == 200
        assert got.is_set()
        assert asked > 2
