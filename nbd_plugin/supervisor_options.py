"""What the supervisor is told on its command line, and what it looks for on this machine."""

import argparse
import os
import pwd
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any, Final

from nbd_plugin.supervisor_log import LEVELS
from nbd_plugin.worker import SEARCH_PATH, Identity

LINGER_SECONDS: Final = 60.0
GRACE_SECONDS: Final = 10.0
HANDSHAKE_SECONDS: Final = 30.0
PACKAGES: Final = "nbdkit and nbdkit-plugin-python"


class Refused(Exception):  # noqa: N818  it says what happened
    """The supervisor can't begin: why, and what to do where that is known.

    `kind` is `missing` (a program is not installed), `listen` (the address can't be had), `running` (there is
    one already) or `other`.
    """

    def __init__(self, text: str, *, kind: str = "other") -> None:
        super().__init__(text)
        self.kind: Final = kind


@dataclass(frozen=True, slots=True)
class Options:
    """Times are seconds. `access` is the gateway's control socket for workers that run as `user`.

    `handshake` is how long a client may take until it has opened a disk; 0: any time. `stay`: never end by
    itself. `parallel`: see the plugin's `thread_model`. `ready_fd` is where to say in JSON that clients are
    answered, or why not.
    """

    state_dir: str
    host: str
    port: int
    insecure: bool
    parallel: bool
    workers: int
    clients: int
    handshake: float
    tls: str | None
    user: str | None
    access: str | None
    plugin: str | None
    stay: bool
    linger: float
    grace: float
    version: str
    log_level: str
    ready_fd: int | None

    @property
    def shared(self) -> dict[str, Any]:
        """What a gateway compares with what it wants; certificates can be exchanged, all else can't."""
        return {
            "host": self.host,
            "port": self.port,
            "insecure": self.insecure,
            "parallel": self.parallel,
            "workers": self.workers,
            "clients": self.clients,
            "tls": self.tls is not None,
            "user": self.user,
            "version": self.version,
        }


def read_arguments(arguments: list[str]) -> Options:
    """The options. What can't be read ends the process with a message: the gateway gives them, not people."""
    parser = argparse.ArgumentParser(prog="supervisor.py", allow_abbrev=False)
    parser.add_argument("--state-dir", required=True)
    parser.add_argument("--listen", required=True, metavar="HOST:PORT")
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument("--parallel", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--clients", type=int, default=0)
    parser.add_argument("--handshake", type=float, default=HANDSHAKE_SECONDS)
    parser.add_argument("--tls")
    parser.add_argument("--user")
    parser.add_argument("--access")
    parser.add_argument("--plugin")
    parser.add_argument("--stay", action="store_true")
    parser.add_argument("--linger", type=float, default=LINGER_SECONDS)
    parser.add_argument("--grace", type=float, default=GRACE_SECONDS)
    parser.add_argument("--version", default="")
    parser.add_argument("--log-level", choices=LEVELS, default=LEVELS[0])
    parser.add_argument("--ready-fd", type=int)
    given = parser.parse_args(arguments)
    host, _, port = given.listen.rpartition(":")
    if not port.isdecimal():
        parser.error(f"--listen: {given.listen!r} is no HOST:PORT")
    return Options(
        state_dir=os.path.abspath(given.state_dir),
        host=host.removeprefix("[").removesuffix("]"),
        port=int(port),
        insecure=given.insecure,
        parallel=given.parallel,
        workers=given.workers,
        clients=given.clients,
        handshake=given.handshake,
        tls=given.tls,
        user=given.user,
        access=given.access,
        plugin=given.plugin,
        stay=given.stay,
        linger=given.linger,
        grace=given.grace,
        version=given.version,
        log_level=given.log_level,
        ready_fd=given.ready_fd,
    )


def find_nbdkit() -> str:
    """The path of nbdkit, which has its plugin for Python. Raises Refused."""
    path = shutil.which("nbdkit", path=SEARCH_PATH)
    if path is not None:
        asked = subprocess.run(  # noqa: S603
            [path, "--dump-config"], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
        settings = dict(line.partition("=")[::2] for line in asked.stdout.splitlines())
        if os.path.exists(os.path.join(settings.get("plugindir", ""), "nbdkit-python-plugin.so")):
            return path
    raise Refused(
        f"{'nbdkit is' if path is None else 'its plugin for Python is'} not installed; scripts/setup installs"
        f" the Debian packages {PACKAGES}",
        kind="missing",
    )


def find_user(name: str | None) -> Identity | None:
    """The user that workers run as; None without a name. Raises Refused."""
    if name is None:
        return None
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        raise Refused(f"there is no user {name!r} on this machine") from None
    return Identity(found.pw_uid, found.pw_gid)
