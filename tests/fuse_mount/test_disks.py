"""VDIs opened through a gateway that is its own process."""

import errno
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial

import pytest
import trio
import trio.lowlevel
import trio.testing

from fuse_mount.disk_file import OpenFile
from fuse_mount.disks import Disks, Part, Window
from gateway.access.client import AccessRefused, open_vdi
from gateway.images.vhd.chain import VhdChain
from tests.fuse_mount.served_site import (
    chained_vdi,
    content,
    control_socket,
    disks_of,
    operations,
    served_site,
    write,
)
from tests.system.site import MIB, Site, Vdi, stored_content


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with served_site(tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.fixture
async def disks(site: Site) -> AsyncIterator[Disks]:
    disks = disks_of(site)
    yield disks
    await disks.close()
    assert disks.held == {}


async def read_all(file: OpenFile, piece: int = 100_000) -> bytes:
    read = bytearray()
    while data := await file.read(len(read), piece):
        read += data
    return bytes(read)


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(20):
        while not await trio.to_thread.run_sync(condition):  # noqa: ASYNC110 - of another process
            await trio.sleep(0.01)


@pytest.mark.parametrize("image_format", ["vhd", "raw"])
@pytest.mark.parametrize("piece", [512, 4096, 100_000, MIB, 3 * MIB])
async def test_a_disk_reads_as_it_is_in_pieces_of_any_size(
    site: Site, disks: Disks, image_format: str, piece: int
) -> None:
    vdi = await trio.to_thread.run_sync(partial(chained_vdi, site, 2 * MIB + 512, image_format))
    file = await disks.open(vdi.uuid, Part.RAW, write=False)
    assert file.size == vdi.size
    assert await read_all(file, piece) == content(site, vdi)
    await file.close()


async def test_files_of_one_vdi_share_one_lease_that_ends_with_the_last(site: Site, disks: Disks) -> None:
    vdi = site.create_vdi()
    files = [await disks.open(vdi.uuid, Part.RAW, write=False) for _ in range(3)]
    assert disks.held == {vdi.uuid: "reading"}
    assert operations(site, vdi) == ["read"]
    for file in files[:2]:
        await file.close()
        await file.close()
    assert operations(site, vdi) == ["read"]
    await files[2].close()
    assert disks.held == {}
    assert operations(site, vdi) == []


async def test_opens_at_the_same_time_ask_once(site: Site, disks: Disks) -> None:
    vdi = site.create_vdi()
    files: list[OpenFile] = []

    async def one() -> None:
        files.append(await disks.open(vdi.uuid, Part.RAW, write=False))

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(one)
    assert operations(site, vdi) == ["read"]
    for file in files:
        await file.close()
    assert operations(site, vdi) == []


async def test_a_failed_open_is_told_to_all_who_wait_for_it_and_the_next_asks_anew(
    site: Site, disks: Disks
) -> None:
    vdi = site.create_vdi()
    other = open_vdi(control_socket(site), vdi.uuid, write=True)
    refusals: list[AccessRefused] = []

    async def one() -> None:
        with pytest.raises(AccessRefused) as refused:
            await disks.open(vdi.uuid, Part.RAW, write=False)
        refusals.append(refused.value)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(one)
    assert [refusal.code for refusal in refusals] == ["VDI_IN_USE"] * 5
    assert all(refusal is refusals[0] for refusal in refusals)
    assert disks.held == {}
    await trio.to_thread.run_sync(other.close)
    file = await disks.open(vdi.uuid, Part.RAW, write=False)
    await file.close()


async def test_an_open_that_is_cancelled_leaves_no_lease_and_hinders_nobody(site: Site, disks: Disks) -> None:
    vdi = site.create_vdi()
    opened: list[OpenFile] = []

    async def other() -> None:
        opened.append(await disks.open(vdi.uuid, Part.RAW, write=False))

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            scope.cancel()
            nursery.start_soon(other)
            opened.append(await disks.open(vdi.uuid, Part.RAW, write=False))
    assert scope.cancelled_caught
    assert len(opened) == 1
    assert operations(site, vdi) == ["read"]
    await opened[0].close()
    assert operations(site, vdi) == []


async def test_a_write_is_read_at_once_and_ends_where_the_disk_ends(site: Site, disks: Disks) -> None:
    vdi = site.create_vdi()
    writer = await disks.open(vdi.uuid, Part.RAW, write=True)
    reader = await disks.open(vdi.uuid, Part.RAW, write=False)
    assert disks.held == {vdi.uuid: "writing"}
    assert await writer.write(1000, b"abc") == 3
    assert bytes(await reader.read(998, 8)) == b"\0\0abc\0\0\0"
    assert await writer.write(vdi.size - 2, b"wxyz") == 2
    assert bytes(await reader.read(vdi.size - 4, 100)) == b"\0\0wx"
    for offset in (vdi.size, vdi.size + 5000):
        with pytest.raises(OSError, match="end of the disk") as failed:
            await writer.write(offset, b"x")
        assert failed.value.errno == errno.ENOSPC
        assert bytes(await reader.read(offset, 10)) == b""
    assert await writer.write(vdi.size, b"") == 0
    with pytest.raises(OSError, match="reading only"):
        await reader.write(0, b"x")
    await reader.flush()  # as sync(1) does
    assert stored_content(vdi)[1000:1003] == b"abc"
    await writer.close()
    await reader.close()
    expected = bytearray(vdi.size)
    expected[1000:1003], expected[-2:] = b"abc", b"wx"
    assert content(site, vdi) == expected


async def test_a_window_is_a_part_of_the_disk_from_end_to_end(site: Site, disks: Disks) -> None:
    vdi = site.create_vdi()
    write(site, vdi, 0, bytes(range(256)) * 16)
    file = await disks.open(vdi.uuid, Window(512, 1024), write=True)
    assert file.size == 1024
    assert bytes(await file.read(1000, 100)) == (bytes(range(256)) * 16)[1512:1536]
    assert await file.write(1020, b"12345") == 4
    with pytest.raises(OSError, match="end of the disk"):
        await file.write(1024, b"x")
    await file.close()
    assert content(site, vdi)[1530:1540] == bytes([250, 251]) + b"1234" + bytes(range(4))


@pytest.mark.parametrize("image_format", ["raw", "vhd"])
async def test_a_window_beyond_the_disk_is_what_is_left_of_it(
    site: Site, disks: Disks, image_format: str
) -> None:
    vdi = site.create_vdi(image_format=image_format)
    for window, size in ((Window(vdi.size - 512, MIB), 512), (Window(vdi.size + 512, MIB), 0)):
        file = await disks.open(vdi.uuid, window, write=False)
        assert file.size == size
        assert bytes(await file.read(0, MIB)) == bytes(size)
        assert bytes(await file.read((1 << 63) - 4096, 4095)) == b""
        await file.close()


async def test_a_writer_waits_for_readers_of_the_mount_and_is_then_refused(site: Site, disks: Disks) -> None:
    vdi = site.create_vdi()
    reader = await disks.open(vdi.uuid, Part.RAW, write=False)
    with pytest.raises(OSError, match="is read through this mount") as refused:
        await disks.open(vdi.uuid, Part.RAW, write=True)
    assert refused.value.errno == errno.EBUSY
    assert bytes(await reader.read(0, 10)) == bytes(10)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(_opened_and_closed, disks, vdi))
        await trio.testing.wait_all_tasks_blocked()
        await reader.close()
    assert disks.held == {}


