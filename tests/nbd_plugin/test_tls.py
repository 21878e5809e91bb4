"""NBD with TLS as clients meet it: the gateway's authority is all that they need, and nobody does without.

Where TLS is demanded, on an address that other machines reach, with a session in the export's name.
"""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gateway.certificates import ensure_server_certificate
from gateway.reachable import reachable_addresses
from tests.nbd_plugin.served import NbdSite, filled, public_workers, run, serving
from tests.nbd_plugin.supervised import ended
from tests.system.site import MIB, Vdi, stored_content, wait_until

pytestmark = pytest.mark.skipif(shutil.which("nbdcopy") is None, reason="libnbd-bin is not installed")

SIZE = 6 * MIB


@pytest.fixture(scope="module")
def tls_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NbdSite]:
    with serving(tmp_path_factory.mktemp("tls"), "--nbd", "0.0.0.0:0") as site:
        yield site


@pytest.fixture
def authority(tls_site: NbdSite, tmp_path: Path) -> Path:
    """What an administrator hands out: a directory with the authority's certificate and nothing else."""
    return directory_of(tls_site.gateway.ca_file, tmp_path / "trusted")


@pytest.fixture
def stranger(tls_site: NbdSite, tmp_path: Path) -> Path:
    """Another authority, which has signed no certificate of the gateway's."""
    made = ensure_server_certificate(str(tmp_path / "elsewhere"), ["localhost"])
    assert made.authority is not None
    return directory_of(Path(made.authority), tmp_path / "strange")


def directory_of(certificate: Path, directory: Path) -> Path:
    directory.mkdir()
    shutil.copy(certificate, directory / "ca-cert.pem")
    return directory


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.raw"
    path.write_bytes(os.urandom(3 * MIB + 512) + bytes(SIZE - 3 * MIB - 512))
    return path


def refused(*command: str | Path) -> str:
    """What a program says, which must fail."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode != 0, done.stdout
    return done.stderr


def tls_uri(site: NbdSite, vdi: Vdi, authority: Path, *, write: bool = False) -> str:
    return site.uri(vdi, write=write, scheme="nbds", query=f"?tls-certificates={authority}")


def qemu(site: NbdSite, vdi: Vdi, *, write: bool = False) -> str:
    """QEMU's name of an export, for credentials that are called tls."""
    info = site.info(vdi)
    export = info["exportname"] + ("&mode=rw" if write else "")
    return f"driver=nbd,host={info['address']},port={info['port']},tls-creds=tls,export={export}"


def credentials(authority: Path) -> list[str]:
    return ["--object", f"tls-creds-x509,id=tls,endpoint=client,dir={authority}"]


def test_nbdcopy_writes_and_reads(tls_site: NbdSite, authority: Path, image: Path, tmp_path: Path) -> None:
    vdi = tls_site.create_vdi(SIZE)
    run("nbdcopy", "--flush", image, tls_uri(tls_site, vdi, authority, write=True))
    assert stored_content(vdi) == image.read_bytes()
    run("nbdcopy", tls_uri(tls_site, vdi, authority), tmp_path / "back.raw")
    assert (tmp_path / "back.raw").read_bytes() == image.read_bytes()


def test_nbdinfo_sees_that_it_is_encrypted(tls_site: NbdSite, authority: Path) -> None:
    vdi = tls_site.create_vdi(SIZE)
    told = json.loads(run("nbdinfo", "--json", "--no-content", tls_uri(tls_site, vdi, authority)))
    assert told["TLS"] is True
    assert told["exports"][0]["export-size"] == SIZE


def test_qemu_needs_the_authority_alone(
    tls_site: NbdSite, authority: Path, image: Path, tmp_path: Path
) -> None:
    vdi = tls_site.create_vdi(SIZE)
    tls = credentials(authority)
    into = ["--target-image-opts", qemu(tls_site, vdi, write=True)]
    run("qemu-img", "convert", *tls, "-n", "-f", "raw", image, *into)
    # The export is closed once the client has gone.
    wait_until(
        lambda: tls_site.gateway.call("VDI.get_current_operations", vdi.ref) == {}, "the export to be closed"
    )
    assert stored_content(vdi) == image.read_bytes()
    told = json.loads(run("qemu-img", "info", "--output=json", *tls, "--image-opts", qemu(tls_site, vdi)))
    assert told["virtual-size"] == SIZE
    run("qemu-img", "convert", *tls, "-O", "qcow2", "--image-opts", qemu(tls_site, vdi), tmp_path / "b.qcow2")
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", image, tmp_path / "b.qcow2")


