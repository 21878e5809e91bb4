import json

from gateway.cli.changed_blocks import changed_ranges
from tests.cli.test_transfers import error
from tests.conftest import RunningGateway

MIB = 1 << 20


def test_what_has_changed_is_listed_after_the_snapshots_data_is_gone(house: RunningGateway) -> None:
    disk = house.run("vdi-create", "tracked", "4MiB").stdout.strip()
    assert house.run("vdi-enable-cbt", f"uuid={disk}").returncode == 0
    first = house.run("vdi-snapshot", disk).stdout.strip()
    assert house.run("vdi-data-destroy", f"uuid={first}").returncode == 0
    assert house.run("vdi-list-changed-blocks", f"vdi-from-uuid={first}", f"vdi-to-uuid={disk}").stdout == (
        "AAAAAAAAAAA=\n"
    )
    second = house.run("vdi-snapshot", disk).stdout.strip()
    told = house.run("vdi-list-changed-blocks", first, second, "--json").stdout
    assert json.loads(told) == {"virtual_size": 4 * MIB, "changed": []}
    assert "of the type cbt_metadata" in error(house.run("vdi-clone", first))
    assert house.run("vdi-disable-cbt", disk).returncode == 0
    assert "unrelated" in error(house.run("vdi-list-changed-blocks", first, disk))


def test_neighbouring_blocks_are_one_range() -> None:
    block = 64 << 10
    assert changed_ranges(b"\x01\x80\0\x40") == [(7 * block, 9 * block), (25 * block, 26 * block)]
    assert changed_ranges(bytes(4)) == []