async def _opened_and_closed(disks: Disks, vdi: Vdi) -> None:
    writer = await disks.open(vdi.uuid, Part.RAW, write=True)
    assert disks.held == {vdi.uuid: "writing"}
    await writer.close()


@pytest.mark.parametrize("part", [Part.VHD, Part.QCOW2])
async def test_a_file_made_of_the_disk_is_neither_read_beside_a_writer_nor_written(
    site: Site, disks: Disks, part: Part
) -> None:
    vdi = site.create_vdi()
    writer = await disks.open(vdi.uuid, Part.RAW, write=True)
    with pytest.raises(OSError, match="is written to through this mount") as refused:
        await disks.open(vdi.uuid, part, write=False)
    assert refused.value.errno == errno.EBUSY
    await writer.close()
    with pytest.raises(OSError, match="made of the disk") as refused:
        await disks.open(vdi.uuid, part, write=True)
    assert refused.value.errno == errno.EROFS


async def test_a_lease_that_was_taken_away_ends_reads_and_another_is_asked_for(
    site: Site, disks: Disks
) -> None:
    vdi = site.create_vdi()
    old = [await disks.open(vdi.uuid, Part.RAW, write=False) for _ in range(2)]
    site.gateway.call("VDI.force_unlock", vdi.ref)
    await until(lambda: operations(site, vdi) == [])
    for file in old:
        with pytest.raises(OSError, match="lease has ended") as failed:
            await file.read(0, 512)
        assert failed.value.errno == errno.ESHUTDOWN
    new = await disks.open(vdi.uuid, Part.RAW, write=False)
    assert bytes(await new.read(0, 512)) == bytes(512)
    for file in (*old, new):
        await file.close()


