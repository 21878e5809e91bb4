import errno
import json
from contextlib import closing

import pytest

from gateway.access.client import open_vdi
from tests.conftest import RunningGateway
from tests.system.site import wait_until


def test_a_disk_is_taken_away_from_another_process_and_is_free_then(house: RunningGateway) -> None:
    disk = house.run("vdi-create", "held", "4MiB").stdout.strip()
    with closing(open_vdi(str(house.state_dir / "access.sock"), disk, write=True)) as held:
        done = house.run("vdi-unlock", f"uuid={disk}")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        wait_until(lambda: held.revoked is not None, "the disk to be taken away")
        with pytest.raises(OSError, match=r"root at .* took the disk away") as refused:
            held.pwrite(b"x", 0)
        assert refused.value.errno == errno.ESHUTDOWN
    assert house.run("vdi-destroy", disk).returncode == 0


def test_why_a_disk_was_refused_is_listed(house: RunningGateway) -> None:
    disk = house.run("vdi-create", "refused", "4MiB").stdout.strip()
    socket = str(house.state_dir / "access.sock")
    with closing(open_vdi(socket, disk)), pytest.raises(OSError, match="VDI_IN_USE"):
        open_vdi(socket, disk, write=True)
    [found] = json.loads(house.run("vdi-list", "--json", f"uuid={disk}").stdout)
    assert "writing by root (access, process" in found["sm_config"]["last-refusal"]


def test_a_disk_that_is_not_there_is_told(house: RunningGateway) -> None:
    done = house.run("vdi-unlock", "nothing")
    assert done.returncode == 1
    assert "nothing" in done.stderr
