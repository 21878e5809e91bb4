import json

from tests.cli.test_transfers import error
from tests.conftest import RunningGateway


def test_a_snapshot_and_a_clone_are_shown_as_a_tree(house: RunningGateway) -> None:
    disk = house.command("vdi-create", "tree", "4MiB").stdout.strip()
    assert house.command("vdi-snapshot", f"uuid={disk}", "new-name-label=kept").returncode == 0
    made = house.command("vdi-clone", "kept", "--name", "try", "--json")
    clone = json.loads(made.stdout)["uuid"]
    nodes = json.loads(house.command("vdi-chain", clone, "--json").stdout)
    assert [node["depth"] for node in nodes] == [1, 2, 2, 2]
    assert nodes[0]["name_label"] == "base copy"
    assert nodes[0]["state"] == ["hidden"]
    assert {node["name_label"]: node["state"] for node in nodes[1:]} == {
        "tree": [],
        "kept": ["snapshot"],
        "try": [],
    }
    assert {node["parent"] for node in nodes[1:]} == {nodes[0]["uuid"]}
    lines = house.command("vdi-chain", "sr=disks").stdout.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(nodes[0]["uuid"])
    assert f"  {clone}  try: 4 MiB" in "\n".join(lines)


def test_what_cannot_be_a_snapshot_is_said(house: RunningGateway) -> None:
    house.command("vdi-create", "flat", "1MiB", "sm-config:image-format=raw")
    assert "raw image has no snapshots" in error(house.command("vdi-snapshot", "flat"))
    assert "there is no disk" in error(house.command("vdi-chain", "nowhere"))
