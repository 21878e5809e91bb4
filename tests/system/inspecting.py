"""`vdi-gateway inspect --mount` as a process, and what an inspection must not leave behind."""

import selectors
import subprocess
from pathlib import Path

from tests.conftest import START_SECONDS, STOP_SECONDS, clean_environment, program
from tests.system.site import Site

PREFIX = "vdi-gateway-inspect-"


class Inspecting:
    """`vdi-gateway inspect --mount` as a process, on a directory of its own."""

    def __init__(self, site: Site, directory: Path, *arguments: str) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.before = left_behind()
        self._errors = directory.with_suffix(".errors")
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [
                    program(),
                    "inspect",
                    "--state-dir",
                    str(site.gateway.state_dir),
                    "--mount",
                    str(directory),
                    *arguments,
                ],
                stdout=subprocess.PIPE,
                stderr=errors,
                env=clean_environment(),
            )
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            assert selector.select(START_SECONDS), "inspect says nothing"
        self.said = self.process.stdout.readline().decode()
        assert "is mounted on" in self.said, self.errors()

    def errors(self) -> str:
        return self._errors.read_text()

    def ended(self) -> int:
        """The exit code, once it has ended; nothing must be left then."""
        code = self.process.wait(STOP_SECONDS)
        assert not is_mounted(self.directory)
        assert left_behind() <= self.before
        return code

    def mount_process(self) -> int:
        """The process that serves the files."""
        [child] = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(child)

    def end(self) -> None:
        """Take all away, whatever has happened."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        while is_mounted(self.directory):
            subprocess.run(["umount", "--lazy", str(self.directory)], check=True)


def is_mounted(directory: Path) -> bool:
    with open("/proc/self/mountinfo") as lines:
        return any(line.split(" ")[4].replace("\\040", " ") == str(directory) for line in lines)


def left_behind() -> set[str]:
    """Directories, mounts and loop devices of any inspection on this machine that has not ended."""
    base = Path("/run")
    found = {str(each) for each in base.iterdir() if each.name.startswith(PREFIX)}
    with open("/proc/self/mountinfo") as lines:
        found |= {line.split(" ")[4] for line in lines if PREFIX in line}
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            behind = file.read_text()
        except OSError:
            continue  # It has gone.
        if PREFIX in behind:
            found.add(behind)
    return found
