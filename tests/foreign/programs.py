"""Programs that use libraries of others: each runs by itself, is asked in JSON and answers in JSON."""

import json
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import RunningGateway

OPENSTACK_PYTHON = Path(__file__).parent / ".venv" / "bin" / "python"
NGINX = Path(__file__).parent / "nginx" / "usr" / "sbin" / "nginx"
SECONDS = 30


@dataclass(frozen=True)
class NodeProgram:
    """Runs the programs in `directory`, whose libraries are beside them."""

    directory: Path

    def __call__(
        self,
        program: str,
        gateway: RunningGateway,
        *,
        transport: str = "auto",
        scheme: str = "http",
        **asked: Any,
    ) -> dict[str, Any]:
        """What `program` found. Over https it trusts the gateway's own authority and verifies its name."""
        request = {
            "url": gateway.url if scheme == "http" else gateway.https_url,
            "user": "root",
            "password": gateway.password,
            "transport": transport,
            **asked,
        }
        environment = {**os.environ, "NODE_EXTRA_CA_CERTS": str(gateway.ca_file)}
        return answer_of(["node", str(self.directory / program)], request, environment)


def answer_of(
    command: list[str], asked: dict[str, Any], environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Runs `command` with `asked` as its input; what it answers. AssertionError if it fails or stands still.

    It gets a process group of its own: a child that it left behind would keep its output open for ever.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    with process:
        try:
            answered, said = process.communicate(json.dumps(asked), timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"{command} stood still for {SECONDS} seconds") from None
    assert process.returncode == 0, f"{command} ended with {process.returncode}:\n{answered}\n{said}"
    answer: dict[str, Any] = json.loads(answered)
    return answer