async def test_a_writer_whose_lease_was_taken_away_is_told_by_flush_that_his_data_is_lost(
    site: Site, disks: Disks
) -> None:
    vdi = site.create_vdi()
    writer = await disks.open(vdi.uuid, Part.RAW, write=True)
    await writer.write(0, b"lost")
    site.gateway.call("VDI.force_unlock", vdi.ref)
    await until(lambda: operations(site, vdi) == [])
    for failing in (writer.flush(), writer.write(0, b"more")):
        with pytest.raises(OSError, match="lease has ended") as failed:
            await failing
        assert failed.value.errno == errno.ESHUTDOWN
    await writer.close()
    assert disks.held == {}


async def test_a_flush_that_fails_at_the_last_close_is_told_and_the_lease_has_ended(
    site: Site, disks: Disks, monkeypatch: pytest.MonkeyPatch
) -> None:
    vdi = site.create_vdi()
    writer = await disks.open(vdi.uuid, Part.RAW, write=True)
    await writer.write(0, b"lost")
    with monkeypatch.context() as patch:
        patch.setattr(VhdChain, "close", _closed_in_vain)
        with pytest.raises(OSError, match="bad sector"):
            await writer.close()
    assert disks.held == {}
    await until(lambda: operations(site, vdi) == [])


_close = VhdChain.close


def _closed_in_vain(self: VhdChain) -> None:
    _close(self)
    raise OSError(errno.EIO, "a bad sector")


async def test_a_user_who_may_not_look_into_the_sr_shares_leases_as_well(
    site: Site, disks: Disks, monkeypatch: pytest.MonkeyPatch
) -> None:
    vdi, other = site.create_vdi(), site.create_vdi()
    looks = 0

    def no_stat(path: str, *, follow_symlinks: bool = True) -> os.stat_result:
        nonlocal looks
        looks += 1
        raise PermissionError(errno.EACCES, "a directory of others")

    files = [await disks.open(vdi.uuid, Part.RAW, write=False)]
    with monkeypatch.context() as patch:
        patch.setattr("fuse_mount.disks.os.stat", no_stat)
        files.append(await disks.open(vdi.uuid, Part.RAW, write=False))
    assert looks == 1
    assert operations(site, vdi) == ["read"]
    other.file.rename(vdi.file)
    with monkeypatch.context() as patch:
        patch.setattr("fuse_mount.disks.os.stat", no_stat)
        files.append(await disks.open(vdi.uuid, Part.RAW, write=False))
    assert operations(site, vdi) == ["read", "read"]
    for file in files:
        await file.close()


