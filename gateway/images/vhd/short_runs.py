"""Reading a granule whose sectors lie in several files, a few of them in each place.

One file has most of it. All that this file has between its first and its last run is read at once, what other
files hide included; then the other runs are read over that. So each read but the first is a short one, and
short ones don't give the interpreter's lock away: see gateway/images/at_hand.py.
"""

from collections.abc import Sequence
from os import preadv
from typing import Final

from gateway.images.at_hand import AtHand, held_reader
from gateway.images.files import ZEROES

FEW: Final = 2
"""So many runs are as well read one by one."""

# A run that takes longer (bytes) leaves the lock to others meanwhile.
_SHORT: Final = 64 << 10


def read_short_runs(
    view: memoryview, runs: Sequence[tuple[int, int, int]], fds: Sequence[int], at_hand: AtHand
) -> bool:
    """Fill `view` from `runs` of (index in `fds` or 0 for zeroes, offset in the file, length), in bytes.

    They are the runs of one granule, so those of one file lie as far from each other there as in `view`.
    False if something came short; what the buffer has then is of no use. Raises OSError.
    """
    most = _with_most(runs)
    if most is None or not _read_span(view, runs, most, fds[most]):
        return False
    held = held_reader(view, at_hand)
    done = 0
    for index, offset, length in runs:
        if not index:
            clear(view[done : done + length])
        elif index != most:
            at_once = held is not None and length <= _SHORT and held.read(fds[index], done, length, offset)
            if not at_once and preadv(fds[index], (view[done : done + length],), offset) != length:
                return False
        done += length
    return True


def _with_most(runs: Sequence[tuple[int, int, int]]) -> int | None:
    """The file that has most of the bytes; None if there are only zeroes."""
    sizes: dict[int, int] = {}
    for index, _, length in runs:
        if index:
            sizes[index] = sizes.get(index, 0) + length
    return max(sizes, key=sizes.__getitem__, default=None)


def _read_span(view: memoryview, runs: Sequence[tuple[int, int, int]], most: int, fd: int) -> bool:
    """Read from the first run of a file to its last."""
    begin = end = place = done = 0
    for index, offset, length in runs:
        if index == most:
            if not end:
                begin, place = done, offset
            end = done + length
        done += length
    return preadv(fd, (view[begin:end],), place) == end - begin


def clear(view: memoryview) -> None:
    """Fill it with zeroes."""
    for start in range(0, len(view), len(ZEROES)):
        piece = min(len(ZEROES), len(view) - start)
        view[start : start + piece] = ZEROES[:piece]
