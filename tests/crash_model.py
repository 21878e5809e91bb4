"""The model under the crash toolkit: file systems as values, and the calls that change them.

A Tree holds directories and the contents of files, pages shared between copies, so that thousands of states
of small images cost little. `tests/crash.py` says what the model assumes of kills and power failures.
"""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from random import Random

PAGE: Final = 4096
SECTOR: Final = 512

Inode: TypeAlias = int
ROOT: Final[Inode] = 0


@dataclass(slots=True)
class Content:
    """The bytes of one file: pages that are stored (the others are holes) and a size.

    Bytes of the last page beyond the size are zero. Pages are never changed, only replaced: copies of a
    Content share them, and two contents differ only in the pages that are not the same object.
    """

    pages: dict[int, bytes] = field(default_factory=dict)
    size: int = 0

    def copy(self) -> "Content":
        return Content(self.pages.copy(), self.size)

    def write(self, offset: int, data: bytes) -> None:
        position = 0
        while position < len(data):
            number, start = divmod(offset + position, PAGE)
            length = min(PAGE - start, len(data) - position)
            piece = data[position : position + length]
            if length < PAGE:
                old = self.pages.get(number, bytes(PAGE))
                piece = old[:start] + piece + old[start + length :]
            self.pages[number] = piece
            position += length
        self.size = max(self.size, offset + len(data))

    def punch(self, offset: int, length: int) -> None:
        stop = min(offset + length, self.size)
        for number in [n for n in self.pages if offset < (n + 1) * PAGE and n * PAGE < stop]:
            first, last = max(0, offset - number * PAGE), min(PAGE, stop - number * PAGE)
            if (first, last) == (0, PAGE):
                del self.pages[number]
            else:
                old = self.pages[number]
                self.pages[number] = old[:first] + bytes(last - first) + old[last:]

    def truncate(self, size: int) -> None:
        if size < self.size:
            kept, partial = divmod(size, PAGE)
            for number in [n for n in self.pages if n >= kept + (partial > 0)]:
                del self.pages[number]
            if partial and kept in self.pages:
                self.pages[kept] = self.pages[kept][:partial] + bytes(PAGE - partial)
        self.size = size

    def same_bytes(self, other: "Content") -> bool:
        empty = bytes(PAGE)
        return self.size == other.size and all(
            self.pages.get(n, empty) == other.pages.get(n, empty)
            for n in self.pages.keys() | other.pages.keys()
        )


def data_ranges(fd: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    while start < stop:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError:  # ENXIO: only holes from here on
            return
        if start >= stop:
            return
        end = min(stop, os.lseek(fd, start, os.SEEK_HOLE))
        yield start, end
        start = end


def read_content(path: str) -> Content:
    content = Content()
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        content.size = os.fstat(fd).st_size
        for start, end in data_ranges(fd, 0, content.size):
            content.write(start, os.pread(fd, end - start, start))
    finally:
        os.close(fd)
    return content


@dataclass(slots=True)
class Tree:
    """A file system: directories (by inode, name to inode) and files. An inode is in one of the two."""

    directories: dict[Inode, dict[str, Inode]] = field(default_factory=lambda: {ROOT: {}})
    files: dict[Inode, Content] = field(default_factory=dict)

    def branch(self, changing: set[Inode]) -> "Tree":
        """A copy whose directories and `changing` files may be changed; the other files are shared."""
        return Tree(
            {inode: entries.copy() for inode, entries in self.directories.items()},
            {
                inode: content.copy() if inode in changing else content
                for inode, content in self.files.items()
            },
        )

    def copy(self) -> "Tree":
        return self.branch(set(self.files))

    def find(self, parts: tuple[str, ...]) -> Inode:
        inode = ROOT
        for part in parts:
            inode = self.directories[inode][part]
        return inode

    def names(self) -> dict[str, Inode]:
        """Every reachable name, relative to the root, parents before children."""
        found: dict[str, Inode] = {}
        waiting = [("", ROOT)]
        while waiting:
            prefix, directory = waiting.pop()
            for name, inode in self.directories[directory].items():
                found[prefix + name] = inode
                if inode in self.directories:
                    waiting.append((f"{prefix}{name}/", inode))
        return found


@dataclass(slots=True)
class ContentCall:
    """A change of the bytes of one file, as steps: (offset, data) writes, punched ranges, a new size."""

    inode: Inode
    text: str
    size: int | None = None
    punched: tuple[tuple[int, int], ...] = ()
    written: tuple[tuple[int, bytes], ...] = ()

    def change(self, content: Content) -> None:
        if self.size is not None:
            content.truncate(self.size)
        for offset, length in self.punched:
            content.punch(offset, length)
        for offset, data in self.written:
            content.write(offset, data)

    def apply(self, tree: Tree) -> None:
        self.change(tree.files[self.inode])

    def cut_at_pages(self) -> "ContentCall | None":
        """The call as a kill may cut it short: some pages of the last write are missing."""
        if not self.written:
            return None
        *before, (offset, data) = self.written
        boundary = (offset + len(data) // 2) // PAGE * PAGE
        if boundary <= offset:
            return None
        cut = (*before, (offset, data[: boundary - offset]))
        return ContentCall(self.inode, f"{self.text}, cut at {boundary}", self.size, self.punched, cut)

    def torn(self, rng: "Random") -> "ContentCall":
        """The call as a power failure may tear it."""
        pieces: list[tuple[int, bytes]] = []
        size = self.size
        for offset, data in self.written:
            cuts = list(range(SECTOR - offset % SECTOR, len(data), SECTOR))
            if not cuts:
                pieces.append((offset, data))
                continue
            cut = rng.choice(cuts)
            match rng.randrange(4):
                case 0:
                    pieces.append((offset, data[:cut]))
                case 1:
                    pieces.append((offset + cut, data[cut:]))
                case 2:
                    edges = [0, *cuts, len(data)]
                    pieces += [
                        (offset + a, data[a:b]) for a, b in itertools.pairwise(edges) if rng.random() < 0.5
                    ]
                case _:
                    # Nothing but the growth: a write of no bytes at the end moves the size alone.
                    pieces.append((offset + len(data), b""))
        return ContentCall(self.inode, f"{self.text}, torn", size, self.punched, tuple(pieces))


@dataclass(slots=True)
class EntryCall:
    """A change of directory entries: (directory, name, inode or None for removal), done as a whole."""

    text: str
    safe_with: Inode
    changes: tuple[tuple[Inode, str, Inode | None], ...]
    new_file: Inode | None = None
    new_directory: Inode | None = None

    def apply(self, tree: Tree) -> None:
        if self.new_file is not None:
            tree.files.setdefault(self.new_file, Content())
        if self.new_directory is not None:
            tree.directories.setdefault(self.new_directory, {})
        for directory, name, inode in self.changes:
            if inode is None:
                tree.directories[directory].pop(name, None)
            else:
                tree.directories[directory][name] = inode


@dataclass(slots=True)
class SyncCall:
    """From here on the content of the file (or the entries of the directory) is safe."""

    inode: Inode
    text: str


UnsafeCall: TypeAlias = ContentCall | EntryCall
Call: TypeAlias = UnsafeCall | SyncCall
