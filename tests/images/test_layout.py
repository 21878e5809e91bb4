import os
import random
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.images.disk import Disk, Extent, FileRange, Hole, Literal, Segment
from gateway.images.files import Buffer
from gateway.images.layout import (
    GATHER_MAXIMUM,
    SENDFILE_MINIMUM,
    Computed,
    DiskBlocks,
    DiskRange,
    Gather,
    Layout,
    Part,
    entity_tag,
    raw_layout,
)
from gateway.images.raw import RawDisk

KIBIBYTE = 1024


class FakeDisk:
    """A disk of runs: a number of bytes of a file (from its start on, in order), or of zeroes."""

    def __init__(self, fd: int, runs: Sequence[tuple[int, bool]], gap: int = 512) -> None:
        self.size = sum(length for length, _ in runs)
        self.read_only = True
        self.runs: list[tuple[int, int, FileRange | Hole]] = []
        self.asked: list[tuple[int, int]] = []
        at = file_offset = 0
        for length, stored in runs:
            run = FileRange(fd, file_offset, length) if stored else Hole(length)
            self.runs.append((at, length, run))
            at += length
            if stored:
                file_offset += length + gap

    def segments(self, offset: int, length: int) -> Iterator[FileRange | Hole]:
        self.asked.append((offset, length))
        for start, size, run in self.runs:
            first, last = max(offset, start), min(offset + length, start + size)
            if first >= last:
                continue
            if isinstance(run, Hole):
                yield Hole(last - first)
            else:
                yield FileRange(run.fd, run.offset + first - start, last - first)

    def pread_into(self, buf: bytearray | memoryview, offset: int) -> None:
        view = memoryview(buf)
        for segment in self.segments(offset, len(view)):
            view[: segment.length] = content_of(segment)
            view = view[segment.length :]

    def pwrite(self, buf: Buffer, offset: int) -> None:
        raise NotImplementedError

    def zero(self, offset: int, length: int, *, trim: bool) -> None:
        raise NotImplementedError

    def flush(self) -> None: ...

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        raise NotImplementedError

    def close(self) -> None: ...


def content_of(segment: Segment | Gather) -> bytes:
    match segment:
        case FileRange():
            return os.pread(segment.fd, segment.length, segment.offset)
        case Hole():
            return bytes(segment.length)
        case Literal():
            return segment.data
        case Gather():
            buffer = bytearray(b"\xee" * GATHER_MAXIMUM)
            segment.read_into(memoryview(buffer))
            assert buffer[segment.length :] == b"\xee" * (GATHER_MAXIMUM - segment.length)
            return bytes(buffer[: segment.length])


def content(layout: Layout, start: int, stop: int) -> bytes:
    return b"".join(content_of(segment) for segment in layout.segments(start, stop))


def all_of(disk: Disk) -> bytes:
    buffer = bytearray(disk.size)
    disk.pread_into(buffer, 0)
    return bytes(buffer)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    path = tmp_path_factory.mktemp("layout") / "file"
    path.write_bytes(random.Random(0).randbytes(1 << 20))
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def test_short_neighbours_come_as_one_gather_and_long_runs_alone(file: int) -> None:
    disk = FakeDisk(
        file,
        [(512, True), (512, False), (1024, True), (SENDFILE_MINIMUM, True), (4096, True), (1 << 20, False)],
    )
    gather, long_run, single, hole = raw_layout(disk).segments(0, disk.size)
    assert isinstance(gather, Gather)
    assert [type(piece) for piece in gather.pieces] == [FileRange, Hole, FileRange]
    assert (gather.length, long_run.length) == (2048, SENDFILE_MINIMUM)
    assert isinstance(long_run, FileRange)
    assert isinstance(single, Gather)
    assert hole == Hole(1 << 20)


def test_a_gather_never_exceeds_the_buffer_it_promises(file: int) -> None:
    disk = FakeDisk(file, [(SENDFILE_MINIMUM - 512, True)] * 12)
    gathers = list(raw_layout(disk).segments(0, disk.size))
    assert all(isinstance(gather, Gather) and gather.length <= GATHER_MAXIMUM for gather in gathers)
    assert len(gathers) == 3


def test_runs_that_continue_each_other_in_the_file_are_one(file: int) -> None:
    disk = FakeDisk(file, [(32 * KIBIBYTE, True)] * 4 + [(4096, False)] * 40, gap=0)
    assert list(raw_layout(disk).segments(0, disk.size)) == [
        FileRange(file, 0, 128 * KIBIBYTE),
        Hole(160 * KIBIBYTE),
    ]


def test_literal_bytes_and_short_holes_alone_need_no_reading() -> None:
    layout = Layout([Literal(b"header")])
    assert list(layout.segments(0, 6)) == [Literal(b"header")]
    assert list(layout.segments(2, 4)) == [Literal(b"ad")]


def test_nothing_is_asked_of_a_disk_outside_of_the_range(file: int) -> None:
    disk = FakeDisk(file, [(8192, True)] * 8)
    layout = Layout([Literal(b"h" * 512), DiskRange(disk, 4096, 8192), Literal(b"t" * 512)])
    assert layout.size == 9216
    assert content(layout, 0, 512) == b"h" * 512
    assert disk.asked == []
    assert content(layout, 1000, 1100) == all_of(disk)[4096 + 488 : 4096 + 588]
    assert disk.asked[0] == (4096 + 488, 100)


