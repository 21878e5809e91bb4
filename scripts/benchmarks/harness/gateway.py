"""The gateway as a contestant: the installed `vdi-gateway serve`, with one SR on disk and one in memory.

What is set up goes through XML-RPC and the small commands, as a user would do it; what is measured is curl.
"""

import base64
import http.client
import json
import subprocess
import sys
import time
import xmlrpc.client
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from scripts.benchmarks.harness.peers import Peer, answers, wait_for

PROGRAM = Path(sys.executable).with_name("vdi-gateway")


class Gateway(Peer):
    """A running gateway. `seconds_to_answer` is the time from its start to its first HTTP answer."""

    def __init__(self, directory: Path, disk: Path, memory: Path) -> None:
        self.state = directory / "state"
        directory.mkdir(parents=True)
        self._log = (directory / "log").open("w")
        start = time.perf_counter()
        self.process = subprocess.Popen(
            [
                str(PROGRAM),
                "serve",
                "--state-dir",
                str(self.state),
                "--http=127.0.0.1:0",
                "--https=127.0.0.1:0",
                "--nbd=off",
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            text=True,
        )
        wait_for((self.state / "gateway.json").exists, "vdi-gateway", self.process)
        addresses: dict[str, Any] = json.loads((self.state / "gateway.json").read_text())
        self.http, self.https = str(addresses["http"][0]), str(addresses["https"][0])
        port = int(self.http.rpartition(":")[2].rstrip("/"))
        wait_for(lambda: answers(port), "vdi-gateway", self.process)
        self._api: Any = xmlrpc.client.ServerProxy(self.http)
        password = (self.state / "admin-password").read_text().strip()
        self.session = self._call("session.login_with_password", "root", password)
        self.seconds_to_answer = time.perf_counter() - start
        self.directories = {"disk": disk, "memory": memory}
        self.repositories = {name: self._create_sr(name, path) for name, path in self.directories.items()}

    def _call(self, method: str, *parameters: Any) -> Any:
        answer = getattr(self._api, method)(*parameters)
        if answer["Status"] != "Success":
            raise RuntimeError(f"{method}: {answer['ErrorDescription']}")
        return answer["Value"]

    def _create_sr(self, name: str, path: Path) -> str:
        done = subprocess.run(
            [str(PROGRAM), "sr-create", "--state-dir", str(self.state), "--name", name, str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"sr-create: {done.stderr}")
        return str(self._call("SR.get_by_name_label", self.session, name)[0])

    def create_vdi(self, repository: str, size: int, image_format: str = "vhd") -> str:
        """A new VDI's uuid. `image_format` is "vhd" or "raw"."""
        record = {
            "name_label": "bench",
            "name_description": "",
            "SR": self.repositories[repository],
            "virtual_size": str(size),
            "type": "user",
            "sharable": False,
            "read_only": False,
            "other_config": {},
            "sm_config": {"image-format": image_format} if image_format == "raw" else {},
        }
        return str(self._call("VDI.get_uuid", self.session, self._call("VDI.create", self.session, record)))

    def destroy_vdi(self, uuid: str) -> None:
        self._call("VDI.destroy", self.session, self._call("VDI.get_by_uuid", self.session, uuid))

    def fork(self, operation: str, uuid: str) -> str:
        """The uuid of a new snapshot or clone."""
        vdi = self._call("VDI.get_by_uuid", self.session, uuid)
        return str(
            self._call("VDI.get_uuid", self.session, self._call(f"VDI.{operation}", self.session, vdi))
        )

    def enable_cbt(self, uuid: str) -> None:
        """Track changed blocks of a VDI from now on."""
        self._call("VDI.enable_cbt", self.session, self._call("VDI.get_by_uuid", self.session, uuid))

    def changed_blocks(self, older: str, newer: str) -> tuple[float, bytes]:
        """One bit for each 64 KiB that may differ between two VDIs, and the seconds until all of it had come.

        What it takes xmlrpc.client to read an answer of megabytes isn't counted: others are faster.
        """
        pair = [self._call("VDI.get_by_uuid", self.session, uuid) for uuid in (older, newer)]
        asked = xmlrpc.client.dumps((self.session, *pair), "VDI.list_changed_blocks")
        parts = urlsplit(self.http)
        assert parts.hostname is not None
        with closing(http.client.HTTPConnection(parts.hostname, parts.port)) as connection:
            connection.connect()
            start = time.perf_counter()
            connection.request("POST", "/", asked, {"Content-Type": "text/xml"})
            told = connection.getresponse().read()
            seconds = time.perf_counter() - start
        ((answer,), _) = xmlrpc.client.loads(told)
        assert isinstance(answer, dict), answer
        return seconds, base64.b64decode(str(answer["Value"]))

    def has_parent(self, uuid: str) -> bool:
        vdi = self._call("VDI.get_by_uuid", self.session, uuid)
        return "vhd-parent" in self._call("VDI.get_sm_config", self.session, vdi)

    def coalesces(self) -> list[dict[str, Any]]:
        """The records of all tasks that merge images."""
        tasks: dict[str, dict[str, Any]] = self._call("task.get_all_records", self.session)
        return [task for task in tasks.values() if task["name_label"] == "coalesce"]

    def put_url(self, uuid: str, *, tls: bool = False) -> str:
        return f"{self._base(tls)}/import_raw_vdi?vdi={uuid}&session_id={self.session}"

    def get_url(self, uuid: str, *, tls: bool = False) -> str:
        return f"{self._base(tls)}/export_raw_vdi?vdi={uuid}&session_id={self.session}"

    def image(self, repository: str, uuid: str) -> Path:
        """The file of a VDI, whichever its format."""
        paths = self.directories[repository].glob(f"{uuid}.*")
        return next(path for path in paths if path.suffix in {".vhd", ".raw"})

    @property
    def certificate(self) -> tuple[Path, Path, Path]:
        """The server's chain and key and the authority that clients trust, as PEM files."""
        tls = self.state / "tls"
        return tls / "server.pem", tls / "server-key.pem", tls / "ca.pem"

    def peak_memory(self) -> int:
        """The largest resident size so far, in bytes, of the gateway's process."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("no VmHWM in /proc")

    def _base(self, tls: bool) -> str:
        return (self.https.replace("127.0.0.1", "localhost") if tls else self.http).rstrip("/")
