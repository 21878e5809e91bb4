"""What a lease covers while it is held: the parents, the file it moved to, files given away or adopted."""

import errno
import fcntl
import os
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from gateway.core.errors import XenAPIError
from gateway.core.leases import LeaseMode, Leases, Step
from gateway.core.limits import Limits
from gateway.images.chain import ChainFiles, open_chain_files
from gateway.images.files import identity_of
from tests.core.lease_files import HOLDER, calling_at, content_of, make_chain, make_image, open_images
from tests.images.disks import make_child

pytestmark = pytest.mark.usefixtures("no_descriptor_stays_open")
READ, REPLACE, WRITE = LeaseMode.READ, LeaseMode.REPLACE, LeaseMode.WRITE


async def test_a_close_that_fails_lets_the_next_one_in_all_the_same(
    image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases = Leases()
    lease = await leases.acquire(image, WRITE, HOLDER)
    real = os.close

    def close(fd: int) -> None:
        real(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", close)
        lease.release()
        await lease.released()
    async with leases.hold(image, WRITE, HOLDER, wait=0):
        pass


async def test_readers_stay_while_a_replacement_is_prepared(image: str) -> None:
    leases = Leases()
    async with leases.hold(image, READ, HOLDER), leases.hold(image, REPLACE, HOLDER, wait=0):
        async with leases.hold(image, READ, HOLDER, wait=0):
            for mode in (REPLACE, WRITE):
                with pytest.raises(XenAPIError, match="VDI_IN_USE"):
                    await leases.acquire(image, mode, HOLDER, wait=0)


async def test_a_moved_lease_meets_others_at_the_new_file(image: str, tmp_path: Path) -> None:
    leases = Leases()
    new = make_image(tmp_path / "new", b"new")
    async with leases.hold(image, REPLACE, HOLDER) as lease:
        fd = os.open(new, os.O_RDONLY)
        lease.move_to(identity_of(fd))
        os.close(fd)
        os.rename(new, image)
        for mode in (REPLACE, WRITE):
            with pytest.raises(XenAPIError, match="VDI_IN_USE"):
                await leases.acquire(image, mode, HOLDER, wait=0)
        async with leases.hold(image, READ, HOLDER, wait=0) as reading:
            assert content_of(reading.chain.nodes[0].fd) == b"new"
    async with leases.hold(image, WRITE, HOLDER, wait=0):
        pass


async def test_a_disk_keeps_its_files_locked_after_the_release(image: str) -> None:
    leases = Leases()
    lease = await leases.acquire(image, WRITE, HOLDER)
    disk = await trio.to_thread.run_sync(lease.open_disk)
    lease.release()
    lease.release()
    await lease.released()
    with pytest.raises(XenAPIError, match="VDI_IN_USE"):
        await leases.acquire(image, READ, HOLDER, wait=0)
    disk.close()
    async with leases.hold(image, READ, HOLDER, wait=0) as reading:
        reading.release()
        with pytest.raises(ValueError, match="no descriptors"):
            reading.open_disk()


async def test_a_lease_covers_the_parents_too(tmp_path: Path) -> None:
    parent, child = make_chain(tmp_path)
    leases = Leases()
    async with leases.hold(child, WRITE, HOLDER):
        async with leases.hold(parent, READ, HOLDER, wait=0):
            pass
        with pytest.raises(XenAPIError, match="VDI_IN_USE"):
            await leases.acquire(parent, WRITE, HOLDER, wait=0)
    async with leases.hold(child, WRITE, HOLDER, parents=(WRITE,)):
        with pytest.raises(XenAPIError, match="VDI_IN_USE"):
            await leases.acquire(parent, READ, HOLDER, wait=0)


@pytest.mark.parametrize("step", [None, "resolved"])
async def test_the_first_parents_have_the_modes_asked_for_and_the_rest_is_read(
    tmp_path: Path, step: Step | None
) -> None:
    parent, child = make_chain(tmp_path)
    leaf = str(tmp_path / "leaf.vhd")
    make_child(Path(leaf), Path(child))
    leases = Leases() if step is None else Leases(step=calling_at(step, lambda: None))
    async with leases.hold(leaf, WRITE, HOLDER, parents=(WRITE,)) as lease:
        opened = [fcntl.fcntl(node.fd, fcntl.F_GETFL) & os.O_ACCMODE for node in lease.chain.nodes]
        assert opened == [os.O_RDWR, os.O_RDWR, os.O_RDONLY]
        with pytest.raises(XenAPIError, match="VDI_IN_USE"):
            await leases.acquire(child, READ, HOLDER, wait=0)
        async with leases.hold(parent, READ, HOLDER, wait=0):
            pass
        # Another gateway knows nothing of the table: the locks have to say the same.
        for file in (leaf, child):
            with pytest.raises(XenAPIError, match="VDI_IN_USE"):
                await Leases().acquire(file, READ, HOLDER, wait=0)
        async with Leases().hold(parent, READ, HOLDER, wait=0):
            pass
    async with leases.hold(parent, READ, HOLDER, parents=(WRITE, WRITE)) as lease:
        assert lease.chain.depth == 1


async def kept_over_a_restart(path: str, mode: LeaseMode) -> ChainFiles:
    """The files of a lease as another process has them: a table that is gone granted it."""
    lease = await Leases().acquire(path, mode, HOLDER)
    kept = ChainFiles(
        [replace(node, fd=os.dup(node.fd)) for node in lease.chain.nodes], writable=lease.chain.writable
    )
    await lease.give_away()
    return kept


@pytest.mark.parametrize("mode", [READ, WRITE])
async def test_an_adopted_lease_stands_in_the_way_like_any_other(tmp_path: Path, mode: LeaseMode) -> None:
    parent, child = make_chain(tmp_path)
    kept = await kept_over_a_restart(child, mode)
    leases = Leases()
    lease = await leases.adopt(kept, mode, HOLDER)
    assert leases.holders_for(HOLDER.vdi) == (HOLDER,)
    assert leases.modes_for(HOLDER.vdi) == (mode,)
    for path in (parent, child):
        with pytest.raises(XenAPIError, match="VDI_IN_USE") as refused:
            await leases.acquire(path, WRITE, HOLDER, wait=0)
        assert refused.value.params[1] == str(HOLDER)
    lease.release()
    await lease.released()
    async with leases.hold(child, WRITE, HOLDER, wait=0):
        pass


async def test_files_that_somebody_else_has_locked_since_are_not_adopted(image: str) -> None:
    leases = Leases(Limits(lease_wait=0.05))
    async with leases.hold(image, WRITE, HOLDER):
        never_locked = open_chain_files(image, writable=False)
        with pytest.raises(XenAPIError, match="VDI_IN_USE"):
            await leases.adopt(never_locked, READ, HOLDER)
    assert never_locked.taken_over


async def test_who_was_granted_a_file_but_not_its_locks_does_not_hinder_an_adoption(image: str) -> None:
    kept = await kept_over_a_restart(image, READ)
    adopted: list[str] = []

    async def at(step: Step) -> None:
        if step == "granted" and not adopted:
            lease = await leases.adopt(kept, READ, HOLDER)
            adopted.append(lease.leaf_path)

    leases = Leases(step=at)
    with pytest.raises(XenAPIError, match="VDI_IN_USE"):
        await leases.acquire(image, WRITE, HOLDER, wait=0)
    assert adopted == [image]
    assert leases.holders_of(kept.nodes[0].identity) == (HOLDER,)
    kept.taken_over = False
    kept.close()


async def test_a_lease_whose_files_were_given_away_still_counts(image: str) -> None:
    leases = Leases()
    lease = await leases.acquire(image, WRITE, HOLDER)
    await lease.give_away()
    assert open_images() == []
    with pytest.raises(ValueError, match="no descriptors"):
        await lease.give_away()
    with pytest.raises(ValueError, match="no descriptors"):
        lease.open_disk()
    with pytest.raises(XenAPIError, match="VDI_IN_USE"):
        await leases.acquire(image, READ, HOLDER, wait=0)
    lease.release()
    async with leases.hold(image, READ, HOLDER, wait=0):
        pass
