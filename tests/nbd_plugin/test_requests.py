import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.nbd_plugin.conftest import Nbd
from tests.page_cache import cached, drop
from tests.system.site import MIB, stored_content, wait_until

GIB = 1 << 30
HOLE, ZERO = 1, 2


def extents(handle: Any, length: int, offset: int, flags: int = 0) -> list[tuple[int, int]]:
    """(length, type) of what one block status request tells."""
    found: list[int] = []
    handle.block_status(
        length, offset, lambda _context, _offset, entries, _error: found.extend(entries), flags
    )
    return list(zip(found[::2], found[1::2], strict=True))


def errno_of(libnbd: Any, request: Any) -> str:
    with pytest.raises(libnbd.Error) as error:
        request()
    return str(error.value.errno)


def test_a_disk_that_is_read_only_refuses_every_change(nbd: Nbd, libnbd: Any) -> None:
    reader = nbd.connect(libnbd, nbd.site.create_vdi())
    assert reader.is_read_only()
    assert errno_of(libnbd, lambda: reader.pwrite(b"1" * 512, 0)) == "EPERM"
    assert errno_of(libnbd, lambda: reader.zero(512, 0)) == "EPERM"
    assert errno_of(libnbd, lambda: reader.trim(512, 0)) == "EPERM"
    reader.shutdown()


def test_an_image_that_was_cut_is_an_input_output_error(nbd: Nbd, libnbd: Any) -> None:
    vdi = nbd.site.create_vdi(image_format="raw")
    reader = nbd.connect(libnbd, vdi)
    os.truncate(vdi.file, MIB)
    assert errno_of(libnbd, lambda: reader.pread(MIB, 2 * MIB)) == "EIO"
    assert reader.pread(512, 0) == bytes(512)
    reader.shutdown()


def test_what_lies_beyond_the_end_is_refused(nbd: Nbd, libnbd: Any) -> None:
    vdi = nbd.site.create_vdi()
    writer = nbd.connect(libnbd, vdi, write=True)
    assert errno_of(libnbd, lambda: writer.pread(1024, vdi.size - 512)) == "EINVAL"
    assert errno_of(libnbd, lambda: writer.pwrite(b"1" * 1024, vdi.size - 512)) == "ENOSPC"
    writer.pwrite(b"1" * 512, vdi.size - 512)
    writer.shutdown()


@pytest.mark.parametrize("image_format", ["vhd", "raw"])
def test_zeroes_are_fast_when_they_may_be_holes_and_refuse_to_be_so_otherwise(
    nbd: Nbd, libnbd: Any, image_format: str
) -> None:
    vdi = nbd.site.create_vdi(8 * MIB, image_format)
    writer = nbd.connect(libnbd, vdi, write=True)
    writer.pwrite(b"1" * (4 * MIB), 0)
    writer.zero(MIB, MIB, libnbd.CMD_FLAG_FAST_ZERO)
    fast_and_reserved = libnbd.CMD_FLAG_FAST_ZERO | libnbd.CMD_FLAG_NO_HOLE
    assert errno_of(libnbd, lambda: writer.zero(MIB, 0, fast_and_reserved)) == "ENOTSUP"
    writer.zero(MIB, 2 * MIB, libnbd.CMD_FLAG_NO_HOLE)
    writer.flush()
    [*_, after] = [kind for _, kind in extents(writer, MIB, MIB)]
    assert after & ZERO
    assert extents(writer, MIB, 2 * MIB) == [(MIB, 0)]
    assert writer.pread(4 * MIB, 0) == b"1" * MIB + bytes(2 * MIB) + b"1" * MIB
    writer.shutdown()


def test_trimming_hides_what_a_parent_has(nbd: Nbd, libnbd: Any) -> None:
    vdi = nbd.site.create_vdi(8 * MIB)
    writer = nbd.connect(libnbd, vdi, write=True)
    writer.pwrite(b"p" * (4 * MIB), 0)
    writer.shutdown()
    nbd.site.gateway.call("VDI.snapshot", vdi.ref)
    writer = nbd.connect(libnbd, vdi, write=True)
    writer.trim(MIB, MIB)
    writer.trim(MIB, 6 * MIB)
    expected = b"p" * MIB + bytes(MIB) + b"p" * (2 * MIB) + bytes(4 * MIB)
    assert writer.pread(8 * MIB, 0) == expected
    told = extents(writer, 8 * MIB, 0)
    assert told == [(MIB, 0), (MIB, ZERO), (2 * MIB, 0), (4 * MIB, HOLE | ZERO)]
    writer.shutdown()


