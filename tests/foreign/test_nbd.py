"""Clients of others that ask the API where a disk is served over NBD, and read it there."""

import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import XenAPI

from tests.conftest import RunningGateway
from tests.foreign.programs import NodeProgram
from tests.system.site import MIB, Site, Vdi, wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def nbd_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A gateway that serves NBD without TLS on the loopback."""
    directory = tmp_path_factory.mktemp("nbd")
    gateway = RunningGateway(directory, ("--nbd", "127.0.0.1:0"))
    gateway.start()
    try:
        yield Site(gateway, directory / "sr")
    finally:
        gateway.stop()
    # What nbdkit says of a refusal has one.
    own = [line for line in gateway.log().splitlines() if '"event": "nbdkit says"' not in line]
    assert not [line for line in own if "Traceback" in line]


@pytest.fixture(scope="module")
def disk(nbd_site: Site) -> tuple[Vdi, bytes]:
    """A disk with data, a hole and a short last block for whom reads 2 MiB at a time."""
    vdi = nbd_site.create_vdi(7 * MIB, image_format="raw")
    content = b"d" * (3 * MIB) + bytes(3 * MIB) + b"e" * MIB
    with vdi.file.open("r+b") as file:
        file.write(content[: 3 * MIB])
        file.seek(6 * MIB)
        file.write(content[6 * MIB :])
    return vdi, content


@pytest.mark.parametrize("transport", ["json-rpc", "xml-rpc"])
def test_xen_orchestras_client_finds_and_reads_a_disk(
    nbd_site: Site, disk: tuple[Vdi, bytes], xen_api: NodeProgram, transport: str
) -> None:
    vdi, content = disk
    found = xen_api("nbd.mjs", nbd_site.gateway, transport=transport, vdi=vdi.ref, purpose="insecure_nbd")
    [told] = found["told"]
    assert told["address"] == "127.0.0.1"
    assert isinstance(told["port"], int if transport == "json-rpc" else str)
    assert "cert" not in told
    assert found["secret"]
    assert (found["networks"], found["purpose"]) == (1, ["insecure_nbd"])
    assert (found["addresses"], found["attached"], len(found["hosts"])) == (["127.0.0.1"], [True], 1)
    assert found["content"] == hashlib.sha256(content).hexdigest()
    data = [(piece["offset"], piece["length"]) for piece in found["map"] if piece["type"] == 0]
    assert data == [(0, 3 * MIB), (6 * MIB, MIB)]
    assert found["off"] == [[], []]
    assert found["on"] == ["insecure_nbd"]
    assert found["warnings"] == []


def test_xen_orchestras_client_reads_a_disk_over_tls(
    nbd_site: Site, disk: tuple[Vdi, bytes], xen_api: NodeProgram, tmp_path: Path
) -> None:
    """It starts TLS where the API tells of a certificate, which it sends as its own and does not verify."""
    vdi, content = disk
    tls = nbd_site.gateway.state_dir / "tls"
    for name, source in (("ca-cert", "ca"), ("server-cert", "server"), ("server-key", "server-key")):
        shutil.copy(tls / f"{source}.pem", tmp_path / f"{name}.pem")
    with Nbdkit(nbd_site, tmp_path, "--tls=require", f"--tls-certificates={tmp_path}") as server:
        found = xen_api(
            "nbd.mjs",
            nbd_site.gateway,
            vdi=vdi.ref,
            purpose="insecure_nbd",
            tls={"port": server.port, "cert": (tls / "server.pem").read_text()},
        )
    assert found["content"] == hashlib.sha256(content).hexdigest()
    assert found["warnings"] == []


class Nbdkit:
    """Another nbdkit in front of the gateway, on a port of its own of the loopback."""

    def __init__(self, site: Site, directory: Path, *options: str) -> None:
        self._ready = directory / "nbdkit.pid"
        self._log = directory / "nbdkit.log"
        self._site = site
        self._options = options
        self.port = 0

    def __enter__(self) -> "Nbdkit":
        control = self._site.gateway.state_dir / "access.sock"
        for self.port in range(20809, 20999):
            with self._log.open("wb") as log:
                command = ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(self.port), "-P", str(self._ready)]
                command += [*self._options, "python", str(ROOT / "nbd_plugin" / "plugin.py")]
                self._process = subprocess.Popen([*command, f"control={control}"], stdout=log, stderr=log)
            wait_until(lambda: self._ready.exists() or self._process.poll() is not None, "nbdkit")
            if self._process.poll() is None:
                return self
            assert "Address already in use" in self._log.read_text(), self._log.read_text()
        raise AssertionError("no port is free")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(10)


def test_xenservers_package_is_told_what_nbdcopy_then_reads(
    nbd_site: Site, disk: tuple[Vdi, bytes], tmp_path: Path
) -> None:
    vdi, content = disk
    session: Any = XenAPI.Session(nbd_site.gateway.url)
    session.login_with_password("root", nbd_site.gateway.password, "1.0", "tests")
    try:
        [info] = session.xenapi.VDI.get_nbd_info(vdi.ref)
        assert info["port"].isdigit()
        uri = f"nbd://{info['address']}:{info['port']}/{quote(info['exportname'], safe='')}"
        subprocess.run(["nbdcopy", uri, str(tmp_path / "copy")], check=True, timeout=60)
        assert (tmp_path / "copy").read_bytes() == content
        [(network, record)] = session.xenapi.network.get_all_records().items()
        assert record["purpose"] == ["insecure_nbd"]
        session.xenapi.network.add_purpose(network, "insecure_nbd")
        with pytest.raises(XenAPI.Failure) as refused:
            session.xenapi.network.add_purpose(network, "nbd")
        assert refused.value.details == ["NETWORK_INCOMPATIBLE_PURPOSES", "nbd", "insecure_nbd"]
    finally:
        session.logout()
        session("close")()
    # The export name is worth as much as the session.
    ended = subprocess.run(["nbdinfo", uri], capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode != 0
