"""Random lives of a disk whose changes are tracked: what is said to have changed is never too little."""

import random
from pathlib import Path

import pytest

from gateway.core.errors import XenAPIError
from gateway.core.limits import Limits
from gateway.repository.inventory import Inventory
from tests.repository.coalesce_house import OpenHouse
from tests.repository.tracked import MIB, content, differing, told, tracked, write
from tests.repository.vdis import replace


async def story(open_house: OpenHouse, tmp_path: Path, seed: int, generations: int) -> int:
    """Random snapshots, writes, losses and merges; at each point all pairs are right. How many were asked."""
    rng = random.Random(seed)
    asked = 0
    known: dict[str, bytes] = {}
    order: list[str] = []
    ref = ""
    done = 0
    while done < generations:
        async with open_house(limits=Limits(lease_wait=20)) as house:
            inventory = house.inventory
            if not ref:
                sr, ref = await tracked(inventory, tmp_path / "sr", 4 * MIB)
            for _ in range(rng.randrange(3, 7)):
                await step(inventory, ref, rng, known, order)
                if rng.random() < 0.5:
                    await house.settled(sr)
                done += 1
            now = content(inventory, ref)
            for number, older in enumerate(order):
                for newer in (*order[number + 1 :], ref):
                    data = now if newer == ref else known[newer]
                    if len(data) < len(known[older]):
                        continue
                    try:
                        found = await told(inventory, older, newer)
                    except XenAPIError as error:
                        assert error.code == "SR_BACKEND_FAILURE_459"  # smaller in between
                        continue
                    asked += 1
                    assert differing(known[older], data) <= found, (seed, number)
            await house.settled(sr)
            await house.assert_records_are_true(sr)
    return asked


async def step(
    inventory: Inventory, ref: str, rng: random.Random, known: dict[str, bytes], order: list[str]
) -> None:
    vdis = inventory.records.vdis
    whole = [each for each in order if vdis.get(each).type == "user"]
    what = rng.choice(
        ("write", "write", "snapshot", "snapshot", "lose", "destroy", "revert", "import", "grow")
    )
    size = vdis.get(ref).virtual_size
    if what == "write":
        for _ in range(rng.randrange(1, 4)):
            offset = 512 * rng.randrange(size // 512 - 64)
            await write(inventory, ref, (offset, rng.randbytes(512 * rng.randrange(1, 64))))
    elif what == "snapshot":
        new = await inventory.vdi_snapshot(ref)
        known[new] = content(inventory, new)
        order.append(new)
    elif what == "lose" and order:
        await inventory.vdi_data_destroy(rng.choice(order))
    elif what == "destroy" and order:
        gone = rng.choice(order)
        order.remove(gone)
        await inventory.vdi_destroy(gone)
    elif what == "revert" and whole and rng.random() < 0.5:
        await inventory.vdi_revert(rng.choice(whole))
    elif what == "import" and rng.random() < 0.3:
        await replace(inventory, ref, rng.randbytes(512 * rng.randrange(1, 64)))
    elif what == "grow" and rng.random() < 0.2:
        await inventory.vdi_resize(ref, size + 2 * MIB)


@pytest.mark.parametrize("seed", range(3))
async def test_no_changed_block_is_missing_over_twenty_generations(
    open_house: OpenHouse, tmp_path: Path, seed: int
) -> None:
    assert await story(open_house, tmp_path, seed, 20) > 10


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(100, 160))
async def test_no_changed_block_is_missing_over_many_generations(
    open_house: OpenHouse, tmp_path: Path, seed: int
) -> None:
    assert await story(open_house, tmp_path, seed, 60) > 10
