"""A supervisor of its own, with workers that need no gateway, and the processes that belong to it."""

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[2]
SUPERVISOR = ROOT / "nbd_plugin" / "supervisor.py"
TINY_PLUGIN = Path(__file__).with_name("tiny_plugin.py")
START_SECONDS = 30


class Supervised:
    """`with Supervised(directory) as supervisor:`; what is left of it is killed at the end."""

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        plugin: Path | None = TINY_PLUGIN,
        port: int = 0,
        program: Path = SUPERVISOR,
    ) -> None:
        self.state = directory / "state"
        self.state.mkdir(mode=0o700, exist_ok=True)
        self._log = directory / f"supervisor-{len(list(directory.iterdir()))}.log"
        command = [sys.executable, "-I", "-S", str(program), "--state-dir", str(self.state)]
        command += ["--listen", f"127.0.0.1:{port}"]
        command += ["--plugin", str(plugin)] if plugin is not None else []
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self.ready = self._ready_line()
        self._seen: set[int] = set()
        self.port = int(self.ready.split()[2].rpartition(":")[2]) if self.ready else 0
        self.workers()

    def __enter__(self) -> "Supervised":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seen = self._seen | set(self.workers())
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        for worker in seen:
            with contextlib.suppress(OSError):
                if b"nbdkit" in Path(f"/proc/{worker}/cmdline").read_bytes():
                    os.kill(worker, signal.SIGKILL)

    def _ready_line(self) -> str:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(START_SECONDS):
                return ""
        return self.process.stdout.readline().decode().strip()

    def log(self) -> str:
        return self._log.read_text()

    def workers(self) -> list[int]:
        """The processes of its workers that run, in the order of their start."""
        try:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        except OSError:
            return []
        found = [int(each) for each in children.split() if not ended(int(each))]
        self._seen |= set(found)
        return found

    @property
    def uri(self) -> str:
        return f"nbd://127.0.0.1:{self.port}/"

    @property
    def private_uri(self) -> str:
        return f"nbd+unix:///?socket={self.state / 'nbd.sock'}"

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.process.wait(30)


def ended(process: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in {"Z", "X"}


def eventually(condition: object, what: str, seconds: float = 30) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.02)
