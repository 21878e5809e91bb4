import datetime
import os
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509
from structlog.testing import capture_logs

from gateway.certificates import (
    RENEW_BEFORE,
    SERVER_LIFETIME,
    ServerCertificate,
    ensure_server_certificate,
    own_names,
)
from gateway.reachable import reachable_addresses

NAMES = ["localhost", "127.0.0.1", "::1"]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def handshake(certificate: ServerCertificate, name: str) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate.chain, certificate.key)
    client = ssl.create_default_context(cafile=certificate.authority)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    ours, theirs = socket.socketpair()

    def answer() -> None:
        try:
            with server.wrap_socket(theirs, server_side=True) as wrapped:
                wrapped.sendall(b"x")
        except OSError:
            theirs.close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=name) as wrapped:
            assert wrapped.recv(1) == b"x"
    finally:
        ours.close()
        thread.join()


@pytest.mark.parametrize("name", NAMES)
def test_a_strict_client_that_trusts_the_authority_accepts_every_name(tmp_path: Path, name: str) -> None:
    handshake(ensure_server_certificate(str(tmp_path), NAMES), name)


def test_a_name_that_was_not_asked_for_is_refused(tmp_path: Path) -> None:
    certificate = ensure_server_certificate(str(tmp_path), NAMES)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(certificate, "elsewhere.example")


def test_keys_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    ensure_server_certificate(str(tmp_path), NAMES)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in os.listdir(tmp_path)}
    assert modes == {"ca.pem": 0o644, "ca-key.pem": 0o600, "server.pem": 0o644, "server-key.pem": 0o600}


def test_a_second_start_changes_nothing(tmp_path: Path) -> None:
    ensure_server_certificate(str(tmp_path), NAMES)
    before = contents(tmp_path)
    ensure_server_certificate(str(tmp_path), NAMES)
    assert contents(tmp_path) == before


def test_the_server_certificate_is_renewed_before_its_end_below_the_same_authority(tmp_path: Path) -> None:
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    ensure_server_certificate(str(tmp_path), NAMES, now)
    before = contents(tmp_path)
    ensure_server_certificate(
        str(tmp_path), NAMES, now + SERVER_LIFETIME - RENEW_BEFORE - datetime.timedelta(days=1)
    )
    assert contents(tmp_path) == before
    ensure_server_certificate(str(tmp_path), NAMES, now + SERVER_LIFETIME - RENEW_BEFORE)
    after = contents(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"server.pem", "server-key.pem"}


def test_the_authority_is_replaced_before_it_ends_ahead_of_what_it_signs(tmp_path: Path) -> None:
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    ensure_server_certificate(str(tmp_path), NAMES, now)
    later = now + datetime.timedelta(days=3650) - datetime.timedelta(days=100)
    certificate = ensure_server_certificate(str(tmp_path), NAMES, later)
    server = x509.load_pem_x509_certificate(Path(certificate.chain).read_bytes())
    authority = x509.load_pem_x509_certificate((tmp_path / "ca.pem").read_bytes())
    server.verify_directly_issued_by(authority)
    assert authority.not_valid_after_utc >= server.not_valid_after_utc


def test_a_new_name_makes_a_new_certificate(tmp_path: Path) -> None:
    ensure_server_certificate(str(tmp_path), NAMES)
    handshake(ensure_server_certificate(str(tmp_path), [*NAMES, "disks.example"]), "disks.example")


@pytest.mark.parametrize("broken", ["ca.pem", "ca-key.pem", "server.pem", "server-key.pem"])
@pytest.mark.parametrize(
    "content", [None, b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_a_lost_or_broken_file_is_replaced(tmp_path: Path, broken: str, content: bytes | None) -> None:
    ensure_server_certificate(str(tmp_path), NAMES)
    if content is None:
        (tmp_path / broken).unlink()
    else:
        (tmp_path / broken).write_bytes(content)
    handshake(ensure_server_certificate(str(tmp_path), NAMES), "localhost")


@pytest.mark.parametrize("lost", ["ca.pem", "ca-key.pem", "server.pem"])
def test_who_has_to_trust_another_authority_is_told(tmp_path: Path, lost: str) -> None:
    with capture_logs() as lines:
        ensure_server_certificate(str(tmp_path), NAMES)
        (tmp_path / lost).unlink()
        assert not lines
        ensure_server_certificate(str(tmp_path), NAMES)
    told = [line["path"] for line in lines if line["log_level"] == "warning"]
    assert told == ([] if lost == "server.pem" else [str(tmp_path / "ca.pem")])


def test_a_certificate_of_the_future_is_told_and_stays(tmp_path: Path) -> None:
    now = datetime.datetime.now(datetime.UTC)
    with capture_logs() as lines:
        ensure_server_certificate(str(tmp_path), NAMES, now + datetime.timedelta(hours=14))
        assert lines == []
        (tmp_path / "ca.pem").unlink()
        ensure_server_certificate(str(tmp_path), NAMES, now + datetime.timedelta(days=5000))
        made = contents(tmp_path)
        ensure_server_certificate(str(tmp_path), NAMES, now)
    assert contents(tmp_path) == made
    assert f"remove {tmp_path / 'ca.pem'} and send SIGHUP" in lines[-1]["advice"]


def test_a_key_of_another_certificate_is_replaced(tmp_path: Path) -> None:
    ensure_server_certificate(str(tmp_path / "a"), NAMES)
    ensure_server_certificate(str(tmp_path / "b"), NAMES)
    (tmp_path / "a" / "server-key.pem").write_bytes((tmp_path / "b" / "server-key.pem").read_bytes())
    handshake(ensure_server_certificate(str(tmp_path / "a"), NAMES), "localhost")


def test_own_names_hold_the_listen_address_once_and_for_a_wildcard_the_machines_own() -> None:
    usual = [socket.gethostname(), "localhost", "127.0.0.1", "::1"]
    assert own_names(["192.0.2.7", "127.0.0.1", "192.0.2.7"]) == [*usual, "192.0.2.7"]
    own = [*reachable_addresses("0.0.0.0"), *reachable_addresses("::")]
    names = own_names(["0.0.0.0", "::"])
    assert set(names) == {*usual, *own}
    assert len(names) == len(set(names))
    assert not {"0.0.0.0", "::"} & set(names)
