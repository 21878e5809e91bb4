"""Images whose end nobody tells, as of a client that was killed: what is cut off is no whole image."""

import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.core.errors import XenAPIError
from gateway.images.raw import RawDisk
from gateway.transfers.body import BodyEnded, BodyReader
from gateway.transfers.formats import BodyFormat
from gateway.transfers.import_foreign import Spool, begin_foreign
from tests.transfers.test_import_raw import Pieces

MIB = 1 << 20
SIZE = 4 * MIB
DATA = (
    bytes(MIB)
    + 16 * random.Random(6).randbytes(4096) * 17
    + bytes(MIB - 65536)
    + random.Random(7).randbytes(MIB)
)


@pytest.fixture
def image(tmp_path: Path) -> Callable[..., bytes]:
    def made(form: str, *options: str) -> bytes:
        raw, out = tmp_path / "x.raw", tmp_path / "x.image"
        raw.write_bytes(DATA)
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", form, *options, raw, out], check=True)
        return out.read_bytes()

    return made


def untold(body: bytes, form: str, directory: Path, *, told: bool = False) -> bytes:
    """The disk that comes of a body without a length that ends as a broken connection does, unless `told`."""
    reader = BodyReader(Pieces(body, iter(lambda: MIB, None)), None, end_is_told=told)
    spool = Spool(str(directory / "import"), 64 * MIB)
    path = directory / "disk"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.ftruncate(fd, SIZE)
    disk = RawDisk(fd, SIZE, read_only=False, path=str(path))
    try:
        begin_foreign(reader, BodyFormat(form), lambda _: None, spool).receive(disk)
    finally:
        disk.close()
        spool.remove()
    return path.read_bytes()


WHOLE = [
    ("qcow2",),
    ("qcow2", "-o", "cluster_size=2M"),
    ("vmdk",),
    ("vhdx",),
]


@pytest.mark.parametrize("options", WHOLE, ids=" ".join)
def test_a_whole_image_needs_no_length(
    tmp_path: Path, image: Callable[..., bytes], options: tuple[str, ...]
) -> None:
    assert untold(image(*options), options[0], tmp_path) == DATA


@pytest.mark.parametrize("options", WHOLE, ids=" ".join)
@pytest.mark.parametrize("missing", [1, 512, 4096, 60_000])
def test_less_than_a_cluster_that_is_missing_is_missed(
    tmp_path: Path, image: Callable[..., bytes], options: tuple[str, ...], missing: int
) -> None:
    with pytest.raises((BodyEnded, XenAPIError)) as refused:
        untold(image(*options)[:-missing], options[0], tmp_path)
    if isinstance(refused.value, XenAPIError):
        assert refused.value.code == "IMPORT_ERROR_CORRUPT_IMAGE"


def test_a_compressed_image_needs_its_end_told(tmp_path: Path, image: Callable[..., bytes]) -> None:
    body = image("qcow2", "-c")
    with pytest.raises(XenAPIError) as refused:
        untold(body, "qcow2", tmp_path)
    assert refused.value.code == "IMPORT_ERROR_UNSUPPORTED_IMAGE"
    assert untold(body, "qcow2", tmp_path, told=True) == DATA


def test_an_image_in_which_nothing_is_stored_ends_where_qemu_img_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "empty.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE)], check=True)
    body = path.read_bytes()
    assert len(body) % 65536
    assert untold(body, "qcow2", tmp_path) == bytes(SIZE)
    with pytest.raises(BodyEnded):
        untold(body[:-1], "qcow2", tmp_path)
