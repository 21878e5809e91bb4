"""PUT /import_raw_vdi with images: what they become, and what is left of a failure."""

import os
import random
import struct
from pathlib import Path

import pytest
import trio

from gateway.core.tasks import TaskStatus
from gateway.http.import_raw_vdi import LAST_LINE_BYTES
from gateway.images.chain import open_chain_files, open_disk
from gateway.images.vhd.format import DiskType
from tests.http.gate import MIB, Gate, until
from tests.transfers.vhd_files import Block, content, random_blocks, vhd_file

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
    blocks[1] = Block((1 << 4096) - 1, bytes(2 * MIB))  # zeroes hide the parent's data
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


async def image_of(data: bytes, form: str, options: str, directory: Path) -> bytes:
    raw, image = directory / "x.raw", directory / f"x.{form}"
    raw.write_bytes(data)
    if form == "raw":
        return data
    flags = ["-c"] if "compressed" in options else []
    chosen = [part for part in options.split(",") if part != "compressed"]
    command = ["qemu-img", "convert", "-f", "raw", "-O", form, *flags]
    await trio.run_process([*command, *(["-o", ",".join(chosen)] if any(chosen) else []), raw, image])
    return image.read_bytes()


def odd_disk(seed: int) -> bytes:
    chance = random.Random(seed)
    data = bytearray(7 * MIB + 512)
    for _ in range(8):
        at = chance.randrange(len(data))
        piece = chance.randbytes(min(chance.choice([512, 70_000, MIB]), len(data) - at))
        data[at : at + len(piece)] = piece
    return bytes(data)


FORMATS = [
    ("qcow2", ""),
    ("qcow2", "compat=0.10"),
    ("qcow2", "compressed"),
    ("qcow2", "compressed,compression_type=zstd"),
    ("qcow2", "cluster_size=512"),
    ("qcow2", "cluster_size=2M"),
    ("qcow2", "extended_l2=on"),
    ("vhdx", ""),
    ("vhdx", "subformat=fixed,block_size=1M"),
    ("vmdk", "subformat=monolithicSparse"),
    ("vmdk", "subformat=streamOptimized"),
    ("vpc", "force_size=on,subformat=fixed"),
    ("raw", ""),
    ("vpc", "force_size=on"),
    ("vpc", "subformat=fixed,force_size=on"),
]


@pytest.mark.parametrize(
    ("form", "options", "place"),
    [(*one, ("vdi", "sr")[number % 2]) for number, one in enumerate(FORMATS)],
)
async def test_whatever_qemu_writes_is_read(
    gate: Gate, form: str, options: str, place: str, tmp_path: Path
) -> None:
    data = odd_disk(FORMATS.index((form, options)))
    image = await image_of(data, form, options, tmp_path)
    name = "auto" if place == "sr" else {"vpc": "vhd"}.get(form, form)
    if place == "sr":
        task = await gate.task()
        target = gate.target(None, format=name, sr_uuid=gate.sr, task_id=task.ref)
        answer = await gate.ask("PUT", target, body=image)
        assert answer.whole, answer.text
        result = gate.tasks.get(task.ref).result
        vdi = gate.inventory.records.vdis.get(result.removeprefix("<value>").removesuffix("</value>"))
        assert vdi.uuid in answer.text
        assert (vdi.name_label, vdi.virtual_size, vdi.sr) == ("Imported VDI", 8 * MIB, gate.sr)
    else:
        vdi = await gate.vdi(8 * MIB)
        assert await put(gate, vdi, os.urandom(8 * MIB)) == []
        assert await put(gate, vdi, image, format=name) == []
    expected = data.ljust(8 * MIB, b"\0")
    if form == "raw" and place == "vdi":  # as the proposal has it
        assert gate.content(vdi)[: len(data)] == data
    else:
        assert gate.content(vdi) == expected
    assert gate.staged() == []


def chunks(data: bytes, chance: random.Random) -> bytes:
    body = b""
    while data:
        length = chance.choice([1, 15, 300, 100_000, 3 * MIB])
        piece, data = data[:length], data[length:]
        body += b"%x%s\r\n%s\r\n" % (len(piece), chance.choice([b"", b";name=value"]), piece)
    return body


