"""What has been sent and not been read yet must not change with the file that it came from."""

import random
from contextlib import closing

import pytest

from gateway.access.client import open_vdi
from tests.system.clients import RawClient
from tests.system.site import MIB, Site, Vdi, wait_until

# More than the sockets between the two take.
SIZE = 96 * MIB
PIECE = 4 * MIB


def write(site: Site, vdi: Vdi, data: bytes) -> None:
    """Into the VDI's file, in place."""
    with closing(open_vdi(str(site.gateway.state_dir / "access.sock"), vdi.uuid, write=True)) as disk:
        for offset in range(0, SIZE, PIECE):
            disk.pwrite(data[offset : offset + PIECE], offset)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_download_that_is_on_its_way_is_not_changed_by_the_next_writer(site: Site, scheme: str) -> None:
    def is_leased() -> bool:
        return bool(site.gateway.call("VDI.get_current_operations", vdi.ref))

    vdi, old = site.create_vdi(SIZE), random.Random(1).randbytes(SIZE)
    write(site, vdi, old)
    with RawClient(site.export_url(vdi, scheme=scheme), site.gateway.ca_file) as client:
        client.head(method="GET")
        client.answer_head()
        found = bytearray()
        # Not more than makes the gateway believe that all has been taken; the last bytes lie in the sockets.
        while is_leased():
            found += client.receive(max(0, min(MIB // 2, SIZE - MIB - len(found))))
        write(site, vdi, bytes(SIZE))
        assert 0 < len(found) < SIZE
        found += client.receive(SIZE - len(found))
    assert found == old
    wait_until(lambda: not is_leased(), "the lease to end")
    site.gateway.call("VDI.destroy", vdi.ref)
