"""The peers of the HTTP benchmark: nginx, ovirt-imageio and the bare receiver, each run in its best setting.

Every peer listens on loopback on a port of its own, keeps all its files under the directory it is given, and
is ended by its process id. A peer that can't be had says why in
`PeerUnavailableError`; no figure is invented for it.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parents[3]


class PeerUnavailableError(Exception):
    """The peer can't be measured here; the text says why."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(
    condition: Callable[[], bool], what: str, process: subprocess.Popen[str], seconds: float = 15
) -> None:
    """Polls until `condition` holds; RuntimeError when the process ends first or time is up."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            raise RuntimeError(f"{what} ended with {process.returncode} before it was ready")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} was not ready within {seconds} s")
        time.sleep(0.02)


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


class Peer:
    """A process that ends with the `with` block."""

    process: subprocess.Popen[str]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process, by force if it takes too long."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def resident(self) -> int:
        """The bytes of memory that the process has now."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


class Nginx(Peer):
    """nginx with WebDAV PUT and static GET on one directory, over HTTP and, given a certificate, HTTPS.

    Its buffers are larger than its defaults and `tcp_nopush` is off because that is what it is fastest with
    over loopback. Below `/read/` the same files are read instead of sent by sendfile, which is faster on
    some machines. Its temporary files lie beside the target, so that its PUT ends in a rename as ours.
    """

    def __init__(self, directory: Path, certificate: Path | None = None, key: Path | None = None) -> None:
        program = ROOT / "tests" / "foreign" / "nginx" / "usr" / "sbin" / "nginx"
        if not program.exists():
            raise PeerUnavailableError("nginx is not there; scripts/setup --tests brings it")
        if b"http_dav_module" not in subprocess.run([program, "-V"], capture_output=True, check=True).stderr:
            raise PeerUnavailableError(f"{program} was built without http_dav_module")
        self.files = directory / "files"
        for name in ("files", "body", "other"):
            (directory / name).mkdir(parents=True)
        self.port = free_port()
        tls = ""
        self.tls_port = 0
        if certificate and key:
            self.tls_port = free_port()
            tls = (
                f"listen 127.0.0.1:{self.tls_port} ssl;"
                f"ssl_certificate {certificate}; ssl_certificate_key {key};"
                "ssl_protocols TLSv1.2 TLSv1.3; ssl_buffer_size 16k;"
            )
        other = directory / "other"
        configuration = directory / "nginx.conf"
        configuration.write_text(
            f"""
            daemon off; {"user root;" if os.geteuid() == 0 else ""} worker_processes 2; pid {other}/pid;
            error_log {other}/error.log warn;
            events {{ worker_connections 64; }}
            http {{
              access_log off; sendfile on; tcp_nopush off; output_buffers 2 512k;
              client_max_body_size 0; client_body_temp_path {directory}/body; client_body_buffer_size 1m;
              proxy_temp_path {other}/p; fastcgi_temp_path {other}/f; uwsgi_temp_path {other}/u;
              scgi_temp_path {other}/s;
              server {{
                listen 127.0.0.1:{self.port}; {tls}
                root {self.files};
                location / {{ dav_methods PUT DELETE; }}
                location /read/ {{ alias {self.files}/; sendfile off; }}
              }}
            }}
            """
        )
        self.process = subprocess.Popen(
            [program, "-p", str(other), "-e", str(other / "error.log"), "-c", str(configuration)],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            text=True,
        )
        wait_for(lambda: answers(self.port), "nginx", self.process)
        version = subprocess.run([program, "-v"], capture_output=True, check=True, text=True).stderr
        self.version = version.strip().rpartition(": ")[2]

    def url(self, name: str, *, tls: bool = False) -> str:
        return f"https://localhost:{self.tls_port}/{name}" if tls else f"http://127.0.0.1:{self.port}/{name}"


class BareReceiver(Peer):
    """Reads and throws away: the most that one receiving thread can do."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("receiver.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"


class Imageio(Peer):
    """The ovirt-imageio daemon with one ticket for one file, over plain HTTP and its Unix socket.

    Installed from PyPI into `build/benchmarks/imageio` at first use: it is no dependency of the gateway. Its
    file backend opens the file with O_DIRECT and flushes at the end of an upload: its answer means durable.
    """

    def __init__(self, directory: Path, target: Path, size: int) -> None:
        self._python = _imageio_python()
        self.target = target
        directory.mkdir(parents=True)
        (directory / "conf.d").mkdir()
        self.port = free_port()
        self.socket = directory / "local.sock"
        control = directory / "control.sock"
        ticket = directory / "ticket.json"
        ticket.write_text(
            json.dumps(
                {
                    "uuid": "bench",
                    "size": size,
                    "url": f"file://{target}",
                    "timeout": 36000,
                    "sparse": True,
                    "ops": ["read", "write"],
                }
            )
        )
        (directory / "conf.d" / "daemon.conf").write_text(
            f"[daemon]\nsystemd_enable = false\ndrop_privileges = false\nrun_dir = {directory}\n"
            f"[tls]\nenable = false\n[remote]\nhost = 127.0.0.1\nport = {self.port}\n"
            f"[local]\nsocket = {self.socket}\n[control]\ntransport = unix\nsocket = {control}\n"
            "[handlers]\nkeys = stderr\n[logger_root]\nlevel = WARNING\nhandlers = stderr\n"
        )
        self.process = subprocess.Popen(
            [str(self._python.with_name("ovirt-imageio")), "-c", str(directory), "-t", str(ticket)],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            text=True,
        )
        self.url = f"http://127.0.0.1:{self.port}/images/bench"
        wait_for(lambda: answers(self.port), "ovirt-imageio", self.process)
        with urllib.request.urlopen(urllib.request.Request(self.url, method="OPTIONS")) as answer:
            answer.read()
        self.version = subprocess.run(
            [str(self._python), "-c", "from ovirt_imageio._internal import version; print(version.string)"],
            capture_output=True,
            check=True,
            text=True,
        ).stdout.strip()

    def upload_with_its_client(self, source: Path) -> float:
        """Seconds of `ovirt_imageio.client.upload` (four connections), without its interpreter's start."""
        program = (
            "import sys, time; from ovirt_imageio import client; start = time.perf_counter();"
            "client.upload(sys.argv[1], sys.argv[2], None, secure=False); print(time.perf_counter() - start)"
        )
        done = subprocess.run(
            [str(self._python), "-c", program, str(source), self.url],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise PeerUnavailableError(f"ovirt-imageio's client failed: {done.stderr.strip()[-300:]}")
        return float(done.stdout)


def _imageio_python() -> Path:
    environment = ROOT / "build" / "benchmarks" / "imageio"
    python = environment / "bin" / "python"
    if not (environment / "bin" / "ovirt-imageio").exists():
        for command in (
            ["/usr/bin/python3", "-m", "venv", str(environment)],
            [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "ovirt-imageio"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise PeerUnavailableError(
                    f"ovirt-imageio could not be installed: {done.stderr.strip()[-300:]}"
                )
    return python
