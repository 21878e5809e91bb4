"""Runs a program of util-linux: without a shell, in limits of time, memory and output, in English.

Knows nothing of what the programs say. The trap: a program that reads a file of a FUSE mount may wait in the
kernel, where even SIGKILL doesn't reach it before the mount answers or ends; it is left behind then, and the
caller hears of it in time all the same.
"""

import errno
import os
import selectors
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

# Debian keeps most of them where a user's PATH doesn't lead.
_SYSTEM_PATHS: Final = "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"
_PIECE: Final = 64 << 10
_DYING_SECONDS: Final = 2.0

PARSER_MEMORY: Final = 256 << 20
"""Bytes that a program may take which reads what a guest has written: a GPT can claim to be of any length."""


class ProgramError(OSError):
    """The program isn't there, takes too long, says too much or crashed; `strerror` says which."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended: its exit code, standard output and standard error."""

    program: str
    code: int
    output: bytes
    messages: bytes

    @property
    def complaint(self) -> str:
        """The line on standard error that begins with the program's name, else the last one."""
        lines = [line.strip() for line in self.messages.decode("utf-8", "replace").splitlines()]
        own = [line for line in lines if line.startswith(f"{self.program}: ")]
        said = (own or [line for line in lines if line][-1:] or [f"exit code {self.code}"])[0]
        return said.removeprefix(f"{self.program}: ")


def program_path(name: str) -> str:
    """Where a program is. ProgramError (ENOENT) if it isn't installed."""
    found = shutil.which(name) or shutil.which(name, path=_SYSTEM_PATHS)
    if found is None:
        raise ProgramError(errno.ENOENT, f"the program {name} is missing")
    return found


def run_program(
    arguments: Sequence[str],
    *,
    seconds: float,
    most: int = 1 << 20,
    memory: int | None = None,
    descriptors: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Run a program to its end, which must come within `seconds`, with `most` bytes on either output. Blocks.

    It gets `memory` bytes of address space at most, if that is given.

    `descriptors` are its to use, by the same numbers. It is in a process group of its own, so that Ctrl-C
    doesn't end what is cleaning up. Raises ProgramError: ENOENT not installed, ETIMEDOUT, EFBIG, EIO crashed.
    """
    command = [program_path(arguments[0]), *arguments[1:]]
    if memory is not None:
        command = [program_path("prlimit"), f"--as={memory}", "--", *command]
    process = subprocess.Popen(  # noqa: S603 - no shell, a program that we chose
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=descriptors,
        env={"PATH": os.environ.get("PATH", _SYSTEM_PATHS), **(environment or {}), "LC_ALL": "C"},
        process_group=0,
        bufsize=0,
    )
    try:
        output, messages = _read(process, arguments[0], time.monotonic() + seconds, most)
    finally:
        end_process(process, 0.0)
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()
    if process.returncode < 0:
        raise ProgramError(errno.EIO, f"{arguments[0]} was ended by signal {-process.returncode}")
    return Ended(arguments[0], process.returncode, output, messages)


def end_process(process: "subprocess.Popen[bytes]", grace: float) -> bool:
    """After `grace` seconds a process is killed; False if it has not ended even so. Blocks."""
    for seconds in (grace, _DYING_SECONDS):
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return True
        process.kill()
    return False


def _read(process: "subprocess.Popen[bytes]", name: str, deadline: float, most: int) -> tuple[bytes, bytes]:
    """Both outputs until the process has ended; what it leaves running may keep them open for longer."""
    assert process.stdout is not None
    assert process.stderr is not None
    streams = (process.stdout.fileno(), process.stderr.fileno())
    said = {stream: bytearray() for stream in streams}
    ended = os.pidfd_open(process.pid)
    try:
        with selectors.DefaultSelector() as selector:
            for descriptor in (*streams, ended):
                selector.register(descriptor, selectors.EVENT_READ)
            while True:
                left = deadline - time.monotonic()
                ready = [key.fd for key, _ in selector.select(max(0.0, left))]
                if not ready and left <= 0:
                    raise ProgramError(errno.ETIMEDOUT, f"{name} took too long")
                for stream in streams:
                    if stream not in ready:
                        continue
                    piece = os.read(stream, _PIECE)
                    if not piece:
                        selector.unregister(stream)
                    said[stream] += piece
                    if len(said[stream]) > most:
                        raise ProgramError(errno.EFBIG, f"{name} says too much")
                if ready == [ended]:
                    process.wait()
                    return bytes(said[streams[0]]), bytes(said[streams[1]])
    finally:
        os.close(ended)