async def test_who_opens_a_vdi_gets_what_it_is_now_beside_one_who_reads_what_it_was(
    site: Site, disks: Disks
) -> None:
    vdi = site.create_vdi()
    old = await disks.open(vdi.uuid, Part.RAW, write=False)
    url = site.import_url(vdi)
    done = await trio.run_process(
        ["curl", "-sS", "--fail-with-body", "-X", "PUT", "--data-binary", "@-", url],
        stdin=b"n" * vdi.size,
        capture_stdout=True,
        check=False,
        capture_stderr=True,
    )
    assert done.returncode == 0, done
    new = await disks.open(vdi.uuid, Part.RAW, write=False)
    assert bytes(await old.read(0, 4)) == bytes(4)
    assert bytes(await new.read(0, 4)) == b"nnnn"
    await old.close()
    assert bytes(await new.read(vdi.size - 4, 10)) == b"nnnn"
    await new.close()


async def test_the_end_of_the_mount_makes_writes_durable_and_ends_all_leases(site: Site) -> None:
    disks = disks_of(site)
    written, read = site.create_vdi(), site.create_vdi()
    writer = await disks.open(written.uuid, Part.RAW, write=True)
    reader = await disks.open(read.uuid, Part.RAW, write=False)
    await writer.write(0, b"kept")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disks.close)
        await disks.close()
    assert disks.held == {}
    assert operations(site, written) == operations(site, read) == []
    assert content(site, written)[:5] == b"kept\0"
    for file in (writer, reader):
        with pytest.raises(OSError, match="closed"):
            await file.read(0, 512)
        await file.close()
    with pytest.raises(OSError, match="about to end"):
        await disks.open(read.uuid, Part.RAW, write=False)


async def test_the_mounts_end_while_an_open_is_under_way_leaves_no_lease(site: Site) -> None:
    disks, vdi = disks_of(site), site.create_vdi()

    async def one() -> None:
        with pytest.raises(OSError, match="about to end"):
            await disks.open(vdi.uuid, Part.RAW, write=False)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one)
        while not disks.held:
            await trio.lowlevel.checkpoint()
        await disks.close()
    assert operations(site, vdi) == []


async def test_an_open_waits_for_a_gateway_that_restarts_and_reads_go_on_without_it(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with served_site(tmp_path_factory.mktemp("own")) as site:
        disks = disks_of(site, wait_seconds=20)
        vdi, other = site.create_vdi(), site.create_vdi()
        file = await disks.open(vdi.uuid, Part.RAW, write=False)
        site.gateway.signal(signal.SIGKILL)
        site.gateway.wait()
        assert bytes(await file.read(0, 4096)) == bytes(4096)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(_opened_and_read, disks, other))
            await trio.testing.wait_all_tasks_blocked()
            await trio.to_thread.run_sync(site.gateway.start)
        await file.close()
        await disks.close()


async def _opened_and_read(disks: Disks, vdi: Vdi) -> None:
    file = await disks.open(vdi.uuid, Part.RAW, write=False)
    assert len(await file.read(0, 512)) == 512
    await file.close()


async def test_what_is_unknown_or_damaged_is_refused_with_its_own_reason(site: Site, disks: Disks) -> None:
    with pytest.raises(AccessRefused, match="UUID_INVALID"):
        await disks.open("4c5b3d6e-0000-0000-0000-000000000000", Part.RAW, write=False)
    vdi = site.create_vdi()
    os.truncate(vdi.file, 1000)
    with pytest.raises(AccessRefused, match="VDI_IO_ERROR"):
        await disks.open(vdi.uuid, Part.RAW, write=False)
    vdi.file.unlink()
    with pytest.raises(AccessRefused, match="VDI_MISSING"):
        await disks.open(vdi.uuid, Part.RAW, write=False)
    assert disks.held == {}
