"""Which parts of a disk a copy reads, piece by piece, and what it notes of each."""

from collections.abc import Iterator
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from gateway.images.disk import Extent, ExtentKind
from gateway.transfers.copy_disk import Copied, data_ranges, fill
from gateway.transfers.import_raw import PIECE_BYTES
from tests.transfers.copying import MIB
from tests.transfers.test_import_raw import Memory


@given(
    st.lists(
        st.tuples(st.sampled_from(ExtentKind), st.integers(1, 5 * PIECE_BYTES // 2)), min_size=1, max_size=12
    )
)
def test_what_is_read_covers_all_data_and_no_long_hole(parts: list[tuple[ExtentKind, int]]) -> None:
    class Parts(Memory):
        def extents(self, offset: int, length: int) -> Iterator[Extent]:
            position = 0
            for kind, size in parts:
                first, last = max(position, offset), min(position + size, offset + length)
                if first < last:
                    yield Extent(first, last - first, kind)
                position += size

    size = sum(length for _, length in parts)
    disk = Parts(size)
    begin = size // 3
    ranges = list(data_ranges(disk, begin, size))
    assert all(begin <= start < stop <= size for start, stop in ranges)
    assert all(one[1] < other[0] for one, other in pairwise(ranges))
    covered = {byte // 512 for start, stop in ranges for byte in range(start, stop, 512)}
    for extent in disk.extents(begin, size - begin):
        first, last = extent.offset // 512, (extent.offset + extent.length - 1) // 512
        if extent.kind is ExtentKind.DATA:
            assert {first + 1, last - 1} & set(range(first + 1, last)) <= covered
    looked_at = sum(stop - start for start, stop in ranges)
    data = sum(
        e.length + 2 * PIECE_BYTES for e in disk.extents(begin, size - begin) if e.kind is ExtentKind.DATA
    )
    assert looked_at <= data


def test_every_piece_is_asked_for_and_noted() -> None:
    class Whole(Memory):
        def extents(self, offset: int, length: int) -> Iterator[Extent]:
            yield Extent(offset, length, ExtentKind.DATA)

    source, target = Whole(5 * MIB + 700), Memory(6 * MIB)
    source.data[4 * MIB + 5] = 1
    source.data[-1] = 2
    asked: list[int] = []
    copied = Copied(source.size)
    fill(source, target, copied, check=lambda: asked.append(copied.count))
    assert target.data == source.data.ljust(6 * MIB, b"\0")
    assert target.writes == [(4 * MIB, PIECE_BYTES), (5 * MIB, 700)]
    assert copied.blocks == bytes([0, 0, 1])
    assert asked == [0, *(number * MIB for number in range(6))]
    assert copied.fraction() == 1.0
    assert Copied(0).fraction() == 1.0
