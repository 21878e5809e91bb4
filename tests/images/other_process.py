"""Another process that locks files as our own gateways and QEMU do, for tests of who gets in whose way."""

import subprocess
import sys
from pathlib import Path

from gateway.images.file_locks import FileUse

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys
sys.path.insert(0, sys.argv[1])
from gateway.images.file_locks import FileInUse, FileUse, lock_file
for line in sys.stdin:
    use, path = line.rstrip("\\n").split(maxsplit=1)
    fd = os.open(path, os.O_RDONLY)
    try:
        lock_file(fd, FileUse[use], path)
    except FileInUse:
        os.close(fd)
        print("in use", flush=True)
    else:
        print("locked", flush=True)
"""


class OtherProcess:
    """It locks when told, and keeps its locks until it is ended."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-ISc", PROGRAM, str(ROOT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, use: FileUse, path: Path | str) -> str:
        """Have it lock a file: "locked" or "in use"."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(use.name, path, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
