"""Clients that connect and then don't say what they want; and those that must not be taken for such."""

import json
import os
import shutil
import socket
import ssl
import struct
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from gateway.certificates import ensure_server_certificate
from tests.nbd_plugin.conftest import Nbd, run
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


def test_a_client_that_falls_silent_is_disconnected_wherever_it_stops(tmp_path: Path) -> None:
    # Another user may not look into everything that is in /proc.
    other_user = ("--user", "nobody") if os.geteuid() == 0 else ()
    everything = (b"", b"\0\0", FIXED_NEWSTYLE, FIXED_NEWSTYLE + STRUCTURED_REPLY, FIXED_NEWSTYLE + BEGUN)
    with (
        Supervised(tmp_path, "--handshake", LIMIT, *other_user, plugin=None) as supervisor,
        ExitStack() as clients,
    ):
        connected = [client for said in everything for client in silent_clients(supervisor, clients, said)]
        assert all(ends(client) for client in connected)
        # Who is disconnected later shows that it was told of these, and may not be told of itself any more.
        later = silent_clients(supervisor, clients, b"")
        assert all(ends(client) for client in later)
        assert supervisor.stop() == 0
        told = [json.loads(line) for line in supervisor.log().splitlines() if "opened nothing" in line]
        times = [line.get("times") for line in told]
        assert times[0] is None
        assert len(times) == 2, supervisor.log()
        assert len(connected) <= 1 + times[1] <= len(connected) + len(later), supervisor.log()


def silent_clients(supervisor: Supervised, clients: ExitStack, said: bytes) -> list[socket.socket]:
    """One on each socket, of which nothing more is heard."""
    public = clients.enter_context(socket.create_connection(("127.0.0.1", supervisor.port)))
    private = clients.enter_context(socket.socket(socket.AF_UNIX))
    private.connect(str(supervisor.state / "nbd.sock"))
    for client in (public, private):
        client.sendall(said)
    return [public, private]


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
    own = Nbd(nbd.site, tmp_path, "handshake=1", f"control={tmp_path}/nobody.sock", "wait=2.5")
    try:
        with pytest.raises(libnbd.Error, match="No such file or directory"):
            own.connect(libnbd, nbd.site.create_vdi(MIB))
        assert "the gateway doesn't answer, also after 2.5 s: No such file or directory" in own.log()
        assert "opened nothing" not in own.log()
    finally:
        assert own.stop() == 0, own.log()


def silent(clients: ExitStack, nbd: Nbd) -> socket.socket:
    client = clients.enter_context(socket.socket(socket.AF_UNIX))
    client.connect(str(nbd.socket))
    assert client.recv(18, socket.MSG_WAITALL).startswith(b"NBDMAGICIHAVEOPT")
    return client


def is_connected(client: socket.socket) -> bool:
    try:
        return client.recv(1, socket.MSG_DONTWAIT) != b""
    except BlockingIOError:
        return True


def test_hundreds_of_silent_clients_keep_nobody_out_and_take_no_disk_away(
    nbd: Nbd, libnbd: Any, tmp_path: Path
) -> None:
    own = Nbd(nbd.site, tmp_path, "clients=32", "handshake=3600")
    vdi, other = nbd.site.create_vdi(MIB), nbd.site.create_vdi(MIB)
    try:
        with ExitStack() as clients:
            writer = own.connect(libnbd, vdi, write=True)
            strangers = []
            for _ in range(10):
                strangers += [silent(clients, own) for _ in range(30)]
                assert run("nbdinfo", "--size", own.uri(other)) == f"{other.size}\n"
            eventually(lambda: sum(map(is_connected, strangers)) <= 16, "the strangers to be disconnected")
            # Those that came last are left in peace.
            assert all(map(is_connected, strangers[-10:]))
            writer.pwrite(b"1" * 512, 0)
            writer.shutdown()
    finally:
        assert own.stop() == 0, own.log()
    assert "too many clients" not in own.log()


def test_a_silent_client_makes_room_and_one_with_a_disk_does_not(
    nbd: Nbd, libnbd: Any, tmp_path: Path
) -> None:
    own = Nbd(nbd.site, tmp_path, "clients=4", "handshake=0")
    vdi = nbd.site.create_vdi(MIB)
    try:
        with ExitStack() as clients:
            readers = [own.connect(libnbd, vdi) for _ in range(3)]
            stranger = silent(clients, own)
            readers.append(own.connect(libnbd, vdi))
            assert ends(stranger)
            with pytest.raises(libnbd.Error):
                own.connect(libnbd, vdi)
            assert "too many clients are connected" in own.log()
            for reader in readers:
                assert reader.pread(512, 0) == bytes(512)
                reader.shutdown()

            def let_in() -> bool:
                try:
                    own.connect(libnbd, vdi).shutdown()
                except libnbd.Error:
                    return False
                return True

            eventually(let_in, "room for another")
    finally:
        assert own.stop() == 0, own.log()
