import ipaddress
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509

from gateway.certificates import ensure_server_certificate, subject_of
from gateway.nbd_addresses import nbd_service
from gateway.reachable import reachable_addresses


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.7", "::1", "gateway.test"])
def test_who_listens_on_one_address_is_reached_there(host: str) -> None:
    assert list(reachable_addresses(host)) == [host]


@pytest.mark.skipif(shutil.which("ip") is None, reason="iproute2 is not installed")
@pytest.mark.parametrize(("host", "family"), [("0.0.0.0", "inet"), ("::", "inet6")])
def test_who_listens_on_all_addresses_is_reached_at_each_of_this_machine(host: str, family: str) -> None:
    listed = subprocess.run(["ip", "-json", "addr", "show", "up"], capture_output=True, check=True)
    held = [
        ipaddress.ip_address(each["local"])
        for link in json.loads(listed.stdout)
        for each in link.get("addr_info", [])
        if each["family"] == family
    ]
    expected = [str(each) for each in held if not each.is_loopback and not each.is_link_local]
    found = list(reachable_addresses(host))
    assert sorted(found) == sorted(expected or [socket.gethostname()])
    assert sorted(nbd_service(host, 10809, None).addresses) == sorted(found)


NAMESPACE = """
ip link set lo up &&
ip link add usual type veth peer name other &&
ip addr add 198.18.0.1/24 dev other && ip addr add 198.18.0.2/24 dev other &&
ip addr add 198.18.1.1/24 dev usual && ip addr add 2001:db8:1::1/64 dev usual nodad &&
ip link set other up && ip link set usual up && ip route add default dev usual &&
ip link add off type veth peer name end && ip addr add 198.18.2.1/24 dev off && exec "$@"
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces are made by root")
def test_of_several_addresses_that_on_the_way_to_other_networks_is_the_first() -> None:
    program = "from gateway.reachable import reachable_addresses as a; print(*a('0.0.0.0')); print(*a('::'))"
    command = ["unshare", "-n", "sh", "-c", NAMESPACE, "sh", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    if "Operation not permitted" in done.stderr:
        pytest.skip("no network namespace can be made here")
    assert done.stdout.splitlines() == ["198.18.1.1 198.18.0.1 198.18.0.2", "2001:db8:1::1"], done.stderr


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
