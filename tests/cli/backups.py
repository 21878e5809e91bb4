"""A disk that is written to and backed up, with the bytes that each generation has to have.

What is in a backup is read by qemu-img, never by our own reader.
"""

import json
import random
import struct
import subprocess
from pathlib import Path
from typing import Any

from tests.conftest import RunningGateway

MIB = 1 << 20
_PIECE = struct.Struct("<QI")


class BackedUpDisk:
    """`plain` is what the disk holds, `kept` what each generation (by number) has to hold."""

    def __init__(
        self,
        house: RunningGateway,
        tmp_path: Path,
        *,
        size: int = 16 * MIB,
        data: int = 5 * MIB,
        seed: int = 1,
    ) -> None:
        self.house = house
        self.rng = random.Random(seed)
        self.tmp_path = tmp_path
        self.directory = tmp_path / "backups"
        self.uuid = self.command("vdi-create", f"disk-{tmp_path.name}", str(size)).stdout.strip()
        self.plain = bytearray(size)
        self.kept: dict[int, bytes] = {}
        self.write(data, 64 << 10)

    def write(self, *lengths: int) -> None:
        """Random bytes of these lengths at random places, at once."""
        pieces = b""
        for length in lengths or (self.rng.randrange(1, 3 * MIB), 512, 70_000):
            offset = self.rng.randrange(0, len(self.plain) - length)
            data = self.rng.randbytes(length)
            pieces += _PIECE.pack(offset, length) + data
            self.plain[offset : offset + length] = data
        self.put(pieces + bytes(_PIECE.size), "format=chunked")

    def command(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return self.house.run(*arguments)

    def put(self, content: bytes, *arguments: str) -> None:
        file = self.tmp_path / "pieces"
        file.write_bytes(content)
        done = self.command("vdi-import", self.uuid, str(file), "--quiet", *arguments)
        assert done.returncode == 0, done

    def backup(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return self.command("vdi-backup", self.uuid, str(self.directory), *arguments)

    def backed_up(self, *arguments: str) -> int:
        """Make a backup that must succeed; its number."""
        done = self.backup(*arguments)
        assert done.returncode == 0, done
        number = int(done.stdout)
        self.kept[number] = bytes(self.plain)
        return number

    @property
    def manifest(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.directory / "manifest.json").read_text())
        return document

    def file(self, number: int) -> Path:
        [name] = [each["file"] for each in self.manifest["generations"] if each["number"] == number]
        return self.directory / str(name)

    def restore(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return self.command("vdi-restore", str(self.directory), *arguments)

    def restored(self, number: int) -> bytes:
        """Generation `number` by vdi-restore; QEMU must read the same from the file alone."""
        out = self.tmp_path / f"restored-{number}"
        done = self.restore(f"generation={number}", "--to", str(out), "--force")
        assert done.returncode == 0, done
        content = out.read_bytes()
        out.unlink()
        assert qemu_reads(self.file(number), self.tmp_path / "by-qemu") == content
        return content

    def assert_right(self) -> None:
        """Every generation is what the disk was, and nothing else lies in the directory."""
        numbers = [each["number"] for each in self.manifest["generations"]]
        assert numbers == sorted(self.kept)
        for number, plain in self.kept.items():
            assert self.restored(number) == plain
        names = {each["file"] for each in self.manifest["generations"]}
        assert {path.name for path in self.directory.iterdir()} == {"lock", "manifest.json", *names}
        self.assert_snapshots()

    def snapshots(self) -> dict[str, str]:
        """The types of the disk's snapshots, by uuid."""
        records = self.house.call("VDI.get_all_records")
        [ref] = [ref for ref, record in records.items() if record["uuid"] == self.uuid]
        return {r["uuid"]: r["type"] for r in records.values() if r["snapshot_of"] == ref}

    def assert_snapshots(self, *others: str) -> None:
        """The newest generation's snapshot has its data, of the one before the changes are known."""
        made = [each["snapshot"] for each in self.manifest["generations"]]
        expected = dict.fromkeys(made[-2:-1], "cbt_metadata") | dict.fromkeys([made[-1], *others], "user")
        assert self.snapshots() == expected


def qemu_reads(image: Path, out: Path) -> bytes:
    """The disk of a qcow2 image and of all that it stands on."""
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(image), str(out)], check=True)
    content = out.read_bytes()
    out.unlink()
    return content
