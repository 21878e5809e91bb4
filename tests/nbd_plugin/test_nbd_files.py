"""The directories of certificates that workers are given."""

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gateway.certificates import ensure_server_certificate
from gateway.nbd_files import NbdFiles


def test_a_certificate_is_there_for_workers_also_after_the_clock_was_put_back(tmp_path: Path) -> None:
    state: Any = SimpleNamespace(path=str(tmp_path))
    config: Any = SimpleNamespace(
        nbd=("127.0.0.1", 0), nbd_insecure=False, nbd_parallel=False, nbd_user="root", named=lambda name: name
    )
    files = NbdFiles(state, config)
    certificate = ensure_server_certificate(str(tmp_path / "tls"), ["localhost"])
    chain = Path(certificate.chain)
    directories: list[str] = []
    for _ in range(4):
        chain.write_text(chain.read_text() + "\n")  # as good as before, and another one
        directory = files.certificates(certificate)
        assert Path(directory, "server-cert.pem").read_text() == chain.read_text()
        in_an_hour = time.time() + 3600
        os.utime(directory, (in_an_hour, in_an_hour))
        directories.append(directory)
    kept = [directory for directory in directories if Path(directory).exists()]
    assert len(kept) == 2
    assert directories[-1] in kept
