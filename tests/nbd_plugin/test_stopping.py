import contextlib
import select
import signal
from pathlib import Path
from typing import Any

import pytest

from nbd_plugin.stopping import PATIENCE_SECONDS
from tests.nbd_plugin.conftest import Nbd
from tests.system.site import MIB, stored_content


@pytest.mark.long
def test_nbdkit_ends_beside_a_client_that_takes_no_answers(nbd: Nbd, libnbd: Any, tmp_path: Path) -> None:
    own = Nbd(nbd.site, tmp_path)
    vdi = nbd.site.create_vdi(8 * MIB)
    try:
        client = own.connect(libnbd, vdi, write=True)
        client.pwrite(b"w" * MIB, MIB)
        client.aio_pread(libnbd.Buffer(8 * MIB), 0)
        # The answer has begun, and it is longer than what the socket takes.
        assert select.select([client.aio_get_fd()], [], [], 20)[0]
        own.process.send_signal(signal.SIGTERM)
        assert own.process.wait(PATIENCE_SECONDS + 20) == 0, own.log()
    finally:
        own.stop()
    assert stored_content(vdi) == bytes(MIB) + b"w" * MIB + bytes(6 * MIB)
    with contextlib.suppress(libnbd.Error):
        client.shutdown()
