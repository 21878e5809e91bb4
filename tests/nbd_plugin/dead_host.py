"""A host that dies with a disk open: a network namespace with an NBD client, whose link is cut.

Nothing says then that the client has gone. It takes root and iproute2; who lacks them has the test skipped.
"""

import contextlib
import datetime
import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

HOLD = """
import sys, nbd
client = nbd.NBD()
client.set_export_name(sys.argv[3])
client.connect_tcp(sys.argv[1], sys.argv[2])
client.pwrite(bytes(512), 0)
print("held", flush=True)
sys.stdin.readline()
"""


class Host:
    """Another machine's network, of which `address` is our side."""

    def __init__(self, name: str) -> None:
        self.name = name
        # Of the addresses for tests between networks (RFC 2544): nobody else has them here.
        block = os.getpid() % 250
        self.address, self._theirs = f"198.18.{block}.1", f"198.18.{block}.2"
        self._process: subprocess.Popen[str] | None = None
        self.died = datetime.datetime.min

    def connect(self) -> None:
        _ip(
            "link",
            "add",
            f"{self.name}h",
            "type",
            "veth",
            "peer",
            "name",
            f"{self.name}c",
            "netns",
            self.name,
        )
        _ip("addr", "add", f"{self.address}/30", "dev", f"{self.name}h")
        _ip("link", "set", f"{self.name}h", "up")
        _ip("-n", self.name, "addr", "add", f"{self._theirs}/30", "dev", f"{self.name}c")
        _ip("-n", self.name, "link", "set", f"{self.name}c", "up")

    def hold(self, port: str, export: str) -> None:
        """Open a disk there, write to it, and keep it."""
        command = ["ip", "netns", "exec", self.name, "/usr/bin/python3", "-c", HOLD, self.address, port]
        self._process = subprocess.Popen(
            [*command, export], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "held\n"

    def die(self) -> None:
        _ip("-n", self.name, "link", "set", f"{self.name}c", "down")
        self.died = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)

    @property
    def holds(self) -> bool:
        """Whether the client believes still that it has the disk."""
        return self._process is not None and self._process.poll() is None

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


@contextlib.contextmanager
def another_host() -> Iterator[Host]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("namespaces are made by root, with iproute2")
    host = Host(f"vdi{os.getpid()}")
    made = subprocess.run(["ip", "netns", "add", host.name], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no network namespace can be made here: {made.stderr.strip()}")
    try:
        host.connect()
        yield host
    finally:
        host.close()
        _ip("netns", "del", host.name)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (arguments, done.stderr)
