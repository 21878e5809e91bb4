"""Whatever a crash leaves, no changed block is missing in what is told after it."""

import os
import random
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from gateway.core.errors import XenAPIError
from gateway.core.limits import Limits
from gateway.core.records import PBD, SR, VDI
from gateway.images.vhd.image import open_vhd
from tests.crash import CrashState, RecordingFileCalls
from tests.repository.coalesce_house import House, open_house_in
from tests.repository.test_crash import states
from tests.repository.tracked import MIB, content, differing, told, tracked, write

STEPS = (
    "snapshot",
    "write",
    "snapshot",
    "lose first",
    "write",
    "merge",
    "snapshot",
    "write",
    "destroy",
    "merge",
    "snapshot",
    "lose last",
    "write",
    "snapshot",
    "destroy",
    "write",
    "merge",
    "revert",
    "write",
    "snapshot",
    "merge",
)


@dataclass(frozen=True)
class Moment:
    """What the database has, what the snapshots were, and which of them are being made or destroyed."""

    vdis: Sequence[VDI]
    known: dict[str, bytes]
    order: tuple[str, ...]
    doing: str = ""
    target: str = ""


async def work(
    house: House, sr: str, ref: str, files: RecordingFileCalls, rng: random.Random
) -> list[Moment]:
    inventory = house.inventory
    known: dict[str, bytes] = {}
    order: list[str] = []
    moments: list[Moment] = []

    def mark(doing: str = "", target: str = "") -> None:
        vdis = tuple(inventory.records.vdis_of_sr(sr))
        moments.append(Moment(vdis, dict(known), tuple(order), doing, target))
        files.mark(len(moments) - 1)

    mark()
    for step in STEPS:
        whole = [each for each in order if inventory.records.vdis.get(each).type == "user"]
        if step == "write":
            offset = 512 * rng.randrange(4 * MIB // 512 - 200)
            await write(inventory, ref, (offset, rng.randbytes(512 * rng.randrange(1, 200))))
        elif step == "snapshot":
            new = await inventory.vdi_snapshot(ref)
            known[new] = content(inventory, new)
            order.append(new)
        elif step == "merge":
            await house.settled(sr)
        elif step == "revert" and whole:
            await inventory.vdi_revert(whole[0])
        elif step.startswith("lose"):
            target = order[0 if step == "lose first" else -1]
            mark(step, target)
            await inventory.vdi_data_destroy(target)
        elif step == "destroy":
            target = rng.choice(order[1:])
            mark(step, target)
            await inventory.vdi_destroy(target)
            order.remove(target)
        mark()
    return moments


async def assert_nothing_is_missing(
    state: CrashState, directory: Path, moment: Moment, vdis: Sequence[VDI], *, ref: str, site: tuple[SR, PBD]
) -> int:
    asked = 0
    with suppress(FileNotFoundError):
        os.unlink(state.directory / ".vdi-gateway" / "owner")
    state.write_back()
    os.mkdir(directory)
    async with open_house_in(directory, limits=Limits(lease_wait=20)) as house:
        inventory = house.inventory
        sr, pbd = site
        host = inventory.records.this_host.ref
        await inventory.records.srs.add(sr)
        pbd = replace(pbd, host=host, device_config={"location": str(state.directory), "writable": "true"})
        await inventory.records.pbds.add(replace(pbd, currently_attached=False))
        await inventory.records.vdis.add_all(list(vdis))
        await inventory.pbd_plug(pbd.ref)
        there = [each for each in moment.order if each in inventory.records.vdis]
        for round_ in range(2):
            for number, older in enumerate(there):
                for newer in (*there[number + 1 :], ref):
                    data = content(inventory, ref) if newer == ref else moment.known[newer]
                    try:
                        found = await told(inventory, older, newer)
                    except XenAPIError as error:
                        # The one that is being destroyed may have left the row already.
                        assert moment.target in (older, newer), (str(state), error)
                        assert moment.doing == "destroy", (str(state), error)
                        continue
                    asked += 1
                    assert differing(moment.known[older], data) <= found, (str(state), number, round_)
            if round_ == 0:
                await write(inventory, ref, (MIB, b"\x77" * 512))
                await house.settled(sr.ref)
        await house.assert_records_are_true(sr.ref)
    shutil.rmtree(directory)
    return asked


def is_emptied(state: CrashState, moment: Moment) -> bool:
    """Whether a snapshot that loses its data has lost it in the files already."""
    if not moment.doing.startswith("lose"):
        return False
    (uuid,) = (vdi.uuid for vdi in moment.vdis if vdi.ref == moment.target)
    path = state.directory / f"{uuid}.vhd"
    if not path.exists():
        return True
    with path.open("rb") as file:
        return open_vhd(file.fileno(), str(path)).footer.hidden


async def sweep(tmp_path: Path, seed: int, *, per_point: int, share: float) -> None:
    rng = random.Random(seed)
    root = tmp_path / "sr"
    os.mkdir(tmp_path / "house")
    async with open_house_in(tmp_path / "house", limits=Limits(lease_wait=20)) as house:
        sr, ref = await tracked(house.inventory, root, 4 * MIB)
        await write(house.inventory, ref, (0, b"\x11" * MIB))
        await house.inventory.pbd_unplug(house.inventory.records.pbds_of_sr(sr)[0].ref)
    files = RecordingFileCalls(root)
    async with open_house_in(tmp_path / "house", files=files, limits=Limits(lease_wait=20)) as house:
        (pbd,) = house.inventory.records.pbds_of_sr(sr)
        await house.inventory.pbd_plug(pbd.ref)
        moments = await work(house, sr, ref, files, rng)
        site = (house.inventory.records.srs.get(sr), house.inventory.records.pbds.get(pbd.ref))
    asked = 0
    async for state in states(files, tmp_path, per_point):
        if not state.marks or rng.random() > share:
            continue
        index = state.marks[-1]
        assert isinstance(index, int)
        moment = moments[index]
        vdis = moment.vdis
        if moment.doing and (rng.random() < 0.5 or is_emptied(state, moment)):
            # The records came first, or the files; the record says first what an empty image will be for.
            vdis = moments[index + 1].vdis
        asked += await assert_nothing_is_missing(state, tmp_path / "again", moment, vdis, ref=ref, site=site)
    assert asked > 20


async def test_after_a_crash_no_changed_block_is_missing(tmp_path: Path) -> None:
    await sweep(tmp_path, 1, per_point=1, share=0.02)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", range(2, 8))
async def test_after_a_crash_at_any_point_no_changed_block_is_missing(tmp_path: Path, seed: int) -> None:
    await sweep(tmp_path, seed, per_point=2, share=1)
