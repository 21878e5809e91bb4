"""The NBD servers that are measured against each other, each at an address of its own."""

import subprocess
import sys
from pathlib import Path

from scripts.benchmarks.harness.peers import ROOT, Peer, answers, wait_for

PLUGIN = ROOT / "nbd_plugin" / "plugin.py"


Address = Path | int
"""Where a server listens: a Unix socket, or a port of TCP on loopback."""


class Server(Peer):
    """One server process; `uri` is what a client gives to reach it, for its export without a name."""

    def __init__(self, address: Address, *command: str | Path) -> None:
        if isinstance(address, Path):
            address.unlink(missing_ok=True)
        self._address = address
        self.uri = self.uri_of("")
        self.process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=sys.stderr, text=True
        )
        wait_for(self._is_ready, str(command[0]), self.process)

    def uri_of(self, export_name: str) -> str:
        """The URI of an export, whose name is quoted already."""
        if isinstance(self._address, Path):
            return f"nbd+unix:///{export_name}?socket={self._address}"
        return f"nbd://127.0.0.1:{self._address}/{export_name}"

    def _is_ready(self) -> bool:
        return self._address.exists() if isinstance(self._address, Path) else answers(self._address)


def plugin(address: Address, control: Path, parallel: bool = False) -> Server:
    """nbdkit with the gateway's plugin. A disk is named in the URI: `export`."""
    parameters = (f"control={control}", "private=true", f"parallel={str(parallel).lower()}")
    return _nbdkit(address, 4, "python", PLUGIN, *parameters)


def export(server: Server, vdi: str, *, write: bool = False) -> str:
    """The URI of a VDI of the gateway."""
    return server.uri_of(f"{vdi}%3Fmode=rw" if write else vdi)


def file_plugin(address: Address, file: Path, threads: int) -> Server:
    """nbdkit with its own plugin for files, which is written in C."""
    return _nbdkit(address, threads, "file", file)


def _nbdkit(address: Address, threads: int, *plugin_and_options: str | Path) -> Server:
    listen = _listen(address, unix="-U", host="-i")
    return Server(address, "nbdkit", "-f", *listen, "-t", str(threads), *plugin_and_options)


def qemu_nbd(address: Address, file: Path, image_format: str, *, write: bool = False) -> Server:
    """qemu-nbd with as many connections as any client here makes."""
    mode = [] if write else ["--read-only"]
    command = ["qemu-nbd", "--persistent", "--shared=16", *mode, "-f", image_format]
    return Server(address, *command, *_listen(address, unix="-k", host="-b"), file)


def _listen(address: Address, *, unix: str, host: str) -> list[str]:
    """The options of a server that has these for a Unix socket and for a host."""
    if isinstance(address, Path):
        return [unix, str(address)]
    return [host, "127.0.0.1", "-p", str(address)]
