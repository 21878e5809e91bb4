import socket
from pathlib import Path

import pytest
from cryptography import x509

from gateway.certificates import ensure_server_certificate, subject_of
from gateway.nbd_addresses import nbd_service
from gateway.reachable import reachable_addresses


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.7", "::1", "gateway.test"])
def test_who_listens_on_one_address_is_reached_there(host: str) -> None:
    assert list(reachable_addresses(host)) == [host]


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_who_listens_on_all_addresses_is_reached_at_one_of_this_machine(host: str) -> None:
    (told,) = reachable_addresses(host)
    family = socket.AF_INET6 if ":" in told else socket.AF_INET
    if told == socket.gethostname():
        return
    with socket.socket(family) as bound:
        bound.bind((told, 0))  # the kernel lets nobody bind an address that is not the machine's


def test_a_service_without_tls_has_the_hosts_name_and_no_certificate() -> None:
    service = nbd_service("127.0.0.1", 10809, None)
    assert (service.addresses, service.port, service.certificate) == (("127.0.0.1",), 10809, None)
    assert (service.subject, service.purpose) == (socket.gethostname(), "insecure_nbd")


def test_a_service_with_tls_tells_the_certificate_it_sends_and_a_name_of_it(tmp_path: Path) -> None:
    made = ensure_server_certificate(str(tmp_path), ["10.0.0.1", "gateway.test", "localhost"])
    service = nbd_service("10.0.0.1", 10809, made.chain)
    assert service.purpose == "nbd"
    assert service.subject == "gateway.test"
    assert service.certificate is not None
    told = x509.load_pem_x509_certificate(service.certificate.encode())
    assert told == x509.load_pem_x509_certificate(Path(made.chain).read_bytes())


@pytest.mark.parametrize(
    ("names", "subject"),
    [
        (["*.test", "gateway.test"], "gateway.test"),
        (["*.test"], "*.test"),
        (["192.0.2.7"], None),
    ],
)
def test_a_wildcard_is_the_subject_only_where_there_is_no_other(
    tmp_path: Path, names: list[str], subject: str | None
) -> None:
    made = ensure_server_certificate(str(tmp_path), names)
    assert subject_of(Path(made.chain).read_bytes()) == subject


def test_what_is_no_certificate_is_told_as_that(tmp_path: Path) -> None:
    (tmp_path / "chain.pem").write_text("nothing")
    with pytest.raises(ValueError, match="PEM"):
        nbd_service("127.0.0.1", 10809, str(tmp_path / "chain.pem"))
