"""One gateway and one nbdkit with the plugin per worker process, and the clients' addresses of its disks.

The trap: a client's connection may end after the client. A lease that must be free is waited for.
"""

import importlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest

from tests.conftest import RunningGateway
from tests.system.site import Site, Vdi, wait_until

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "nbd_plugin" / "plugin.py"
# Of Debian's interpreter, which the virtual environment is made from.
SYSTEM_MODULES = Path("/usr/lib/python3/dist-packages")
MAY_TRIM = 1


class Nbd:
    """nbdkit with the plugin on a Unix socket, in front of a gateway."""

    def __init__(
        self,
        site: Site,
        directory: Path,
        *parameters: str,
        private: bool = True,
        parallel: bool = True,
        options: Sequence[str] = ("-t", "4"),
        filters: Sequence[str] = (),
    ) -> None:
        self.site = site
        self.socket = directory / "nbd.sock"
        self._log = directory / "nbdkit.log"
        ready = directory / "nbdkit.pid"
        ready.unlink(missing_ok=True)
        self.socket.unlink(missing_ok=True)
        control = site.gateway.state_dir / "access.sock"
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                ["nbdkit", "-f", "-U", str(self.socket), "-P", str(ready), *options]
                + [f"--filter={name}" for name in filters]
                + [
                    "python",
                    str(PLUGIN),
                    f"control={control}",
                    f"private={str(private).lower()}",
                    f"parallel={str(parallel).lower()}",
                    *parameters,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(lambda: ready.exists() or self.process.poll() is not None, "nbdkit")
        assert self.process.poll() is None, self.log()

    def uri(self, vdi: Vdi | str, *, write: bool = False, session: str | None = None) -> str:
        name = vdi if isinstance(vdi, str) else vdi.uuid
        given = [f"session_id={session}"] if session else []
        given += ["mode=rw"] if write else []
        if given:
            name += "?" + "&".join(given)
        return f"nbd+unix:///{quote(name, safe='')}?socket={self.socket}"

    def log(self) -> str:
        return self._log.read_text()

    def connect(self, libnbd: Any, vdi: Vdi, *, write: bool = False, session: str | None = None) -> Any:
        """A connection of libnbd, which checks nothing itself: what is refused is refused by the server."""
        handle = libnbd.NBD()
        handle.add_meta_context(libnbd.CONTEXT_BASE_ALLOCATION)
        handle.set_strict_mode(0)
        handle.connect_uri(self.uri(vdi, write=write, session=session))
        return handle

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.terminate()
        try:
            return self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()


def run(*command: str | Path, code: int = 0) -> str:
    """The output of a program, which must end with that exit code."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == code, (command, done.returncode, done.stdout, done.stderr)
    return done.stdout


@pytest.fixture(scope="session")
def libnbd() -> Any:
    """libnbd's Python module, which Debian packages for its own interpreter: ours is the same."""
    if not (SYSTEM_MODULES / "nbd.py").exists():
        pytest.skip("python3-libnbd is not installed")
    sys.path.append(str(SYSTEM_MODULES))
    try:
        import nbd
    finally:
        sys.path.remove(str(SYSTEM_MODULES))
    return nbd


@pytest.fixture(scope="session")
def shared_nbd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nbd]:
    directory = tmp_path_factory.mktemp("nbd")
    gateway = RunningGateway(directory)
    gateway.state_dir.mkdir(mode=0o700)
    # Refusals are waited for in several tests.
    (gateway.state_dir / "config.toml").write_text('[limits]\nlease_wait = "1s"\n')
    gateway.start()
    try:
        nbd = Nbd(Site(gateway, directory / "sr"), directory)
        try:
            yield nbd
        finally:
            assert nbd.stop() == 0, nbd.log()
    finally:
        gateway.stop()
    assert "Traceback" not in gateway.log(), gateway.log()


@pytest.fixture(scope="module")
def own_nbd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nbd]:
    """A gateway, to be killed and started again, and an nbdkit of the module's own."""
    directory = tmp_path_factory.mktemp("own")
    gateway = RunningGateway(directory)
    gateway.start()
    try:
        nbd = Nbd(Site(gateway, directory / "sr"), directory)
        try:
            yield nbd
        finally:
            nbd.stop()
    finally:
        gateway.stop()
    assert "Traceback" not in gateway.log(), gateway.log()


@pytest.fixture
def nbd(shared_nbd: Nbd) -> Nbd:
    assert shared_nbd.process.poll() is None, shared_nbd.log()
    return shared_nbd


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The plugin as nbdkit has it, but for nbdkit: `plugin.nbdkit.export_name` is to be set."""
    nbdkit = SimpleNamespace(
        FLAG_MAY_TRIM=MAY_TRIM,
        FLAG_FUA=2,
        FLAG_REQ_ONE=4,
        FLAG_FAST_ZERO=8,
        EXTENT_HOLE=1,
        EXTENT_ZERO=2,
        THREAD_MODEL_PARALLEL=3,
        set_error=lambda _number: None,
    )
    monkeypatch.setitem(sys.modules, "nbdkit", nbdkit)
    monkeypatch.delitem(sys.modules, "nbd_plugin.plugin", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield importlib.import_module("nbd_plugin.plugin")
    del sys.modules["nbd_plugin.plugin"]
