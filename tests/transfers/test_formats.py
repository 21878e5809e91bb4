"""By what images and archives that nobody can read are told from raw disks: made by their own programs."""

import subprocess
import tarfile
from pathlib import Path

import pytest

from gateway.core.errors import XenAPIError
from gateway.transfers.formats import MAGIC_BYTES, BodyFormat, recognise, refuse_others


def begin_of(image: Path) -> bytes:
    with image.open("rb") as file:
        return file.read(MAGIC_BYTES)


def made_by_qemu(image: Path, image_format: str) -> bytes:
    subprocess.run(["qemu-img", "create", "-q", "-f", image_format, image, "4M"], check=True)
    return begin_of(image)


@pytest.mark.parametrize(
    ("image_format", "called"), [("vdi", "VirtualBox"), ("parallels", "Parallels"), ("qed", "QED")]
)
def test_images_of_other_programs_are_no_raw_disks(tmp_path: Path, image_format: str, called: str) -> None:
    with pytest.raises(XenAPIError) as refused:
        recognise(made_by_qemu(tmp_path / "image", image_format))
    assert refused.value.code == "IMPORT_ERROR_UNSUPPORTED_IMAGE"
    assert called in refused.value.params[1]
    assert "qemu-img convert" in refused.value.params[1]


def test_the_description_of_a_vmdk_image_says_where_its_data_is(tmp_path: Path) -> None:
    flat = ["-f", "vmdk", "-o", "subformat=monolithicFlat"]
    subprocess.run(["qemu-img", "create", "-q", *flat, tmp_path / "a.vmdk", "4M"], check=True)
    with pytest.raises(XenAPIError) as refused:
        recognise(begin_of(tmp_path / "a.vmdk"))
    assert (tmp_path / "a-flat.vmdk").exists()
    assert "-flat.vmdk is a raw disk" in refused.value.params[1]
    # Who calls it vmdk, as its name does, is told the same; a fixed VHD may hold such bytes.
    with pytest.raises(XenAPIError) as called:
        refuse_others(begin_of(tmp_path / "a.vmdk"), BodyFormat.VMDK)
    assert called.value.code == "IMPORT_ERROR_WRONG_FORMAT"
    assert "-flat.vmdk is a raw disk" in called.value.params[1]
    refuse_others(begin_of(tmp_path / "a.vmdk"), BodyFormat.VHD)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_an_ova_is_no_raw_disk(tmp_path: Path, form: int) -> None:
    made_by_qemu(tmp_path / "disk.vmdk", "vmdk")
    (tmp_path / "web.ovf").write_text("<Envelope/>")
    with tarfile.open(tmp_path / "web.ova", "w", format=form) as archive:
        for name in ("web.ovf", "disk.vmdk"):
            archive.add(tmp_path / name, name)
    with pytest.raises(XenAPIError) as refused:
        recognise(begin_of(tmp_path / "web.ova"))
    assert "OVA" in refused.value.params[1]


@pytest.mark.parametrize(
    "begin", [b"", bytes(4), bytes(MAGIC_BYTES), b"\xeb\x63\x90".ljust(510, b"\0") + b"\x55\xaa"]
)
def test_what_a_disk_begins_with_is_raw(begin: bytes) -> None:
    assert recognise(begin) is BodyFormat.RAW


@pytest.mark.parametrize(
    "page", [b"<!DOCTYPE html><title>Log in</title>", b"<html>\n<head>", b"<HTML><BODY>"]
)
def test_a_web_page_is_no_raw_disk(page: bytes) -> None:
    with pytest.raises(XenAPIError) as refused:
        recognise(page)
    assert "a web page" in refused.value.params[1]


@pytest.mark.parametrize("program", ["gzip", "xz", "zstd", "pzstd"])
def test_what_a_program_has_packed_is_no_raw_disk(program: str) -> None:
    body = subprocess.run([program, "-c"], input=bytes(1 << 20), stdout=subprocess.PIPE, check=True).stdout
    with pytest.raises(XenAPIError) as refused:
        recognise(body)
    assert refused.value.code == "IMPORT_ERROR_UNSUPPORTED_IMAGE"
    assert f"compressed by {program.removeprefix('p')}; unpack it" in refused.value.params[1]
