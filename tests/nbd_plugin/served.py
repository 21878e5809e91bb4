"""A gateway that serves NBD, its processes, and the addresses under which clients reach its disks."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.conftest import RunningGateway
from tests.nbd_plugin.supervised import ended
from tests.system.site import Site, Vdi


class NbdSite(Site):
    """A gateway that serves NBD."""

    @property
    def control(self) -> Path:
        return self.gateway.state_dir / "nbd-control.sock"

    def info(self, vdi: Vdi) -> dict[str, str]:
        info, *_ = self.gateway.call("VDI.get_nbd_info", vdi.ref)
        return dict(info)

    def uri(self, vdi: Vdi, *, write: bool = False, scheme: str = "nbd", query: str = "") -> str:
        """With a session, over the network."""
        info = self.info(vdi)
        name = info["exportname"].removeprefix("/") + ("&mode=rw" if write else "")
        return f"{scheme}://{info['address']}:{info['port']}/{quote(name, safe='')}{query}"

    def private_uri(self, vdi: Vdi, *, write: bool = False) -> str:
        name = quote(vdi.uuid + ("?mode=rw" if write else ""), safe="")
        return f"nbd+unix:///{name}?socket={self.gateway.state_dir / 'nbd.sock'}"

    def supervisors(self) -> list[int]:
        """The supervisor's process, found by its state directory."""
        found = []
        for each in Path("/proc").iterdir():
            if each.name.isdigit():
                with contextlib.suppress(OSError):
                    command = (each / "cmdline").read_bytes().split(b"\0")
                    if str(self.gateway.state_dir).encode() in command and any(
                        part.endswith(b"/supervisor.py") for part in command
                    ):
                        found.append(int(each.name))
        # A child that is about to become nbdkit has its parent's command line still.
        return [each for each in found if not ended(each) and parent(each) not in found]

    def workers(self) -> list[int]:
        """The nbdkit processes of all its supervisors, of dead ones too."""
        known = (self.gateway.state_dir / "nbd-workers").read_text().split()[::2]
        return [int(each) for each in known if not ended(int(each))]

    def sweep(self) -> None:
        """Nothing survives the test."""
        left = [*self.supervisors(), *self.workers()]
        for each in left:
            with contextlib.suppress(OSError):
                os.kill(each, signal.SIGKILL)


@contextlib.contextmanager
def serving(directory: Path, *arguments: str) -> Iterator[NbdSite]:
    gateway = RunningGateway(directory, arguments or ("--nbd", "127.0.0.1:0"))
    gateway.start()
    site = NbdSite(gateway, directory / "sr")
    try:
        yield site
    finally:
        try:
            if gateway.running:
                gateway.stop()
        finally:
            gateway.kill()
            site.sweep()


def run(*command: str | Path) -> str:
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def filled(site: NbdSite, tmp_path: Path, size: int) -> tuple[Vdi, Path]:
    """A disk of random bytes, and these in a file."""
    vdi = site.create_vdi(size)
    content = tmp_path / "content.raw"
    content.write_bytes(os.urandom(size))
    run("nbdcopy", "--flush", content, site.private_uri(vdi, write=True))
    return vdi, content


def pending(site: NbdSite, vdi: Vdi) -> list[str]:
    """The tasks of those who have the disk open over NBD."""
    records: dict[str, Any] = site.gateway.call("task.get_all_records")
    return [
        ref
        for ref, record in records.items()
        if record["status"] == "pending"
        and record["name_label"].startswith("nbd ")
        and vdi.uuid in record["name_description"]
    ]


def answers(site: NbdSite, vdi: Vdi) -> bool:
    done = subprocess.run(["nbdinfo", "--size", site.private_uri(vdi)], capture_output=True, check=False)
    return done.returncode == 0


def public_workers(site: NbdSite) -> list[int]:
    return [each for each in site.workers() if "private=false" in command_line(each)]


def command_line(process: int) -> list[str]:
    """Empty once it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text().split("\0")
    except OSError:
        return []


def parent(process: int) -> int | None:
    """None once it has ended."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
