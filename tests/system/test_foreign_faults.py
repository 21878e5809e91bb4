"""Images that qemu-img reads, and a gateway that is killed meanwhile, or an SR that is full."""

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.system.clients import curl, upload_with_curl
from tests.system.site import MIB, Site, Vdi, stored_content, wait_until

Maker = Callable[[int], Path]


@dataclass(frozen=True)
class Held:
    """A qemu-img that stops itself in one of its commands, as long as `at` says which."""

    at: Path
    process: Path

    def wait(self) -> int:
        """Its process, once it has stopped."""
        wait_until(self.process.exists, "qemu-img to be started")
        pid = int(self.process.read_text())
        status = Path(f"/proc/{pid}/stat")
        wait_until(lambda: status.read_text().rpartition(")")[2].split()[0] == "T", "it to stop")
        return pid


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Held:
    """For all gateways that are started from now on."""
    real = shutil.which("qemu-img")
    assert real is not None
    programs = tmp_path / "programs"
    programs.mkdir()
    held = Held(programs / "at", programs / "process")
    held.at.write_text("never")
    script = programs / "qemu-img"
    script.write_text(f"""#!/bin/sh
if [ "$1" = "$(cat {held.at})" ]; then
  echo $$ >{held.process}.new
  mv {held.process}.new {held.process}
  kill -STOP $$
fi
exec {real} "$@"
""")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return held


def image_of(source: Path, form: str, *options: str) -> Path:
    image = source.with_suffix(f".{form}")
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", form, *options, source, image], check=True)
    return image


@pytest.mark.parametrize(
    ("command", "form"),
    [
        ("map", "qcow2"),
        pytest.param("check", "qcow2", marks=pytest.mark.long),
        pytest.param("convert", "vhdx", marks=pytest.mark.long),
    ],
)
def test_a_killed_gateway_takes_qemu_img_with_it_and_leaves_nothing(
    command: str, form: str, held: Held, own_site: Site, random_file: Maker
) -> None:
    site, vdi, old = own_site, own_site.create_vdi(8 * MIB), random_file(8 * MIB)
    new = random_file(8 * MIB)
    image, task = image_of(new, form), site.create_task()
    assert upload_with_curl(old, site.import_url(vdi)).success
    held.at.write_text(command)
    url = site.import_url(vdi, task_id=task, format=form)
    with subprocess.Popen(["curl", "-s", "-T", str(image), url], stdout=subprocess.DEVNULL) as upload:
        process = held.wait()
        assert any(name.endswith(".image") for name in site.staged_files())
        site.gateway.kill()
        wait_until(lambda: not Path(f"/proc/{process}").exists(), "qemu-img to end")
        assert upload.wait() != 0
    assert stored_content(vdi) == old.read_bytes()
    held.at.write_text("never")
    site.gateway.start()
    assert site.staged_files() == []
    record = site.finished_task(task)
    assert (record["status"], record["error_info"][0]) == ("failure", "TASK_INTERRUPTED")
    assert stored_content(vdi) == old.read_bytes()
    outcome = upload_with_curl(image, site.import_url(vdi, format=form))
    assert outcome.success, outcome.said
    assert stored_content(vdi) == new.read_bytes()


def test_a_cancelled_import_ends_a_qemu_img_that_answers_nothing(
    held: Held, own_site: Site, random_file: Maker
) -> None:
    site, vdi = own_site, own_site.create_vdi(8 * MIB)
    image, task = image_of(random_file(8 * MIB), "qcow2"), site.create_task()
    held.at.write_text("map")
    url = site.import_url(vdi, task_id=task, format="qcow2")
    with subprocess.Popen(["curl", "-s", "-T", str(image), url], stdout=subprocess.DEVNULL) as upload:
        process = held.wait()
        site.gateway.call("task.cancel", task)
        assert site.finished_task(task)["status"] == "cancelled"
        assert upload.wait() != 0
    assert not Path(f"/proc/{process}").exists()
    assert site.staged_files() == []
    assert stored_content(vdi) == bytes(8 * MIB)


@dataclass(frozen=True)
class Small:
    """An SR of 40 MiB with a VDI of 64 MiB that has some content."""

    site: Site
    directory: Path
    vdi: Vdi
    before: bytes

    def is_refused_for_space(self, image: Path, form: str) -> None:
        site, task = self.site, self.site.create_task()
        outcome = upload_with_curl(image, site.import_url(self.vdi, task_id=task, format=form))
        assert not outcome.success
        record = site.finished_task(task)
        assert (record["status"], record["error_info"][0]) == ("failure", "SR_FULL"), record
        assert os.listdir(self.directory / ".vdi-gateway" / "staging") == []
        length = len(self.before)
        assert curl("-r", f"0-{length - 1}", site.export_url(self.vdi)).stdout == self.before


@pytest.fixture
def small(own_site: Site, small_file_system: Path, random_file: Maker) -> Small:
    directory = small_file_system / "sr"
    vdi = own_site.create_vdi(64 * MIB, "vhd", (own_site.create_repository(directory), directory))
    before = random_file(3 * MIB)
    assert upload_with_curl(before, own_site.import_url(vdi)).success
    return Small(own_site, directory, vdi, before.read_bytes())


def test_a_full_sr_takes_no_image_and_keeps_what_it_has(
    small: Small, random_file: Maker, tmp_path: Path
) -> None:
    large, middle = random_file(60 * MIB), random_file(22 * MIB)
    compressible = tmp_path / "compressible"
    compressible.write_bytes(b"\x5a" * 60 * MIB)
    small.is_refused_for_space(image_of(large, "vpc", "-o", "force_size=on"), "vhd")
    # There is no room for the image; for the image but not for its disk; nor for what a small one becomes.
    small.is_refused_for_space(image_of(large, "qcow2"), "qcow2")
    small.is_refused_for_space(image_of(middle, "qcow2"), "qcow2")
    small.is_refused_for_space(image_of(compressible, "qcow2", "-c"), "qcow2")
    small.is_refused_for_space(image_of(middle, "vhdx"), "vhdx")
    after = random_file(8 * MIB)
    outcome = upload_with_curl(image_of(after, "qcow2"), small.site.import_url(small.vdi, format="qcow2"))
    assert outcome.success, outcome.said
    assert curl("-r", f"0-{8 * MIB - 1}", small.site.export_url(small.vdi)).stdout == after.read_bytes()
    small.site.gateway.stop()  # the file system can be unmounted then