def test_segments_are_made_while_they_are_asked_for(file: int) -> None:
    disk = FakeDisk(file, [(SENDFILE_MINIMUM, True)] * 4)
    layout = Layout([DiskRange(disk, SENDFILE_MINIMUM * i, SENDFILE_MINIMUM) for i in range(4)])
    segments = layout.segments(0, layout.size)
    next(segments)
    assert len(disk.asked) <= 2


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (0, 7), (3, 2), (7, 7)])
def test_a_range_outside_of_the_layout_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="layout"):
        Layout([Literal(b"header")]).segments(start, stop)


def test_an_image_file_that_ends_early_is_an_error_and_no_endless_loop(file: int) -> None:
    disk = FakeDisk(file, [(512, True)])
    disk.runs = [(0, 512, FileRange(file, (1 << 20) - 100, 512))]
    (gather,) = raw_layout(disk).segments(0, 512)
    assert isinstance(gather, Gather)
    with pytest.raises(OSError, match="ends before"):
        gather.read_into(memoryview(bytearray(512)))


BLOCK = 4096


def computed(data: bytes) -> Computed:
    return Computed(len(data), 100, lambda number: data[100 * number : 100 * number + 100])


def test_blocks_and_tables_are_asked_for_only_where_they_are_wanted(file: int) -> None:
    disk = FakeDisk(file, [(BLOCK, True)] * 8)
    made: list[int] = []

    def make(number: int) -> bytes:
        made.append(number)
        return bytes([number]) * 100

    layout = Layout([Computed(1000, 100, make), DiskBlocks(disk, array("I", [1, 4, 6]), BLOCK, b"p" * 8)])
    assert layout.size == 1000 + 3 * (8 + BLOCK)
    assert content(layout, 350, 450) == bytes([3]) * 50 + bytes([4]) * 50
    assert (made, disk.asked) == ([3, 4], [])
    start = 1000 + 8 + BLOCK
    assert content(layout, start + 4, start + 108) == b"p" * 4 + all_of(disk)[4 * BLOCK : 4 * BLOCK + 100]
    assert disk.asked[0] == (4 * BLOCK, 100)


RUNS = st.lists(
    st.tuples(st.sampled_from([1, 511, 512, 4096, 65535, 65536, 70000]), st.booleans()), max_size=7
)
BLOCKS = st.tuples(RUNS, st.sets(st.integers(0, 9)), st.sampled_from([b"", b"prefix"]))
COMPUTED = st.builds(bytearray, st.binary(max_size=600))
PARTS = st.lists(st.one_of(st.binary(max_size=600), RUNS, BLOCKS, COMPUTED), max_size=5)


@given(PARTS, st.data())
def test_any_range_gives_the_bytes_of_the_whole(
    file: int,
    description: list[
        bytes | bytearray | list[tuple[int, bool]] | tuple[list[tuple[int, bool]], set[int], bytes]
    ],
    data: st.DataObject,
) -> None:
    parts: list[Part] = []
    whole = b""
    for item in description:
        if isinstance(item, bytes):
            parts.append(Literal(item))
            whole += item
        elif isinstance(item, bytearray):
            parts.append(computed(bytes(item)))
            whole += item
        elif isinstance(item, tuple):
            disk = FakeDisk(file, item[0])
            part = DiskBlocks(disk, array("I", sorted(item[1])), BLOCK, item[2])
            parts.append(part)
            padded = all_of(disk).ljust(10 * BLOCK, b"\0")
            for number in part.blocks:
                whole += item[2] + padded[number * BLOCK : (number + 1) * BLOCK]
        else:
            disk = FakeDisk(file, item)
            first = data.draw(st.integers(0, disk.size))
            parts.append(DiskRange(disk, first, disk.size - first))
            whole += all_of(disk)[first:]
    layout = Layout(parts)
    assert layout.size == len(whole)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    assert content(layout, start, stop) == whole[start:stop]
    assert all(segment.length for segment in layout.segments(start, stop))


def test_a_raw_disk_is_sent_with_its_holes(tmp_path: Path) -> None:
    path = tmp_path / "image.raw"
    with path.open("wb") as out:
        out.write(b"a" * (1 << 20))
        out.truncate(8 << 20)
    disk = RawDisk(os.open(path, os.O_RDONLY), 8 << 20, read_only=True, path=str(path))
    segments = list(raw_layout(disk).segments(4096, 8 << 20))
    assert [segment.length for segment in segments] == [(1 << 20) - 4096, 7 << 20]
    assert isinstance(segments[1], Hole)
    disk.close()


def test_an_entity_tag_follows_contents_their_order_and_the_format() -> None:
    tags = {
        entity_tag(["one"], "raw"),
        entity_tag(["two"], "raw"),
        entity_tag(["one"], "vhd"),
        entity_tag(["one", "two"], "vhd"),
        entity_tag(["two", "one"], "vhd"),
        entity_tag([], "raw"),
    }
    assert len(tags) == 6
    assert entity_tag(["one"], "raw") == entity_tag(iter(["one"]), "raw")
    assert all(tag[0] == tag[-1] == '"' and tag[1:-1].isalnum() for tag in tags)
