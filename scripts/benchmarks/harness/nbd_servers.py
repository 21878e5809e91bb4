"""The NBD servers that are measured against each other, each on a Unix socket of its own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.benchmarks.harness.peers import ROOT, Peer, wait_for

PLUGIN = ROOT / "nbd_plugin" / "plugin.py"


class Server(Peer):
    """One server process; `uri` is what a client gives to reach it."""

    def __init__(self, socket: Path, command: Sequence[str | Path], uri: str) -> None:
        socket.unlink(missing_ok=True)
        self.uri = uri
        self.process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=sys.stderr, text=True
        )
        wait_for(socket.exists, str(command[0]), self.process)

    def resident(self) -> int:
        """The bytes of memory that the server has now."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def plugin(socket: Path, control: Path, threads: int = 4) -> Server:
    """nbdkit with the gateway's plugin. A disk is named in the URI: `export`."""
    command = ["nbdkit", "-f", "-U", socket, "-t", str(threads), "python", PLUGIN]
    return Server(socket, [*command, f"control={control}", "private=true"], f"nbd+unix:///?socket={socket}")


def export(server: Server, vdi: str, *, write: bool = False) -> str:
    """The URI of a VDI of the gateway."""
    return server.uri.replace(":///", f":///{vdi}{'%3Fmode=rw' if write else ''}")


def file_plugin(socket: Path, file: Path, threads: int) -> Server:
    """nbdkit with its own plugin for files, which is written in C."""
    command = ["nbdkit", "-f", "-U", socket, "-t", str(threads), "file", file]
    return Server(socket, command, f"nbd+unix:///?socket={socket}")


def qemu_nbd(socket: Path, file: Path, image_format: str, *, write: bool = False) -> Server:
    """qemu-nbd with as many connections as any client here makes."""
    mode = [] if write else ["--read-only"]
    command = ["qemu-nbd", "--persistent", "--shared=16", *mode, "-f", image_format, "-k", socket, file]
    return Server(socket, command, f"nbd+unix:///?socket={socket}")
