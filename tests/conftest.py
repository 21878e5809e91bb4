"""The real gateway as a process: `vdi-gateway serve` on free ports of the loopback, with its own state.

The trap that is closed here: where CI is set, pytest explains two images that differ line by line, for hours.
"""

import contextlib
import gc
import io
import os
import re
import selectors
import signal
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, settings

from gateway.cli.main import run

START_SECONDS = 30
STOP_SECONDS = 30
MOST_EXPLAINED = 4096

# How long an example takes says how busy the machine is.
settings.register_profile("any load", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any load")

# A shell that starts the tests in the background has them ignore Ctrl-C, and their child processes with them.
signal.signal(signal.SIGINT, signal.default_int_handler)


def log_plainly() -> None:
    """As structlog does by itself, but for its tracebacks: it colours the source and shows all variables."""
    structlog.reset_defaults()
    processors = structlog.get_config()["processors"][:-1]
    plain = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[*processors, plain])


log_plainly()


class RunningGateway:
    """One state directory, and the gateway process on it. `restart` keeps the state but not the ports."""

    def __init__(self, directory: Path, arguments: tuple[str, ...] = ()) -> None:
        self.state_dir = directory / "state"
        self.arguments = arguments
        self.url = ""
        self.https_url = ""
        self._log_file = directory / "gateway.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._session: str | None = None

    @property
    def password(self) -> str:
        return (self.state_dir / "admin-password").read_text().strip()

    @property
    def ca_file(self) -> Path:
        return self.state_dir / "tls" / "ca.pem"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the gateway isn't running"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """Everything the gateway has written to stderr so far, over all its restarts."""
        return self._log_file.read_text() if self._log_file.exists() else ""

    def command(self, *arguments: str, **kwargs: Any) -> "subprocess.CompletedProcess[str]":
        """Runs `vdi-gateway ARGUMENTS` with this gateway's state directory in the environment."""
        environment = {**clean_environment(), "VDI_GATEWAY_STATE_DIR": str(self.state_dir)}
        return subprocess.run(
            [program(), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env=environment,
            **kwargs,
        )

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """As `command`, in this process; see `run_here`."""
        where = () if "--url" in arguments else ("--state-dir", str(self.state_dir))
        return run_here(*arguments, *where)

    def start(self) -> None:
        assert not self.running, "the gateway is running already"
        self._session = None
        with self._log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    program(),
                    "serve",
                    "--state-dir",
                    str(self.state_dir),
                    "--http",
                    "127.0.0.1:0",
                    "--https",
                    "127.0.0.1:0",
                    # Several gateways run at a time, and few tests need it.
                    *(() if "--nbd" in self.arguments else ("--nbd", "off")),
                    *self.arguments,
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=clean_environment(),
            )
        ready = self._ready_line()
        urls = re.findall(r"(https?)(://\S+)", ready)
        if not urls:
            self.kill()
            raise AssertionError(f"no ready line but {ready!r}; the log says:\n{self.log()}")
        # The first address of each kind; more may come from the arguments.
        addresses = {scheme: scheme + rest for scheme, rest in reversed(urls)}
        self.url, self.https_url = addresses["http"], addresses["https"]

    def _ready_line(self) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            deadline = time.monotonic() + START_SECONDS
            line = b""
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    break
                piece = os.read(self._process.stdout.fileno(), 4096)
                if not piece:
                    break
                line += piece
        return line.decode()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code, once the process has ended."""
        assert self._process is not None
        code = self._process.wait(STOP_SECONDS)
        if self._process.stdout is not None:
            self._process.stdout.close()
        return code

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """SIGKILL: nothing is cleaned up."""
        if self.running:
            self.signal(signal.SIGKILL)
        self.wait()

    def restart(self) -> None:
        if self.running:
            self.stop()
        self.start()

    def clear(self) -> None:
        """Let it run without an SR, for the next test: tasks, users and the log stay."""
        if not self.running:
            self.start()
        for uuid in filter(None, self.run("sr-list", "--minimal").stdout.strip().split(",")):
            done = self.run("sr-forget", uuid)
            assert done.returncode == 0, done

    def call(self, method: str, *parameters: Any) -> Any:
        """One XML-RPC call in a session of the administrator; AssertionError carries the ErrorDescription."""
        with xmlrpc.client.ServerProxy(self.url) as proxy:
            if self._session is None:
                self._session = result_of(proxy.session.login_with_password("root", self.password))
            return result_of(getattr(proxy, method)(self._session, *parameters))

    @property
    def session(self) -> str:
        """A session reference of the administrator."""
        if self._session is None:
            self.call("host.get_all")
        assert self._session is not None
        return self._session


def run_here(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """`vdi-gateway ARGUMENTS` in this process, which begins sooner than another one.

    Not for what is proved about processes: signals, the streams and their ends, memory.
    """
    told, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(said):
        code = run(arguments)
    return subprocess.CompletedProcess(arguments, code, told.getvalue(), said.getvalue())


def result_of(answer: Any) -> Any:
    assert answer["Status"] == "Success", answer
    return answer["Value"]


def program() -> str:
    return str(Path(sys.executable).parent / "vdi-gateway")


def clean_environment() -> dict[str, str]:
    """Without what would change the command; Python's buffering of output is as its users have it."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("VDI_GATEWAY_") and name != "PYTHONUNBUFFERED"
    }


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """The modules and thousands of tests stay: nobody needs to look for garbage among them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_assertrepr_compare(
    config: pytest.Config, left: object, right: object
) -> Generator[None, list[list[str] | None], list[list[str] | None]]:
    """Of long bytes that differ, only the first difference is told.

    With -v, or with one of these variables set, pytest lets difflib compare all lines of how they are told:
    1 MiB takes longer than any test may, and so the test seems to stand still.
    """
    long = any(isinstance(side, bytes | bytearray) and len(side) > MOST_EXPLAINED for side in (left, right))
    if not long:
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CI", raising=False)
        patch.delenv("BUILD_NUMBER", raising=False)
        patch.setattr(config.option, "verbose", min(0, config.option.verbose))
        return (yield)


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[RunningGateway]:
    """A running gateway; it is stopped at the end, and its log must be free of tracebacks."""
    running = RunningGateway(tmp_path)
    running.start()
    try:
        yield running
    finally:
        if running.running:
            try:
                running.stop()
            finally:
                running.kill()
    assert "Traceback" not in running.log()
