"""Clients that connect and then don't say what they want; and those that must not be taken for such."""

import os
import shutil
import socket
import ssl
import struct
from pathlib import Path
from typing import Any

import pytest

from gateway.certificates import ensure_server_certificate
from tests.nbd_plugin.conftest import Nbd
from tests.nbd_plugin.supervised import Supervised, eventually
from tests.system.site import MIB

LIMIT = "0.5"
FIXED_NEWSTYLE = struct.pack(">I", 1)
STARTTLS = b"IHAVEOPT" + struct.pack(">II", 5, 0)
STRUCTURED_REPLY = b"IHAVEOPT" + struct.pack(">II", 8, 0)
BEGUN = b"IHAVEOPT" + struct.pack(">II", 7, 4096) + b"half of a name"


def ends(client: socket.socket) -> bool:
    """Whether the server disconnects the client; waits for it."""
    client.settimeout(30)
    try:
        while client.recv(4096):
            pass
    except (ConnectionError, ssl.SSLError):
        pass
    return True


@pytest.mark.parametrize(
    "said", [b"", b"\0\0", FIXED_NEWSTYLE, FIXED_NEWSTYLE + STRUCTURED_REPLY, FIXED_NEWSTYLE + BEGUN]
)
def test_a_client_that_falls_silent_is_disconnected(tmp_path: Path, said: bytes) -> None:
    # Another user may not look into everything that is in /proc.
    other_user = ("--user", "nobody") if os.geteuid() == 0 else ()
    with Supervised(tmp_path, "--handshake", LIMIT, *other_user, plugin=None) as supervisor:
        with socket.create_connection(("127.0.0.1", supervisor.port)) as client:
            client.sendall(said)
            assert ends(client)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(supervisor.state / "nbd.sock"))
            client.sendall(said)
            assert ends(client)
        assert supervisor.stop() == 0
        told = [line for line in supervisor.log().splitlines() if "opened nothing" in line]
        assert len(told) == 2, supervisor.log()


@pytest.mark.parametrize("handshake", ["none", "half", "whole"])
def test_tls_is_no_way_to_stay(tmp_path: Path, handshake: str) -> None:
    made = ensure_server_certificate(str(tmp_path / "tls"), ["127.0.0.1"])
    assert made.authority is not None
    directory = tmp_path / "nbdkit-tls"
    directory.mkdir()
    for name, file in (("server-cert", made.chain), ("server-key", made.key), ("ca-cert", made.authority)):
        shutil.copy(file, directory / f"{name}.pem")
    arguments = ("--handshake", LIMIT, "--tls", str(directory))
    with Supervised(tmp_path, *arguments, plugin=None) as supervisor:
        with socket.create_connection(("127.0.0.1", supervisor.port)) as client:
            client.sendall(FIXED_NEWSTYLE + STARTTLS)
            answer = b""
            while len(answer) < 18 + 20:
                answer += client.recv(18 + 20 - len(answer))
            assert struct.unpack(">QIII", answer[18:])[1:] == (5, 1, 0)
            if handshake == "none":
                assert ends(client)
            elif handshake == "half":
                client.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
                assert ends(client)
            else:
                context = ssl.create_default_context(cafile=made.authority)
                with context.wrap_socket(client, server_hostname="127.0.0.1") as encrypted:
                    assert ends(encrypted)
        eventually(lambda: "opened nothing" in supervisor.log(), "the reason in the log")


def test_who_has_a_disk_open_or_looks_at_one_is_left_alone(nbd: Nbd, libnbd: Any, tmp_path: Path) -> None:
    own = Nbd(nbd.site, tmp_path, "handshake=2")
    vdi = nbd.site.create_vdi(MIB)
    try:
        writer = own.connect(libnbd, vdi, write=True)
        # Looking at a disk doesn't end the time, but begins it anew.
        looking = libnbd.NBD()
        looking.set_opt_mode(True)
        looking.connect_uri(own.uri(nbd.site.create_vdi(MIB)))
        looking.opt_info()
        assert looking.get_size() == vdi.size
        with socket.socket(socket.AF_UNIX) as silent:
            silent.connect(str(own.socket))
            assert ends(silent)
        writer.pwrite(b"1" * 512, 0)
        assert writer.pread(512, 0) == b"1" * 512
        writer.shutdown()
        with pytest.raises(libnbd.Error):
            while True:
                looking.poll(-1)
    finally:
        assert own.stop() == 0, own.log()


def test_a_client_that_the_gateway_lets_wait_is_not_silent(nbd: Nbd, libnbd: Any, tmp_path: Path) -> None:
    own = Nbd(nbd.site, tmp_path, "handshake=2", f"control={tmp_path}/nobody.sock", "wait=4")
    try:
        with pytest.raises(libnbd.Error, match="No such file or directory"):
            own.connect(libnbd, nbd.site.create_vdi(MIB))
        assert "the gateway doesn't answer, also after 4 s: No such file or directory" in own.log()
        assert "opened nothing" not in own.log()
    finally:
        assert own.stop() == 0, own.log()