@pytest.mark.parametrize("form", ["vhd", "fixed", "qcow2", "raw", "chunked"])
async def test_a_transfer_encoding_tells_the_end(gate: Gate, form: str, tmp_path: Path) -> None:
    chance, data = random.Random(form), odd_disk(5)
    vdi = await gate.vdi(8 * MIB)
    if form == "chunked":
        body, name = struct.pack("<QI", 0, len(data)) + data + END, form
    elif form in ("vhd", "fixed"):
        options = "force_size=on" + (",subformat=fixed" if form == "fixed" else "")
        body, name = await image_of(data, "vpc", options, tmp_path), "vhd"
    else:
        body, name = await image_of(data, form, "", tmp_path), "auto"
    for ending, trailer in ((b"0\r\n\r\n", True), (b"0\r\nx: y\r\n\r\n", True), (b"", False)):
        async with gate.client() as client:
            await client.head("PUT", gate.target(vdi, format=name), {"transfer-encoding": "chunked"})
            status, headers = await client.answer_head()
            assert status == 200
            cut = body if trailer else body[: len(body) - 700]
            await client.send(chunks(cut, chance) + ending)
            if not trailer:
                await client.half_close()
            assert (len(await client.answer_body(LAST_LINE_BYTES)) == LAST_LINE_BYTES) == trailer
        ended = await gate.ended(headers["task-id"])
        if not trailer:
            assert ended.error_info[0] in ("IMPORT_ERROR_PREMATURE_EOF", "IMPORT_ERROR_WRONG_FORMAT")
        assert gate.content(vdi) == data.ljust(8 * MIB, b"\0")


@pytest.mark.parametrize("form", ["auto", "vhd", "qcow2", "chunked"])
async def test_a_pipe_that_brings_nothing_is_no_disk_of_zeroes(gate: Gate, form: str) -> None:
    vdi, data = await gate.vdi(), os.urandom(4 * MIB)
    assert (await gate.ask("PUT", gate.target(vdi), {}, data)).whole
    async with gate.client() as client:
        await client.head("PUT", gate.target(vdi, format=form), {"transfer-encoding": "chunked"})
        _, headers = await client.answer_head()
        await client.send(b"0\r\n\r\n")
        assert len(await client.rest()) < LAST_LINE_BYTES
    assert (await gate.ended(headers["task-id"])).error_info[0] == "IMPORT_ERROR_PREMATURE_EOF"
    assert gate.content(vdi) == data


async def test_a_new_vdi_has_a_name_and_a_size_that_are_asked_for(gate: Gate) -> None:
    task, data = await gate.task(), os.urandom(MIB)
    target = gate.target(
        None, sr_id=gate.sr, task_id=task.ref, name_label="gold image", virtual_size="20971520"
    )
    assert (await gate.ask("PUT", target, body=data)).whole
    (vdi,) = gate.inventory.records.vdis.all()
    assert (vdi.name_label, vdi.virtual_size) == ("gold image", 20 * MIB)
    assert gate.tasks.get(task.ref).result == f"<value>{vdi.ref}</value>"
    assert gate.content(vdi) == data.ljust(20 * MIB, b"\0")


@pytest.mark.parametrize(
    ("body", "parameters", "error"),
    [
        (SAMPLE[:-700], {"format": "vhd"}, "IMPORT_ERROR_PREMATURE_EOF"),
        (SAMPLE, {"format": "vhd", "virtual_size": "4194304"}, "VDI_TOO_SMALL"),
        (bytes(1000), {"virtual_size": "512"}, "VDI_TOO_SMALL"),
        (bytes(1000), {"format": "chunked"}, "IMPORT_ERROR_SIZE_REQUIRED"),
        (
            vhd_file(4 * MIB, {}, kind=DiskType.DIFFERENCING),
            {"format": "vhd"},
            "IMPORT_ERROR_UNSUPPORTED_IMAGE",
        ),
        (b"QFI\xfb" + bytes(5000), {"format": "qcow2"}, "IMPORT_ERROR_UNSUPPORTED_IMAGE"),
        (b"QFI\xfb" + bytes(5000), {"format": "vhdx"}, "IMPORT_ERROR_WRONG_FORMAT"),
        (b"\x1f\x8b\x08" + bytes(5000), {"format": "auto"}, "IMPORT_ERROR_UNSUPPORTED_IMAGE"),
        (bytes(2 * MIB + 512), {"format": "auto"}, "IMPORT_ERROR_WRONG_FORMAT"),
    ],
)
async def test_nothing_is_left_of_a_new_vdi_that_failed(
    gate: Gate, body: bytes, parameters: dict[str, str], error: str
) -> None:
    task = await gate.task()
    answer = await gate.ask(
        "PUT", gate.target(None, sr_uuid=gate.sr, task_id=task.ref, **parameters), body=body
    )
    assert (answer.status, answer.whole) == (200, False)
    assert gate.tasks.get(task.ref).error_info[0] == error
    assert len(gate.inventory.records.vdis) == 0
    assert gate.staged() == []
    assert [path.name for path in gate.directory.iterdir()] == [".vdi-gateway"]


