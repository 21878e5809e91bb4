"""The directories of certificates that workers are given."""

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.certificates import ensure_server_certificate
from gateway.nbd_files import NbdFiles


def files_in(directory: Path) -> NbdFiles:
    state: Any = SimpleNamespace(path=str(directory))
    config: Any = SimpleNamespace(
        nbd=("127.0.0.1", 0), nbd_insecure=False, nbd_parallel=False, nbd_user="root", named=lambda name: name
    )
    return NbdFiles(state, config)


def test_the_files_of_a_certificate_are_durable_before_its_directory_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = ensure_server_certificate(str(tmp_path / "tls"), ["localhost"])
    synced: set[int] = set()
    fsync, rename = os.fsync, os.rename

    def note(fd: int) -> None:
        fsync(fd)
        synced.add(os.fstat(fd).st_ino)

    def look(old: str, new: str) -> None:
        if Path(old).is_dir():
            assert {path.stat().st_ino for path in (Path(old), *Path(old).iterdir())} <= synced
        rename(old, new)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", look)
    directory = files_in(tmp_path).certificates(certificate)
    assert {path.name: path.stat().st_mode & 0o777 for path in Path(directory).iterdir()} == dict.fromkeys(
        ("ca-cert.pem", "server-cert.pem", "server-key.pem"), 0o600
    )


def test_a_certificate_is_there_for_workers_also_after_the_clock_was_put_back(tmp_path: Path) -> None:
    files = files_in(tmp_path)
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
