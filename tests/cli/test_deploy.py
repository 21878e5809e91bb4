"""vdi-deploy against a running gateway that fetches from nginx; qemu-img judges what became of it."""

import gzip
import hashlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from tests.cli.conftest import house_in
from tests.cli.test_copy import image_of
from tests.cli.test_transfers import error, lines
from tests.conftest import RunningGateway, clean_environment, program
from tests.foreign.programs import NGINX
from tests.images.disks import qemu_compare
from tests.transfers.pull_server import Connection, Request, file_of, serving

MIB = 1 << 20
SIZE = 32 * MIB
START_SECONDS = 30.0
_NGINX = """
daemon off; master_process off; pid {0}/pid; error_log {0}/error.log;
events {{}}
http {{
    access_log {0}/access.log;
    client_body_temp_path {0}/t1; proxy_temp_path {0}/t2; fastcgi_temp_path {0}/t3;
    uwsgi_temp_path {0}/t4; scgi_temp_path {0}/t5;
    server {{
        listen 127.0.0.1:{1};
        listen 127.0.0.1:{2} ssl;
        ssl_certificate {0}/cert.pem;
        ssl_certificate_key {0}/key.pem;
        root {0}/files;
        location /moved/ {{ rewrite ^/moved/(.*)$ /$1 redirect; }}
        location /inside/ {{ return 302 http://169.254.169.254/latest/meta-data/; }}
        location /private/ {{ auth_basic "x"; auth_basic_user_file {0}/users; alias {0}/files/; }}
        location /slow/ {{ limit_rate 200k; alias {0}/files/; }}
    }}
}}
"""


