"""Random operations on several VDIs against plain bytes, while an SR is coalesced all the time."""

import tempfile
from pathlib import Path

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.limits import Limits
from tests.repository.coalesce_house import house_in
from tests.repository.test_snapshots import content, hidden
from tests.repository.test_snapshots_model import SIZE, do, steps


async def play(directory: Path, story: list[tuple[str, int, int, int]], asked: list[bool]) -> None:
    async with house_in(directory)(limits=Limits(lease_wait=20)) as house:
        inventory = house.inventory
        sr = await inventory.sr_create("sr", str(directory / "sr"))
        plain = {await inventory.vdi_create(sr=sr, virtual_size=SIZE): bytes(SIZE)}
        for (step, number, place, value), wait in zip(story, asked, strict=False):
            ref = list(plain)[number % len(plain)]
            await do(inventory, plain, step, ref, place=place, data=bytes([value]) * 4096)
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


@settings(max_examples=8, deadline=None, derandomize=True)
@given(steps, st.lists(st.booleans(), min_size=18, max_size=18))
def test_any_order_of_operations_under_coalescing_gives_every_vdi_its_bytes(
    story: list[tuple[str, int, int, int]], asked: list[bool]
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        trio.run(play, Path(directory), story, asked)
