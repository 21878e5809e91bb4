"""A running gateway with an SR, seen the way an uploader and an administrator see it.

Knows the wire and the files of the SR, nothing of the gateway's code. What is in an image file is read by
libvhdi and QEMU, never by our own reader.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pyvhdi

from tests.conftest import RunningGateway

MIB = 1 << 20
DONE = ("success", "failure", "cancelled")


@dataclass(frozen=True)
class Vdi:
    ref: str
    uuid: str
    size: int
    file: Path


class Site:
    def __init__(self, gateway: RunningGateway, directory: Path) -> None:
        self.gateway = gateway
        self.directory = directory
        self.repository = self.create_repository(directory)

    def create_repository(self, directory: Path) -> str:
        """A new SR in `directory`; its reference."""
        directory.mkdir(exist_ok=True)
        name = f"SR in {directory}"
        done = self.gateway.run("sr-create", str(directory), "--name", name)
        assert done.returncode == 0, done.stderr
        [reference] = self.gateway.call("SR.get_by_name_label", name)
        return str(reference)

    def create_vdi(
        self, size: int = 4 * MIB, image_format: str = "vhd", repository: tuple[str, Path] | None = None
    ) -> Vdi:
        """An empty VDI; `repository` is the reference and the directory of another SR than the usual one."""
        sr, directory = repository or (self.repository, self.directory)
        reference = self.gateway.call(
            "VDI.create",
            {
                "name_label": "system test",
                "name_description": "",
                "SR": sr,
                "virtual_size": str(size),
                "type": "user",
                "sharable": False,
                "read_only": False,
                "other_config": {},
                "sm_config": {"image-format": "raw"} if image_format == "raw" else {},
            },
        )
        uuid = self.gateway.call("VDI.get_uuid", reference)
        file = directory / f"{uuid}.{image_format}"
        assert file.exists()
        return Vdi(reference, uuid, int(self.gateway.call("VDI.get_virtual_size", reference)), file)

    def create_task(self, label: str = "upload") -> str:
        return str(self.gateway.call("task.create", label, ""))

    def task(self, reference: str) -> dict[str, Any]:
        record: dict[str, Any] = self.gateway.call("task.get_record", reference)
        return record

    def finished_task(self, reference: str, seconds: float = 30) -> dict[str, Any]:
        """The task's record once it has finished."""
        wait_until(lambda: self.task(reference)["status"] in DONE, f"task {reference} to finish", seconds)
        return self.task(reference)

    def wait_for_progress(self, reference: str, at_least: float) -> None:
        wait_until(
            lambda: (
                float(self.task(reference)["progress"]) >= at_least or self.task(reference)["status"] in DONE
            ),
            f"task {reference} to reach {at_least}",
        )
        record = self.task(reference)
        assert record["status"] == "pending", record

    def import_url(self, vdi: Vdi | None, /, *, scheme: str = "http", path: str = "", **query: str) -> str:
        """With the administrator's session; `query` adds and overrides parameters, "" leaves one out."""
        return self._url("/import_raw_vdi" + path, vdi, scheme, query)

    def export_url(self, vdi: Vdi | None, /, *, scheme: str = "http", path: str = "", **query: str) -> str:
        return self._url("/export_raw_vdi" + path, vdi, scheme, query)

    def _url(self, path: str, vdi: Vdi | None, scheme: str, query: dict[str, str]) -> str:
        parameters = {"session_id": self.gateway.session, "vdi": vdi.uuid if vdi else "", **query}
        base = self.gateway.https_url if scheme == "https" else self.gateway.url
        given = urlencode({name: value for name, value in parameters.items() if value})
        return f"{base.rstrip('/')}{path}?{given}"

    def staged_files(self) -> list[str]:
        staging = self.directory / ".vdi-gateway" / "staging"
        return os.listdir(staging) if staging.exists() else []


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    """The pauses grow, since what is asked is often a gateway, whose time it takes."""
    deadline, pause = time.monotonic() + seconds, 0.01
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
        time.sleep(pause)
        pause = min(1.5 * pause, 0.2)


def unplugged(gateway: RunningGateway, pbd: str) -> bool:
    """Unplug; False while what was destroyed before is being tidied up."""
    try:
        gateway.call("PBD.unplug", pbd)
    except AssertionError as refused:
        assert "VDI_IN_USE" in str(refused)
        return False
    return True


def nodes(site: Site) -> dict[str, str | None]:
    """The images of the SR by uuid, with what they stand on, as the records say."""
    records = site.gateway.call("VDI.get_all_records").values()
    return {
        record["uuid"]: record["sm_config"].get("vhd-parent")
        for record in records
        if record["SR"] == site.repository
    }


def stored_content(vdi: Vdi) -> bytes:
    """What the file of a VHD or raw VDI holds, read by libvhdi or as it is."""
    if vdi.file.suffix == ".raw":
        return vdi.file.read_bytes()
    image = pyvhdi.file()
    image.open(str(vdi.file))
    try:
        assert image.get_media_size() == vdi.size
        content: bytes = image.read(vdi.size)
        return content
    finally:
        image.close()


def qemu_compare(raw: Path, vdi: Vdi) -> None:
    """AssertionError with QEMU's words when it doesn't read the same bytes from both files."""
    image_format = "vpc" if vdi.file.suffix == ".vhd" else "raw"
    done = subprocess.run(
        ["qemu-img", "compare", "-f", "raw", "-F", image_format, str(raw), str(vdi.file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def depth(site: Site, vdi: Vdi) -> int:
    """How many images the chains of a VDI's tree have, at most."""
    nodes = json.loads(site.gateway.command("vdi-chain", vdi.uuid, "--json").stdout)
    return max(int(node["depth"]) for node in nodes)


def assert_whole(site: Site, vdi: Vdi) -> None:
    checked = site.gateway.command("vhd-check", str(vdi.file))
    assert checked.returncode == 0, checked.stdout + checked.stderr