class Site:
    """An image server with files in all forms, over HTTP and HTTPS."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = directory / "files"
        self.files.mkdir(parents=True)
        ports = []
        for _ in range(2):
            with socket.create_server(("127.0.0.1", 0)) as listener:
                ports.append(listener.getsockname()[1])
        self.http, self.https = f"http://127.0.0.1:{ports[0]}", f"https://127.0.0.1:{ports[1]}"
        authority = trustme.CA()
        self.ca = directory / "ca.pem"
        authority.cert_pem.write_to_path(str(self.ca))
        certificate = authority.issue_cert("127.0.0.1")
        (directory / "cert.pem").write_bytes(b"".join(each.bytes() for each in certificate.cert_chain_pems))
        certificate.private_key_pem.write_to_path(str(directory / "key.pem"))
        (directory / "users").write_text("me:{PLAIN}s@cret\n")
        (directory / "nginx.conf").write_text(_NGINX.format(directory, *ports))
        # One process does all, so that none runs as another user.
        self.process = subprocess.Popen(
            [str(NGINX), "-p", str(directory), "-c", str(directory / "nginx.conf")],
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + START_SECONDS
        while True:
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", ports[0])):
                    break
            assert self.process.poll() is None, (directory / "error.log").read_text()
            assert time.monotonic() < deadline

    def asked(self, name: str) -> int:
        """How often the file was asked for: up to now, as a request tells that comes after all others."""
        log, mark = self.directory / "access.log", f"/mark-{time.monotonic_ns()}"
        subprocess.run(["curl", "-s", "-o", os.devnull, self.http + mark], check=True)
        deadline = time.monotonic() + START_SECONDS
        while mark not in (text := log.read_text()):
            assert time.monotonic() < deadline
        return text.count(f"/{name} ")

    def fill(self) -> None:
        """A disk of 32 MiB with 3 MiB of data, in several forms, and their checksums."""
        raw = self.files / "disk.raw"
        with raw.open("wb") as file:
            for offset in (0, 9 * MIB, 31 * MIB):
                file.seek(offset)
                file.write(os.urandom(MIB))
        for form, name in (("qcow2", "disk.qcow2"), ("vmdk", "disk.vmdk"), ("vpc", "disk.vhd")):
            more = ["-o", "force_size=on"] if form == "vpc" else []
            command = ["qemu-img", "convert", "-f", "raw", "-O", form, *more, str(raw)]
            subprocess.run([*command, str(self.files / name)], check=True)
        # As an image of its own, which no other test fetches.
        command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=128k", str(raw)]
        subprocess.run([*command, str(self.files / "gold.qcow2")], check=True)
        for tool in ("xz -k1", "zstd -qk"):
            subprocess.run([*tool.split(), str(raw)], check=True)
        (self.files / "disk.qcow2.gz").write_bytes(gzip.compress((self.files / "disk.qcow2").read_bytes(), 1))
        sums = subprocess.run(
            ["sha256sum", *sorted(path.name for path in self.files.iterdir())],
            cwd=self.files,
            capture_output=True,
            check=True,
        )
        (self.files / "SHA256SUMS").write_bytes(sums.stdout)

    def checksum(self, name: str) -> str:
        return hashlib.sha256((self.files / name).read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"))
    try:
        site.fill()
        yield site
    finally:
        site.process.terminate()
        site.process.wait(30)


@pytest.fixture(scope="module")
def house(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """A gateway that may fetch from the loopback."""
    config = f'[pull]\nfrom = ["127.0.0.1"]\nca = "{site.ca}"\n[limits]\ntransfer_idle = "5s"\n'
    with house_in(tmp_path_factory.mktemp("house"), config) as running:
        yield running


def staging(house: RunningGateway) -> list[Path]:
    return list((house.state_dir.parent / "disks" / ".vdi-gateway" / "staging").iterdir())


NAMES = "disk.raw disk.raw.xz disk.raw.zst disk.qcow2 disk.qcow2.gz disk.vmdk disk.vhd"


@pytest.mark.parametrize("name", NAMES.split())
def test_an_image_becomes_a_disk(house: RunningGateway, site: Site, name: str) -> None:
    done = house.run("vdi-deploy", f"{site.http}/{name}", "--checksum", site.checksum(name))
    assert done.returncode == 0, done
    (uuid,) = done.stdout.split()
    qemu_compare(image_of(house, "disks", uuid), "vpc", site.files / "disk.raw", "raw")
    last = lines(done)[-1]
    size = (site.files / name).stat().st_size
    assert (last["operation"], last["state"], last["bytes"], last["total"]) == ("deploy", "done", size, size)
    (ref,) = [house.call("VDI.get_by_uuid", uuid)]
    assert house.call("VDI.get_name_label", ref) == name
    assert staging(house) == []


def test_clones_share_the_bytes_and_the_image_is_fetched_once(house: RunningGateway, site: Site) -> None:
    arguments = ("sr=disks", "name=web", f"checksum-url={site.http}/SHA256SUMS", "--quiet")
    before = site.asked("moved/gold.qcow2")
    done = house.run("vdi-deploy", f"{site.http}/moved/gold.qcow2", *arguments, "--clones", "2")
    assert (done.returncode, done.stderr) == (0, ""), done
    gold, one, two = done.stdout.split()
    done = house.run("vdi-deploy", f"{site.http}/moved/gold.qcow2", *arguments, "clones=1", "--json")
    made = json.loads(done.stdout)
    assert (made["uuid"], made["reused"], len(made["clones"])) == (gold, True, 1)
    assert site.asked("moved/gold.qcow2") == before + 1
    three = made["clones"][0]["uuid"]
    for number, uuid in enumerate((one, two, three), start=1):
        assert house.call("VDI.get_name_label", house.call("VDI.get_by_uuid", uuid)) == f"web-{number}"
        out = house.state_dir.parent / f"{uuid}.raw"
        assert house.run("vdi-export", uuid, str(out), "--quiet").returncode == 0
        assert out.read_bytes() == (site.files / "disk.raw").read_bytes()
        assert image_of(house, "disks", uuid).stat().st_size < MIB
    done = house.run("vdi-deploy", f"{site.http}/gold.qcow2", *arguments, "--fresh")
    assert done.stdout.strip() not in (gold, one, two, three, "")


def test_https_and_a_password_that_nobody_reads(house: RunningGateway, site: Site) -> None:
    url = f"{site.https}/private/disk.qcow2".replace("//", "//me:s%40cret@")
    done = house.run("vdi-deploy", url)
    assert done.returncode == 0, done
    ref = house.call("VDI.get_by_uuid", done.stdout.strip())
    assert house.call("VDI.get_other_config", ref)["pulled-from"] == (
        f"{site.https}/private/disk.qcow2".replace("//", "//***@")
    )
    done = house.run("vdi-deploy", url.replace("cret", "wrong-cret") + "?sig=deadbeef")
    said = error(done)
    assert "answers with the status 401" in said
    assert f"{site.https}/private/disk.qcow2?***".replace("//", "//***@") in said
    everything = house.log() + json.dumps(house.call("task.get_all_records"), default=str)
    for secret in ("s%40cret", "s@cret", "wrong", "deadbeef", "bWU6"):
        assert secret not in everything


def test_what_goes_wrong_is_told_in_one_line_and_leaves_nothing(house: RunningGateway, site: Site) -> None:
    before = house.run("vdi-list", "--minimal").stdout
    for arguments, code, expected in (
        ((f"{site.http}/none",), 1, "status 404"),
        ((f"{site.http}/inside/x",), 1, "the address of a cloud's metadata service"),
        (("http://[::1]:9/x",), 1, "is at ::1, a loopback address"),
        (("http://localhost:1/x",), 1, "Connection refused"),
        ((f"{site.http}/disk.raw", "--checksum", "0" * 64), 1, "should have the checksum sha256:000"),
        ((f"{site.http}/disk.raw", "--checksum-url", f"{site.http}/disk.raw"), 1, "too long"),
        ((f"{site.http}/SHA256SUMS", "--checksum-url", f"{site.http}/SHA256SUMS"), 1, "none of its lines"),
        ((f"{site.http}/disk.raw", "--format", "vmdk"), 1, "IMPORT_ERROR_"),
        ((f"{site.http}/disk.raw", "nowhere"), 1, "there is no SR 'nowhere'"),
        (("disk.raw",), 2, "vdi-import takes files"),
        (("ftp://a/b",), 2, "http://"),
        (("http://a b/",), 1, "no spaces"),
        ((f"{site.http}/disk.raw", "--format", "iso"), 2, "iso"),
        ((f"{site.http}/disk.raw", "--checksum", "md5:1"), 1, "sha256: and 64 digits"),
        ((f"{site.http}/disk.raw", "--checksum", "1", "--checksum-url", "http://a/"), 2, "one of them"),
        ((f"{site.http}/disk.raw", "--checksum", "http://a/"), 2, "--checksum-url"),
        ((f"{site.http}/disk.raw", "--checksum-url", "abc"), 2, "--checksum-url"),
        ((f"{site.http}/disk.raw", "--clones", "-1"), 2, "--clones"),
        ((f"{site.http}/disk.raw", "--clones", "many"), 2, "clones"),
        ((f"{site.http}/disk.raw", "chekcsum=1"), 2, "did you mean checksum=?"),
    ):
        said = error(house.run("vdi-deploy", *arguments), code=code)
        assert expected in said, (arguments, said)
    assert house.run("vdi-list", "--minimal").stdout == before
    assert staging(house) == []


def test_a_url_with_an_equals_sign_is_no_key(house: RunningGateway, site: Site) -> None:
    done = house.run("vdi-deploy", f"{site.http}/disk.qcow2?a=b&c=d", "sr=disks", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")


def test_an_interrupted_deployment_is_cancelled_and_leaves_nothing(house: RunningGateway, site: Site) -> None:
    before = house.run("vdi-list", "--minimal").stdout
    tasks = set(house.call("task.get_by_name_label", "Async.VDI.import_from_url"))
    process = subprocess.Popen(
        [program(), "vdi-deploy", f"{site.http}/slow/disk.raw", "--quiet"],
        env={**clean_environment(), "VDI_GATEWAY_STATE_DIR": str(house.state_dir)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + START_SECONDS
    while True:
        assert time.monotonic() < deadline
        new = set(house.call("task.get_by_name_label", "Async.VDI.import_from_url")) - tasks
        told = house.call("task.get_other_config", next(iter(new))) if new else {}
        if int(told.get("bytes-pulled", 0)) > 0:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out, said) == (130, "", "interrupted\n")
    assert house.call("task.get_status", new.pop()) == "cancelled"
    assert house.run("vdi-list", "--minimal").stdout == before
    assert staging(house) == []


def test_a_server_that_is_killed_and_comes_back_is_gone_on_with(house: RunningGateway, site: Site) -> None:
    data = (site.files / "disk.raw").read_bytes()
    whole = file_of(data)
    broken = threading.Event()

    def handler(request: Request, connection: Connection) -> None:
        if broken.is_set():
            whole(request, connection)
            return
        broken.set()
        connection.head(Content_Length=len(data), ETag='"v1"')
        connection.send(data[: 5 * MIB])

    with serving(handler) as server:
        checksum = site.checksum("disk.raw")
        done = house.run("vdi-deploy", server.url, "--quiet", "--fresh", "--checksum", checksum)
        assert done.returncode == 0, done
        assert server.requests[1].headers["range"] == f"bytes={5 * MIB}-"
    qemu_compare(image_of(house, "disks", done.stdout.strip()), "vpc", site.files / "disk.raw", "raw")


def test_after_a_kill_nothing_is_left_and_the_task_says_so(site: Site, tmp_path: Path) -> None:
    with house_in(tmp_path, '[pull]\nfrom = ["127.0.0.1"]\n') as house:
        sr = house.call("SR.get_all")[0]
        task = house.call("Async.VDI.import_from_url", f"{site.http}/slow/disk.raw", sr)
        deadline = time.monotonic() + START_SECONDS
        while not staging(house):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        house.kill()
        house.start()
        assert staging(house) == []
        assert house.call("VDI.get_all") == []
        # Whether the task's work comes back is known after a while only.
        house.call("task.cancel", task)
        assert house.call("task.get_status", task) in ("cancelled", "failure")


def test_the_rules_are_read_anew_and_without_them_nothing_private_is_fetched(
    site: Site, tmp_path: Path
) -> None:
    with house_in(tmp_path) as house:
        said = error(house.run("vdi-deploy", f"{site.http}/disk.qcow2"))
        assert "pull.from" in said
        assert "PULL_ERROR_ADDRESS_REFUSED" in said
        (house.state_dir / "config.toml").write_text('[pull]\nfrom = ["127.0.0.0/8"]\n')
        house.signal(signal.SIGHUP)
        deadline = time.monotonic() + START_SECONDS
        while "configuration reloaded" not in house.log():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert house.run("vdi-deploy", f"{site.http}/disk.qcow2", "--quiet").returncode == 0
        assert "PULL_ERROR_CERTIFICATE" in error(house.run("vdi-deploy", f"{site.https}/disk.qcow2"))
