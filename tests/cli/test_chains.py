import json
from typing import Any

from gateway.cli.chains import trees
from tests.cli.test_transfers import error
from tests.conftest import RunningGateway


def test_a_snapshot_and_a_clone_are_shown_as_a_tree(house: RunningGateway) -> None:
    disk = house.run("vdi-create", "tree", "4MiB").stdout.strip()
    assert house.run("vdi-snapshot", f"uuid={disk}", "new-name-label=kept").returncode == 0
    made = house.run("vdi-clone", "kept", "--name", "try", "--json")
    clone = json.loads(made.stdout)["uuid"]
    nodes = json.loads(house.run("vdi-chain", clone, "--json").stdout)
    assert [node["depth"] for node in nodes] == [1, 2, 2, 2]
    assert nodes[0]["name_label"] == "base copy"
    assert nodes[0]["state"] == ["hidden"]
    assert {node["name_label"]: node["state"] for node in nodes[1:]} == {
        "tree": [],
        "kept": ["snapshot"],
        "try": [],
    }
    assert {node["parent"] for node in nodes[1:]} == {nodes[0]["uuid"]}
    lines = house.run("vdi-chain", "sr=disks").stdout.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(nodes[0]["uuid"])
    assert f"  {clone}  try: 4 MiB" in "\n".join(lines)


def test_a_name_of_several_lines_is_one_line_of_a_tree_and_of_an_error(house: RunningGateway) -> None:
    name = "two\nlines\x9b2J"
    disk = house.run("vdi-create", name, "2MiB").stdout.strip()
    assert house.run("vdi-chain", disk).stdout.splitlines() == [
        f"{disk}  two lines 2J: 2 MiB, 4 KiB stored, depth 1"
    ]
    assert "no such/file.part: No such file" in error(house.run("vdi-export", disk, "no\nsuch/file"))
    assert house.run("vdi-destroy", disk).returncode == 0


def test_a_name_that_a_disk_shares_with_its_snapshots_is_the_disks(house: RunningGateway) -> None:
    disk = house.run("vdi-create", "nightly", "2MiB").stdout.strip()
    snapshots = [house.run("vdi-snapshot", "nightly").stdout.strip() for _ in range(2)]
    assert house.run("vdi-param-set", "nightly", "name-description=the disk").returncode == 0
    listed = house.run("vdi-list", "name-label=nightly", "params=uuid,name-description").stdout
    assert f"{disk}\tthe disk\n" in listed
    assert listed.count("the disk") == 1
    # What is destroyed doesn't come back.
    line = error(house.run("vdi-destroy", "nightly"))
    assert "several disks are called 'nightly'" in line
    for uuid in (disk, snapshots[0], snapshots[1]):
        assert uuid in line
    # Of snapshots alone a name is that of the only one.
    for uuid in (disk, snapshots[0], "nightly"):
        assert house.run("vdi-destroy", uuid).returncode == 0


def test_what_cannot_be_a_snapshot_is_said(house: RunningGateway) -> None:
    house.run("vdi-create", "flat", "1MiB", "sm-config:image-format=raw")
    assert "raw image has no snapshots" in error(house.run("vdi-snapshot", "flat"))
    assert "there is no disk" in error(house.run("vdi-chain", "nowhere"))


def record(uuid: str, parent: str | None) -> dict[str, Any]:
    return {
        "uuid": uuid,
        "name_label": uuid,
        "sm_config": {} if parent is None else {"vhd-parent": parent},
        "virtual_size": "0",
        "physical_utilisation": "0",
        "managed": True,
        "is_a_snapshot": False,
        "missing": False,
        "current_operations": {},
    }


def test_trees_of_any_height_and_circles_are_shown_whole() -> None:
    tall = {str(number): record(str(number), str(number - 1) if number else None) for number in range(5000)}
    assert [(node["uuid"], node["depth"]) for node in trees(tall)] == [
        (str(number), number + 1) for number in range(5000)
    ]
    pairs = {"root": None, "b": "root", "a": "root", "c": "a", "lost": "gone", "x": "y", "y": "x"}
    mixed = {uuid: record(uuid, parent) for uuid, parent in pairs.items()}
    assert [(node["uuid"], node["depth"]) for node in trees(mixed)] == [
        ("lost", 1),
        ("root", 1),
        ("a", 2),
        ("c", 3),
        ("b", 2),
        ("x", 1),
        ("y", 1),
    ]