def test_a_block_status_stays_within_what_was_asked(nbd: Nbd, libnbd: Any) -> None:
    vdi = nbd.site.create_vdi(16 * GIB)
    writer = nbd.connect(libnbd, vdi, write=True)
    for place in (0, 5 * GIB, 16 * GIB - 4096):
        writer.pwrite(b"1" * 4096, place)
    longest = 4 * GIB - 1  # which 32 bits hold
    for offset in (0, 1, GIB, 5 * GIB, 12 * GIB + 1):
        told = extents(writer, longest, offset)
        assert 0 < sum(length for length, _ in told) <= longest
        assert all(one != other for (_, one), (_, other) in pairwise(told))
        [first] = extents(writer, longest, offset, libnbd.CMD_FLAG_REQ_ONE)
        assert first == told[0]
    assert extents(writer, 100, 50) == [(100, 0)]
    writer.shutdown()


def test_a_disk_of_many_small_pieces_is_told_in_parts(nbd: Nbd, libnbd: Any) -> None:
    vdi = nbd.site.create_vdi(64 * MIB)
    writer = nbd.connect(libnbd, vdi, write=True)
    pieces = 12_000
    data = libnbd.Buffer.from_bytearray(bytearray(b"1" * 512))
    for number in range(pieces):
        writer.aio_pwrite(data, number * 1024)
        while writer.aio_in_flight() > 32:
            writer.poll(-1)
    while writer.aio_in_flight():
        writer.poll(-1)
    offset, found = 0, []
    while offset < vdi.size:
        told = extents(writer, vdi.size - offset, offset)
        found += told
        offset += sum(length for length, _ in told)
    assert offset == vdi.size
    holes = sum(length for length, kind in found if kind & ZERO)
    assert vdi.size - holes >= pieces * 512
    writer.shutdown()


def test_a_forced_write_is_on_disk_although_nbdkit_is_killed(nbd: Nbd, libnbd: Any, tmp_path: Path) -> None:
    own = Nbd(nbd.site, tmp_path)
    vdi = own.site.create_vdi(8 * MIB)
    writer = own.connect(libnbd, vdi, write=True)
    writer.pwrite(b"f" * 4096, 0, libnbd.CMD_FLAG_FUA)
    writer.pwrite(b"l" * 4096, 4 * MIB)
    own.process.kill()
    own.process.wait()
    content = stored_content(vdi)
    assert content[:4096] == b"f" * 4096
    # What nobody has flushed is of no use yet, since the table of blocks comes last: the test can fail.
    assert content[4 * MIB : 4 * MIB + 4096] == bytes(4096)


def test_the_kernel_is_asked_to_read_ahead(nbd: Nbd, libnbd: Any) -> None:
    vdi = nbd.site.create_vdi(8 * MIB)
    writer = nbd.connect(libnbd, vdi, write=True)
    writer.pwrite(b"1" * MIB, 3 * MIB)
    writer.flush()
    drop(vdi.file)
    if cached(vdi.file) >= MIB:
        pytest.skip("the file system of the temporary directory keeps all in memory")
    writer.cache(8 * MIB, 0)
    wait_until(lambda: cached(vdi.file) >= MIB, "the kernel to read what was asked for")
    writer.shutdown()


def test_the_task_of_a_connection_tells_how_many_bytes_have_moved(nbd: Nbd, libnbd: Any) -> None:
    vdi = nbd.site.create_vdi(8 * MIB)
    writer = nbd.connect(libnbd, vdi, write=True)
    writer.pwrite(b"1" * 123_392, 0)
    writer.shutdown()
    reader = nbd.connect(libnbd, vdi)
    for offset in range(0, 8 * MIB, MIB):
        reader.pread(54_321, offset)
    reader.shutdown()

    def told(text: str) -> bool:
        tasks = nbd.site.gateway.call("task.get_all_records").values()
        return any(text in task["result"] and task["status"] == "success" for task in tasks)

    wait_until(lambda: told("123392 bytes written"), "the writer's task to end")
    wait_until(lambda: told(f"{8 * 54_321} bytes read"), "the reader's task to end")