async def test_a_cancelled_import_of_a_qcow2_leaves_nothing(gate: Gate, tmp_path: Path) -> None:
    image = await image_of(odd_disk(1), "qcow2", "", tmp_path)
    vdi = await gate.vdi(8 * MIB)
    async with gate.client() as client:
        await client.head("PUT", gate.target(vdi, format="qcow2"), {"content-length": str(len(image) + 1)})
        _, headers = await client.answer_head()
        await client.send(image)
        await until(lambda: bool(gate.staged()))
        await gate.tasks.cancel(headers["task-id"])
        assert len(await client.rest()) < LAST_LINE_BYTES
    assert gate.tasks.get(headers["task-id"]).status is TaskStatus.CANCELLED
    assert gate.staged() == []
    assert gate.content(vdi) == bytes(8 * MIB)


async def test_without_qemu_img_it_says_what_is_missing(
    gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = await image_of(odd_disk(1), "qcow2", "", tmp_path)
    vdi = await gate.vdi(8 * MIB)
    monkeypatch.setenv("PATH", str(tmp_path))
    told = await put(gate, vdi, image, format="qcow2")
    assert told == ["IMPORT_ERROR_CONVERTER_MISSING", "qcow2", "qemu-img"]


async def test_an_image_longer_than_may_be_kept_is_refused(gate: Gate, tmp_path: Path) -> None:
    image = await image_of(odd_disk(1), "qcow2", "", tmp_path)
    vdi = await gate.vdi(8 * MIB)
    gate.services.limits.spool_bytes = MIB
    assert (await put(gate, vdi, image, format="qcow2"))[0] == "IMPORT_ERROR_IMAGE_TOO_LONG"
    async with gate.client() as client:
        await client.head("PUT", gate.target(vdi, format="auto"), {"transfer-encoding": "chunked"})
        _, headers = await client.answer_head()
        await client.send(chunks(image, random.Random(1)) + b"0\r\n\r\n")
        await client.rest()
    assert gate.tasks.get(headers["task-id"]).error_info[0] == "IMPORT_ERROR_IMAGE_TOO_LONG"
    assert gate.staged() == []


@pytest.mark.parametrize("form", ["vhd", "qcow2"])
async def test_two_tebibytes_with_little_in_them(gate: Gate, form: str, tmp_path: Path) -> None:
    size = 2040 << 30
    last = size // (2 * MIB) - 1
    if form == "vhd":
        blocks = {number: Block((1 << 4096) - 1, b"\x07" * 2 * MIB) for number in (5, last)}
        image = vhd_file(size, blocks, order=[last, 5])
    else:
        path = tmp_path / "x.qcow2"
        await trio.run_process(["qemu-img", "create", "-q", "-f", "qcow2", path, str(size)])
        for number in (5, last):
            write = f"write -q -P 7 {number * 2 * MIB} 2M"
            await trio.run_process(["qemu-io", "-f", "qcow2", "-c", write, path])
        image = path.read_bytes()
    task = await gate.task()
    target = gate.target(None, format="auto", sr_uuid=gate.sr, task_id=task.ref)
    assert (await gate.ask("PUT", target, body=image)).whole
    (vdi,) = gate.inventory.records.vdis.all()
    assert vdi.virtual_size == size
    file = gate.inventory.repository_of(vdi.ref).image_path(vdi.uuid)
    assert os.stat(file).st_blocks * 512 < 16 * MIB
    disk = open_disk(open_chain_files(file, writable=False))
    found = bytearray(2 * MIB)
    for number in (0, 4, 5, 6, last - 1, last):
        disk.pread_into(found, number * 2 * MIB)
        assert found == (b"\x07" if number in (5, last) else b"\0") * 2 * MIB
    disk.close()
