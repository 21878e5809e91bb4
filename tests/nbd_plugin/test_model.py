"""Random requests through libnbd against plain bytes, on chains of several levels; then foreign readers."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gateway.images.vhd.check import check_vhd
from tests.images.disks import libvhdi_reads
from tests.nbd_plugin.conftest import Nbd
from tests.system.site import MIB, Vdi

SIZE = 5 * MIB + 4096  # two whole blocks and one that the disk ends in
# libvhdi reads blocks of a child that are written in finer parts wrongly, so it judges every other chain.
GRAIN = 4096
ZERO = 2


@dataclass(frozen=True)
class Request:
    kind: str
    offset: int
    length: int
    seed: int
    flags: frozenset[str]


@st.composite
def requests(draw: st.DrawFn, grain: int) -> Request:
    """Sectors, odd bytes, whole blocks and their edges, rounded to `grain` bytes."""
    odd = st.integers(0, SIZE - 1)
    sector = st.integers(0, SIZE // 512 - 1).map(lambda number: number * 512)
    edge = st.sampled_from([0, 2 * MIB, 4 * MIB, 2 * MIB - 512, 4 * MIB - 4096])
    offset = draw(st.one_of(odd, sector, edge)) // grain * grain
    few = st.integers(1, 5000)
    sectors = st.integers(1, 200).map(lambda number: number * 512)
    many = st.sampled_from([512, 4096, 2 * MIB, 3 * MIB, SIZE])
    length = -(-draw(st.one_of(few, sectors, many)) // grain) * grain
    return Request(
        draw(st.sampled_from(["write", "write", "write", "zero", "trim", "read", "status", "flush"])),
        offset,
        min(length, SIZE - offset),
        draw(st.integers(0, 255)),
        draw(st.frozensets(st.sampled_from(["fua", "no-hole"]))),
    )


def play(handle: Any, libnbd: Any, request: Request, model: bytearray) -> None:
    offset, length = request.offset, request.length
    stop = offset + length
    flags = libnbd.CMD_FLAG_FUA if "fua" in request.flags else 0
    match request.kind:
        case "write":
            data = random.Random(request.seed).randbytes(min(length, 4096)) * (length // 4096 + 1)
            handle.pwrite(data[:length], offset, flags)
            model[offset:stop] = data[:length]
        case "zero":
            keep = libnbd.CMD_FLAG_NO_HOLE if "no-hole" in request.flags else 0
            handle.zero(length, offset, flags | keep)
            model[offset:stop] = bytes(length)
        case "trim":
            handle.trim(length, offset, flags)
            model[offset:stop] = bytes(length)
        case "read":
            assert handle.pread(length, offset) == model[offset:stop]
        case "status":
            check_status(handle, offset, length, model)
        case "flush":
            handle.flush()


def check_status(handle: Any, offset: int, length: int, model: bytearray) -> None:
    told: list[int] = []
    handle.block_status(length, offset, lambda _name, _offset, entries, _error: told.extend(entries))
    position = offset
    for size, kind in zip(told[::2], told[1::2], strict=True):
        assert size > 0
        if kind & ZERO:
            assert not any(model[position : position + size])
        position += size
    assert offset < position <= offset + length


def chain_of(nbd: Nbd, vdi: Vdi) -> list[Path]:
    """The files of a VDI, leaf first, as the gateway's own records have them."""
    files = [vdi.file]
    parent = nbd.site.gateway.call("VDI.get_sm_config", vdi.ref).get("vhd-parent")
    while parent:
        files.append(vdi.file.with_name(f"{parent}.vhd"))
        reference = nbd.site.gateway.call("VDI.get_by_uuid", parent)
        parent = nbd.site.gateway.call("VDI.get_sm_config", reference).get("vhd-parent")
    return files


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@settings(
    max_examples=4,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # each example takes a VDI: no shrinking
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_a_chain_behaves_as_plain_bytes_do(nbd: Nbd, libnbd: Any, depth: int, data: st.DataObject) -> None:
    play_chain(nbd, libnbd, depth, data)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@settings(
    max_examples=150,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_many_chains_behave_as_plain_bytes_do(nbd: Nbd, libnbd: Any, depth: int, data: st.DataObject) -> None:
    play_chain(nbd, libnbd, depth, data)


def play_chain(nbd: Nbd, libnbd: Any, depth: int, data: st.DataObject) -> None:
    call = nbd.site.gateway.call
    vdi = nbd.site.create_vdi(SIZE)
    model = bytearray(vdi.size)
    grain = data.draw(st.sampled_from([1, GRAIN]), label="grain")
    for level in range(depth):
        handle = nbd.connect(libnbd, vdi, write=True)
        for request in data.draw(st.lists(requests(grain), min_size=6, max_size=12), label=f"level {level}"):
            play(handle, libnbd, request, model)
        assert handle.pread(vdi.size, 0) == model
        handle.shutdown()
        if level + 1 < depth:
            call("VDI.snapshot", vdi.ref)
    reader = nbd.connect(libnbd, vdi)
    assert reader.pread(vdi.size, 0) == model
    check_status(reader, 0, vdi.size, model)
    reader.shutdown()
    files = chain_of(nbd, vdi)
    for file in files:
        assert check_vhd(str(file)).errors == ()
    if grain == GRAIN or depth == 1:
        assert libvhdi_reads(files) == model
    call("VDI.destroy", vdi.ref)
