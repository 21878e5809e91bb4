"""PUT /import_raw_vdi with images: what they become, and what is left of a failure."""

import os
import random
import struct
from pathlib import Path

import pytest
import trio

from gateway.core.tasks import TaskStatus
from gateway.http.import_raw_vdi import LAST_LINE_BYTES
from gateway.images.vhd.format import DiskType
from tests.http.gate import MIB, Gate
from tests.transfers.vhd_files import content, random_blocks, vhd_file

END = bytes(12)


async def put(gate: Gate, vdi: object, body: bytes, **parameters: str) -> list[str]:
    """Import; nothing for a success, else the task's error."""
    task = await gate.task()
    answer = await gate.ask("PUT", gate.target(vdi, task_id=task.ref, **parameters), body=body)  # type: ignore[arg-type]
    assert answer.status == 200, answer.text
    ended = gate.tasks.get(task.ref)
    assert answer.whole == (ended.status is TaskStatus.SUCCESS)
    assert gate.staged() == []
    return list(ended.error_info)


@pytest.mark.parametrize("image_format", ["vhd", "raw"])
@pytest.mark.parametrize("seed", range(3))
async def test_a_dynamic_vhd_is_all_of_the_disk_and_a_delta_changes_it(
    gate: Gate, image_format: str, seed: int
) -> None:
    chance = random.Random(seed)
    vdi = await gate.vdi(12 * MIB, image_format)
    assert await put(gate, vdi, chance.randbytes(12 * MIB)) == []
    size = 9 * MIB + 512
    full, delta = random_blocks(chance, size), random_blocks(chance, size)
    order = sorted(full, reverse=True)
    assert await put(gate, vdi, vhd_file(size, full, order=order), format="vhd") == []
    old = content(bytes(12 * MIB), full)[:size] + bytes(12 * MIB - size)
    assert gate.content(vdi) == old
    assert await put(gate, vdi, vhd_file(size, delta, kind=DiskType.DIFFERENCING), format="VHD") == []
    assert gate.content(vdi) == content(old[:size], delta) + old[size:]


async def test_a_delta_onto_a_disk_that_stands_on_a_snapshot(gate: Gate) -> None:
    chance = random.Random(1)
    vdi, old = await gate.vdi(8 * MIB), chance.randbytes(8 * MIB)
    assert await put(gate, vdi, old) == []
    snapshot = await gate.inventory.vdi_snapshot(vdi.ref)
    blocks = random_blocks(chance, 8 * MIB)
    blocks[1] = type(blocks[min(blocks)])((1 << 4096) - 1, bytes(2 * MIB))  # zeroes hide the parent's data
    assert await put(gate, vdi, vhd_file(8 * MIB, blocks, kind=DiskType.DIFFERENCING), format="vhd") == []
    assert gate.content(vdi) == content(old, blocks)
    assert gate.content(gate.inventory.records.vdis.get(snapshot)) == old


@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
async def test_a_vhd_of_qemu(gate: Gate, subformat: str, tmp_path: Path) -> None:
    vdi, raw, vhd = await gate.vdi(8 * MIB), tmp_path / "x.raw", tmp_path / "x.vhd"
    raw.write_bytes(os.urandom(3 * MIB) + bytes(2 * MIB) + os.urandom(MIB + 512))
    command = ["qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", f"subformat={subformat},force_size=on"]
    await trio.run_process([*command, raw, vhd])
    assert await put(gate, vdi, vhd.read_bytes(), format="vhd") == []
    assert gate.content(vdi) == raw.read_bytes().ljust(8 * MIB, b"\0")


@pytest.mark.parametrize("headers", [{}, {"content-length": str(1 << 50)}])
async def test_a_vhd_without_length_ends_with_its_footer(gate: Gate, headers: dict[str, str]) -> None:
    chance = random.Random(3)
    vdi, blocks = await gate.vdi(8 * MIB), random_blocks(chance, 8 * MIB)
    async with gate.client() as client:
        await client.head("PUT", gate.target(vdi, format="vhd"), headers)
        status, _ = await client.answer_head()
        assert status == 200
        await client.send(vhd_file(8 * MIB, blocks, gap=1024))
        assert len(await client.answer_body(LAST_LINE_BYTES)) == LAST_LINE_BYTES
    assert gate.content(vdi) == content(bytes(8 * MIB), blocks)


@pytest.mark.parametrize("switch", ["format=chunked", "chunked", "chunked=true", "format=raw&chunked=1"])
async def test_pieces_of_a_disk(gate: Gate, switch: str) -> None:
    vdi, old = await gate.vdi(4 * MIB), os.urandom(4 * MIB)
    assert await put(gate, vdi, old) == []
    body = struct.pack("<QI", MIB + 7, 5) + b"hello" + struct.pack("<QI", 0, MIB) + bytes(MIB) + END
    async with gate.client() as client:
        await client.head("PUT", f"{gate.target(vdi)}&{switch}")
        assert (await client.answer_head())[0] == 200
        await client.send(body)
        assert len(await client.answer_body(LAST_LINE_BYTES)) == LAST_LINE_BYTES
    assert gate.content(vdi) == bytes(MIB) + old[MIB : MIB + 7] + b"hello" + old[MIB + 12 :]


async def test_a_cookie_switches_pieces_on_as_it_does_for_xapi(gate: Gate) -> None:
    vdi = await gate.vdi(4 * MIB)
    body = struct.pack("<QI", 512, 3) + b"abc" + END
    answer = await gate.ask("PUT", gate.target(vdi), {"cookie": "chunked=true"}, body)
    assert answer.whole
    assert gate.content(vdi)[:520] == bytes(512) + b"abc" + bytes(5)


SAMPLE = vhd_file(8 * MIB, random_blocks(random.Random(5), 8 * MIB))


@pytest.mark.parametrize(
    ("form", "body", "error"),
    [
        ("vhd", SAMPLE[:-700], ["IMPORT_ERROR_PREMATURE_EOF", str(len(SAMPLE)), str(len(SAMPLE) - 700)]),
        ("vhd", vhd_file(10 * MIB, {}), ["VDI_TOO_SMALL", "VDI", str(8 * MIB)]),
        ("vhd", bytes(8 * MIB), ["IMPORT_ERROR_WRONG_FORMAT", "vhd"]),
        ("vhd", SAMPLE[:-512] + bytes(512), ["IMPORT_ERROR_CORRUPT_IMAGE", "vhd"]),
        ("chunked", b"\1" * 30, ["VDI_TOO_SMALL", "VDI", str(8 * MIB)]),
        ("chunked", struct.pack("<QI", 1, 1) + b"a", ["IMPORT_ERROR_PREMATURE_EOF", "25", "13"]),
    ],
)
async def test_a_failure_has_its_code_and_changes_nothing(
    gate: Gate, form: str, body: bytes, error: list[str]
) -> None:
    vdi, old = await gate.vdi(8 * MIB), os.urandom(8 * MIB)
    assert await put(gate, vdi, old) == []
    before = gate.inventory.records.vdis.get(vdi.ref)
    told = await put(gate, vdi, body, format=form)
    assert told[: len(error)] == [vdi.ref if part == "VDI" else part for part in error]
    assert gate.content(vdi) == old
    assert gate.inventory.records.vdis.get(vdi.ref) == before
