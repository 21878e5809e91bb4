"""What is known of a chain's blocks is used again for that very chain alone, and takes little memory."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.images.allocation import stored_blocks
from gateway.images.chain import ChainFiles, open_chain_files, open_disk
from gateway.images.vhd.create import create_differencing, create_dynamic
from gateway.images.vhd.image import open_vhd
from gateway.transfers.known_blocks import KnownBlocks

MIB = 1 << 20


def write(path: Path, *blocks: int) -> None:
    disk = open_disk(open_chain_files(str(path), writable=True), read_only=False)
    for block in blocks:
        disk.pwrite(b"x" * 512, 2 * MIB * block)
    disk.close()


def image(path: Path, *blocks: int) -> Path:
    create_dynamic(str(path), 64 * MIB)
    write(path, *blocks)
    return path


class Chains:
    def __init__(self) -> None:
        self._open: list[ChainFiles] = []

    def open(self, path: Path) -> ChainFiles:
        """As for another request."""
        self._open.append(open_chain_files(str(path), writable=False))
        return self._open[-1]

    def close(self) -> None:
        for chain in self._open:
            for node in chain.nodes:
                os.close(node.fd)


@pytest.fixture
def chains() -> Iterator[Chains]:
    chains = Chains()
    yield chains
    chains.close()


def test_the_same_content_in_the_same_files_is_looked_up_once(tmp_path: Path, chains: Chains) -> None:
    known, path = KnownBlocks(), image(tmp_path / "a.vhd", 1, 3)
    first = known.stored("content", chains.open(path))
    assert list(first.numbers) == [1, 3]
    assert known.stored("content", chains.open(path)) is first
    assert known.stored("other content", chains.open(path)) is not first


def test_what_was_touched_is_looked_at_again(tmp_path: Path, chains: Chains) -> None:
    known, path = KnownBlocks(), image(tmp_path / "a.vhd", 1, 3)
    before = known.stored("content", chains.open(path))
    write(path, 5)
    after = known.stored("content", chains.open(path))
    assert list(after.numbers) == [1, 3, 5]
    assert after.digest != before.digest


def test_a_hole_that_somebody_makes_in_a_raw_image_shows(tmp_path: Path, chains: Chains) -> None:
    known, path = KnownBlocks(), tmp_path / "a.raw"
    path.write_bytes(b"x" * 8 * MIB)
    assert list(known.stored("content", chains.open(path)).numbers) == [0, 1, 2, 3]
    with path.open("r+b") as file:
        file.truncate(2 * MIB)
        file.truncate(8 * MIB)
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert list(known.stored("content", chains.open(path)).numbers) == [0]


def test_each_file_of_a_chain_counts(tmp_path: Path, chains: Chains) -> None:
    known, parent, leaf = KnownBlocks(), image(tmp_path / "a.vhd", 1), tmp_path / "b.vhd"
    fd = os.open(parent, os.O_RDONLY)
    create_differencing(str(leaf), str(parent), open_vhd(fd, str(parent)))
    os.close(fd)
    write(leaf, 2)
    chain = chains.open(leaf)
    found = known.stored("content", chain)
    assert list(found.numbers) == list(stored_blocks(chain)) == [1, 2]
    assert known.stored("content", chains.open(leaf)) is found
    write(parent, 7)
    assert list(known.stored("content", chains.open(leaf)).numbers) == [1, 2, 7]


def test_what_was_not_asked_for_longest_is_forgotten_first(tmp_path: Path, chains: Chains) -> None:
    known = KnownBlocks(most_bytes=4 * 5)
    one, two, three = (image(tmp_path / f"{name}.vhd", 0, 1) for name in "abc")
    large = image(tmp_path / "large.vhd", *range(6))
    first = known.stored("x", chains.open(one))
    second = known.stored("x", chains.open(two))
    assert known.stored("x", chains.open(one)) is first
    third = known.stored("x", chains.open(three))
    assert known.stored("x", chains.open(large)) is not known.stored("x", chains.open(large))
    assert known.stored("x", chains.open(one)) is first
    assert known.stored("x", chains.open(three)) is third
    assert known.stored("x", chains.open(two)) is not second
