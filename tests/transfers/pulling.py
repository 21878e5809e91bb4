"""One disk as an image in every format and packing, and an inventory that fetches it from a server."""

import hashlib
import random
import subprocess
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import trio

from gateway.core.errors import XenAPIError
from gateway.core.records import VDI
from gateway.core.task import Operation
from gateway.repository.inventory import Inventory
from gateway.transfers.pull import Checksum
from gateway.transfers.pull_image import Order, Terms, pull_image
from gateway.transfers.pull_socket import Patience
from gateway.transfers.pull_source import ImageURL, PullRules
from tests.transfers.copying import foreign_reads, names
from tests.transfers.pull_server import LOOPBACK

MIB = 1 << 20
SIZE = 5 * MIB + 512


def disk() -> bytes:
    data = bytearray(SIZE)
    data[MIB : 2 * MIB] = random.Random(1).randbytes(MIB)
    data[-512:] = b"\x07" * 512
    return bytes(data)


FORMATS = {
    "raw": ("raw",),
    "vhd": ("vpc", "-o", "subformat=dynamic,force_size=on"),
    "fixed": ("vpc", "-o", "subformat=fixed,force_size=on"),
    "qcow2": ("qcow2",),
    "compressed qcow2": ("qcow2", "-c"),
    "vhdx": ("vhdx",),
    "vmdk": ("vmdk",),
    "stream": ("vmdk", "-o", "subformat=streamOptimized"),
}
PACKED = {"": None, "gzip": ("gzip", "-c"), "xz": ("xz", "-c1"), "zstd": ("zstd", "-qc")}


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("images")
    (directory / "disk").write_bytes(disk())
    return directory


@cache
def image(files: Path, form: str, packing: str = "") -> bytes:
    packing_command = PACKED[packing]
    if packing_command is not None:
        return packed(image(files, form), *packing_command)
    path = files / form.replace(" ", "-")
    program, *options = FORMATS[form]
    command = ["qemu-img", "convert", "-f", "raw", "-O", program, *options]
    subprocess.run([*command, str(files / "disk"), str(path)], check=True)
    return path.read_bytes()


def packed(data: bytes, *command: str) -> bytes:
    return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout


def sum_of(data: bytes) -> Checksum:
    return Checksum("sha256", hashlib.sha256(data).hexdigest())


class House:
    """An inventory with one SR."""

    def __init__(self, inventory: Inventory, sr: str, directory: Path) -> None:
        self.inventory = inventory
        self.sr = sr
        self.directory = directory
        self.operation = Operation("OpaqueRef:task", None)
        self.terms = Terms(
            PullRules.of(LOOPBACK),
            trio.CapacityLimiter(4),
            64 * MIB,
            Patience(connect=10, idle=10, pauses=(0.0, 0.0, 0.0)),
        )

    async def pull(self, url: str, checksum: Checksum | ImageURL | None = None, **more: object) -> VDI:
        order = Order(url=ImageURL.parse(url), sr=self.sr, name_label="gold", checksum=checksum)
        self.operation = Operation("OpaqueRef:task", None)
        ref = await pull_image(
            self.inventory,
            self.operation,
            order=replace(order, **more),  # type: ignore[arg-type]
            who="the test",
            terms=self.terms,
        )
        return self.inventory.records.vdis.get(ref)

    async def refusal(self, url: str, checksum: Checksum | ImageURL | None = None, **more: object) -> str:
        """The code of the error; nothing is left of the attempt."""
        before = names(self.directory)
        vdis = len(self.inventory.records.vdis)
        with pytest.raises(XenAPIError) as refused:
            await self.pull(url, checksum, **more)
        assert names(self.directory) == before
        assert len(self.inventory.records.vdis) == vdis
        return refused.value.code


@pytest.fixture
async def house(inventory: Inventory, tmp_path: Path) -> AsyncIterator[House]:
    sr = await inventory.sr_create("gold", str(tmp_path / "gold"))
    yield House(inventory, sr, tmp_path / "gold")


def require_same(house: House, vdi: VDI, files: Path, size: int = SIZE) -> None:
    found = foreign_reads(house.inventory, vdi)
    assert len(found) == vdi.virtual_size == -(-size // (2 * MIB)) * 2 * MIB
    assert found == (files / "disk").read_bytes().ljust(len(found), b"\0")