def test_who_does_not_encrypt_is_refused(tls_site: NbdSite, libnbd: Any) -> None:
    vdi = tls_site.create_vdi(SIZE)
    info = tls_site.info(vdi)
    client = libnbd.NBD()
    client.set_export_name(info["exportname"])
    with pytest.raises(libnbd.Error) as error:
        client.connect_tcp(info["address"], info["port"])
    # What libnbd makes of the answer that TLS is required; a name that is refused is ENOENT.
    assert error.value.errno == "ENOTSUP"
    assert "Operation not supported" in refused("nbdinfo", tls_site.uri(vdi))
    assert "Operation not supported" in refused("nbdcopy", tls_site.uri(vdi), "null:")
    plain = qemu(tls_site, vdi).replace(",tls-creds=tls", "")
    assert "TLS" in refused("qemu-img", "info", "--image-opts", plain)
    assert tls_site.gateway.call("VDI.get_current_operations", vdi.ref) == {}


def test_clients_refuse_a_gateway_of_another_authority(tls_site: NbdSite, stranger: Path) -> None:
    vdi = tls_site.create_vdi(SIZE)
    assert "certificate" in refused("nbdinfo", tls_uri(tls_site, vdi, stranger)).lower()
    assert "certificate" in refused("nbdcopy", tls_uri(tls_site, vdi, stranger), "null:").lower()
    told = refused("qemu-img", "info", *credentials(stranger), "--image-opts", qemu(tls_site, vdi))
    assert "certificate" in told.lower()
    assert tls_site.gateway.call("VDI.get_current_operations", vdi.ref) == {}


def test_a_new_certificate_disturbs_nobody(tls_site: NbdSite, tmp_path: Path, libnbd: Any) -> None:
    site = tls_site
    vdi, content = filled(site, tmp_path, MIB)
    info = site.info(vdi)
    assert info["cert"].startswith("-----BEGIN CERTIFICATE-----")
    client = tls_client(libnbd, site, vdi, site.gateway.ca_file)
    assert client.pread(MIB, 0) == content.read_bytes()
    [old] = public_workers(site)
    # The certificate is made anew when it is gone.
    for name in ("server.pem", "server-key.pem"):
        (site.gateway.state_dir / "tls" / name).unlink()
    site.gateway.signal(signal.SIGHUP)
    wait_until(lambda: "new workers have taken over" in site.gateway.log(), "a new generation")
    assert site.info(vdi)["cert"] != info["cert"]
    assert client.pread(MIB, 0) == content.read_bytes()
    [new] = set(public_workers(site)) - {old}
    again = tls_client(libnbd, site, vdi, site.gateway.ca_file)
    assert again.pread(512, 0) == content.read_bytes()[:512]
    client.shutdown()
    wait_until(lambda: ended(old), "the old worker to end after its client")
    assert not ended(new)


def tls_client(libnbd: Any, site: NbdSite, vdi: Vdi, authority: Path) -> Any:
    """Connected to where the gateway says, which the certificate has to name, with this authority."""
    certificates = site.gateway.state_dir.parent / "client-tls"
    certificates.mkdir(exist_ok=True)
    shutil.copy(authority, certificates / "ca-cert.pem")
    info = site.info(vdi)
    client = libnbd.NBD()
    client.set_tls(libnbd.TLS_REQUIRE)
    client.set_tls_certificates(str(certificates))
    client.set_export_name(info["exportname"])
    client.connect_tcp(info["address"], info["port"])
    return client


def test_the_operators_certificate_is_served_too(tmp_path: Path, libnbd: Any) -> None:
    made = ensure_server_certificate(str(tmp_path / "site"), list(reachable_addresses("0.0.0.0")))
    given = ("--tls-cert", made.chain, "--tls-key", made.key)
    with serving(tmp_path, "--nbd", "0.0.0.0:0", *given) as site:
        vdi = site.create_vdi(MIB)
        assert site.info(vdi)["cert"] == Path(made.chain).read_text()
        assert made.authority is not None
        client = tls_client(libnbd, site, vdi, Path(made.authority))
        assert client.get_size() == vdi.size
        client.shutdown()


def test_an_operators_certificate_that_cannot_be_used_changes_nothing(tmp_path: Path, libnbd: Any) -> None:
    addresses = list(reachable_addresses("0.0.0.0"))
    made = ensure_server_certificate(str(tmp_path / "site"), addresses)
    other = ensure_server_certificate(str(tmp_path / "other"), addresses)
    good, another = Path(made.chain).read_text(), Path(other.chain).read_text()
    given = ("--tls-cert", made.chain, "--tls-key", made.key)
    with serving(tmp_path, "--nbd", "0.0.0.0:0", *given) as site:
        vdi = site.create_vdi(MIB)
        before = public_workers(site)

        def kept(times: int) -> bool:
            return site.gateway.log().count("NBD keeps the old certificate") == times

        # One of another key each time, and then none.
        for number, content in enumerate((another, another + "\n", "nothing"), 1):
            Path(made.chain).write_text(content)
            os.kill(site.gateway.pid, signal.SIGHUP)
            wait_until(partial(kept, number), "the refusal")
            assert site.info(vdi)["cert"] == good
        [worker] = before
        os.kill(worker, signal.SIGKILL)
        assert made.authority is not None
        client = tls_client(libnbd, site, vdi, Path(made.authority))
        assert client.get_size() == vdi.size
        client.shutdown()
        assert "new workers" not in site.gateway.log()
