"""Disks in use by all sorts of programs, while their SR is coalesced all the time.

The trap: a chain that is never free is never merged, and a coalescer that does nothing hurts nobody. So one
disk is used by nobody, its merges are waited for under the others' load; and now and then all rest.
"""

import os
import random
from pathlib import Path

import pytest

from tests.system.lock_out_load import Disk, Load
from tests.system.site import Site, assert_whole, nodes, stored_content, wait_until


def failed_merges(site: Site) -> list[str]:
    tasks = site.gateway.call("task.get_all_records").values()
    ended = [task for task in tasks if (task["name_label"], task["status"]) == ("coalesce", "failure")]
    return [str(task["error_info"]) for task in ended]


def left_to_merge(site: Site) -> dict[str, str]:
    left: dict[str, str] = site.gateway.call("SR.get_coalesce_state", site.repository)
    return left


def soak(site: Site, directory: Path, seed: int, *, rounds: int, turns: int) -> None:
    rng = random.Random(seed)
    disks = [Disk(site) for _ in range(3)]
    load = Load(site, directory, rng, disks[:2], disks[2])
    load.begin()
    try:
        for _ in range(rounds):
            load.leave_something_to_merge(rng)
            # Whatever the others do: nobody uses this one, so its snapshot's base copy goes.
            wait_until(
                lambda: load.crew.check() and nodes(site)[load.alone.vdi.uuid] is None,
                "the lone disk to be merged",
                120,
            )
            load.crew.everybody_has_had(turns)
            with load.crew.resting():
                site.gateway.call("SR.coalesce", site.repository)
                assert left_to_merge(site) == {}
                assert failed_merges(site) == []
                assert_nothing_hidden_is_left_alone(site)
    finally:
        load.crew.end()
    load.crew.check()
    load.destroy_all_kept()
    wait_until(
        lambda: nodes(site) == {disk.vdi.uuid: None for disk in disks}, "the chains to become short", 60
    )
    for disk in disks:
        assert_whole(site, disk.vdi)
        assert stored_content(disk.vdi) == disk.content
    assert sorted(os.listdir(site.directory)) == sorted(
        [".vdi-gateway", *(disk.vdi.file.name for disk in disks)]
    )
    assert site.staged_files() == []
    assert min(load.crew.turns.values()) >= rounds * turns


def assert_nothing_hidden_is_left_alone(site: Site) -> None:
    """What is hidden has two children at least, or it would have been merged."""
    records = [r for r in site.gateway.call("VDI.get_all_records").values() if r["SR"] == site.repository]
    for record in records:
        children = [r for r in records if r["sm_config"].get("vhd-parent") == record["uuid"]]
        assert record["managed"] or len(children) > 1, record


def test_nobody_sees_a_wrong_byte_and_what_is_free_gets_merged(own_site: Site, tmp_path: Path) -> None:
    soak(own_site, tmp_path, 1, rounds=2, turns=6)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(2, 5))
def test_nobody_sees_a_wrong_byte_for_minutes(own_site: Site, tmp_path: Path, seed: int) -> None:
    soak(own_site, tmp_path, seed, rounds=12, turns=25)
