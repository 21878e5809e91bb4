"""Random operations on several VDIs against plain bytes, while an SR is coalesced all the time."""

import tempfile
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.errors import XenAPIError
from gateway.core.limits import Limits
from gateway.repository.inventory import Inventory
from tests.repository.coalesce_house import house_in
from tests.repository.vdis import content, hidden, replace, write
from tests.transfers.copying import copy

SIZE = 4 << 20
# Whole bytes of the sector bitmap: libvhdi takes clear bits behind a set one for set.
PIECE = 4096
PLACES = (0, PIECE, 3 * PIECE, (2 << 20) - PIECE, 2 << 20, SIZE - PIECE)

steps = st.lists(
    st.tuples(
        st.sampled_from(
            ("write", "write", "snapshot", "clone", "copy", "over", "revert", "import", "destroy", "scan")
        ),
        st.integers(0, 100),
        st.sampled_from(PLACES),
        st.integers(1, 255),
    ),
    min_size=5,
    max_size=18,
)


async def play(directory: Path, story: list[tuple[str, int, int, int]], asked: list[bool]) -> None:
    async with house_in(directory)(limits=Limits(lease_wait=20)) as house:
        inventory = house.inventory
        sr = await inventory.sr_create("sr", str(directory / "sr"))
        plain = {await inventory.vdi_create(sr=sr, virtual_size=SIZE): bytes(SIZE)}
        for (step, number, place, value), wait in zip(story, asked, strict=False):
            ref = list(plain)[number % len(plain)]
            await do(inventory, plain, step, ref, place=place, data=bytes([value]) * PIECE)
            if wait:
                await house.settled(sr)
            else:
                house.coalescer(sr).trigger()
        await house.settled(sr)
        records = inventory.records.vdis_of_sr(sr)
        assert {vdi.ref for vdi in records if vdi.managed} == set(plain)
        for base in hidden(inventory, sr):
            standing = [vdi for vdi in records if vdi.sm_config.get("vhd-parent") == base.uuid]
            assert len(standing) > 1, "it would have been merged"
        for ref, expected in plain.items():
            assert content(inventory, ref) == expected
        await house.assert_records_are_true(sr)


async def do(
    inventory: Inventory, plain: dict[str, bytes], step: str, ref: str, *, place: int, data: bytes
) -> None:
    record = inventory.records.vdis.get(ref)
    if step in ("write", "import"):
        if record.is_a_snapshot:
            with pytest.raises(XenAPIError, match="VDI_READONLY"):
                await write(inventory, ref, data, place)
        elif step == "write":
            await write(inventory, ref, data[: SIZE - place], place)
            plain[ref] = plain[ref][:place] + data[: SIZE - place] + plain[ref][place + len(data) :]
        else:
            await replace(inventory, ref, data)
            plain[ref] = data + bytes(SIZE - len(data))
    elif step == "snapshot":
        plain[await inventory.vdi_snapshot(ref)] = plain[ref]
    elif step == "clone":
        plain[await inventory.vdi_clone(ref)] = plain[ref]
    elif step == "copy":
        plain[(await copy(inventory, ref, record.sr)).ref] = plain[ref]
    elif step == "over":
        target = list(plain)[data[0] % len(plain)]
        if target == ref or inventory.records.vdis.get(target).is_a_snapshot:
            with pytest.raises(XenAPIError, match=r"VALUE_NOT_SUPPORTED|VDI_READONLY"):
                await copy(inventory, ref, into=target)
        else:
            await copy(inventory, ref, into=target)
            plain[target] = plain[ref]
    elif step == "revert" and record.is_a_snapshot and record.snapshot_of in plain:
        await inventory.vdi_revert(ref)
        plain[record.snapshot_of] = plain[ref]
    elif step == "revert":
        with pytest.raises(XenAPIError, match="OPERATION_NOT_ALLOWED"):
            await inventory.vdi_revert(ref)
    elif step == "destroy" and len(plain) > 1:
        await inventory.vdi_destroy(ref)
        del plain[ref]
    elif step == "scan":
        await inventory.sr_scan(record.sr)


@settings(max_examples=8, derandomize=True)
@given(steps, st.lists(st.booleans(), min_size=18, max_size=18))
def test_any_order_of_operations_under_coalescing_gives_every_vdi_its_bytes(
    story: list[tuple[str, int, int, int]], asked: list[bool]
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        trio.run(play, Path(directory), story, asked)
