"""The NBD servers that are measured against each other, each on a Unix socket of its own."""

import subprocess
import sys
from pathlib import Path

from scripts.benchmarks.harness.peers import ROOT, Peer, wait_for

PLUGIN = ROOT / "nbd_plugin" / "plugin.py"


class Server(Peer):
    """One server process; `uri` is what a client gives to reach it."""

    def __init__(self, socket: Path, *command: str | Path) -> None:
        socket.unlink(missing_ok=True)
        self.uri = f"nbd+unix:///?socket={socket}"
        self.process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=sys.stderr, text=True
        )
        wait_for(socket.exists, str(command[0]), self.process)


def plugin(socket: Path, control: Path, threads: int = 4) -> Server:
    """nbdkit with the gateway's plugin. A disk is named in the URI: `export`."""
    return _nbdkit(socket, threads, "python", PLUGIN, f"control={control}", "private=true")


def export(server: Server, vdi: str, *, write: bool = False) -> str:
    """The URI of a VDI of the gateway."""
    return server.uri.replace(":///", f":///{vdi}{'%3Fmode=rw' if write else ''}")


def file_plugin(socket: Path, file: Path, threads: int) -> Server:
    """nbdkit with its own plugin for files, which is written in C."""
    return _nbdkit(socket, threads, "file", file)


def _nbdkit(socket: Path, threads: int, *plugin_and_options: str | Path) -> Server:
    return Server(socket, "nbdkit", "-f", "-U", socket, "-t", str(threads), *plugin_and_options)


def qemu_nbd(socket: Path, file: Path, image_format: str, *, write: bool = False) -> Server:
    """qemu-nbd with as many connections as any client here makes."""
    mode = [] if write else ["--read-only"]
    command = ["qemu-nbd", "--persistent", "--shared=16", *mode, "-f", image_format]
    return Server(socket, *command, "-k", socket, file)
