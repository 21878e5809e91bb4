"""A crash toolkit on the seam for file calls: record what a piece of work does, then replay its crashes.

`RecordingFileCalls` does every changing call for real and keeps it with its data. Afterwards `kill_states`
builds the directory as it stands after each single call (the process was killed), and `power_states` builds
directories as a power failure may leave them (calls since the last fsync are lost or torn). Work under test
notes with `mark()` what it has been promised ("flush returned"); a state hands out the marks that were set
before its crash, so a test knows what has to be there.

What the model assumes, and what it does not:

- A killed process leaves every finished call; the call in progress is done, not done, or, for a write that
  crosses a 4 KiB page, cut at a page boundary.
- After a power failure everything up to the last `datasync` or `sync` of a file is there, size included.
  Of the later calls on this file any subset is there, in order. A write can be torn at any 512-byte
  boundary: a beginning, an end, any of its sectors, or only the growth of the file (then it reads as zeroes).
  A single 512-byte sector is never torn, as every disk promises.
- A directory keeps its entries as of its last `sync_directory`. Any subset of the later changes of its
  entries is there. A rename is one change, never half of one, and is safe once its target's directory is
  synced. An fsync of a file does not save its name (Linux file systems are kinder; POSIX promises nothing).
- The order of calls on different files means nothing to a power failure, unless an fsync lies between.
- Bytes that a file system never stored read as zeroes: no stale content of other files.
- `copy_range` and `clone` count as writes of the bytes that arrived, holes staying holes.
- Calls of several threads are done one after another. `start_writeback` promises nothing.

Changes that bypass the seam would go unnoticed, so the recorder compares its model with the real directory
before it yields the first state.
"""

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.images.files import Buffer, FileCalls
from tests.crash_model import (
    ROOT,
    Call,
    Content,
    ContentCall,
    EntryCall,
    Inode,
    SyncCall,
    Tree,
    UnsafeCall,
    data_ranges,
    read_content,
)
from tests.crash_states import Builder, choose, make_safe

if TYPE_CHECKING:
    from random import Random


@dataclass(frozen=True, slots=True)
class CrashState:
    """A directory as a crash left it. It belongs to the test until the next state is asked for."""

    directory: Path
    calls: int
    marks: tuple[object, ...]
    story: str

    def __str__(self) -> str:
        return self.story

    def write_back(self) -> None:
        """Have the files on disk. Until then how many blocks they take may change at any moment (ext4 counts
        those of its own tables when data is written back), and with it what is said of the size of an image.
        """
        for path in self.directory.rglob("*"):
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as file:
                    os.fsync(file.fileno())


class RecordingFileCalls(FileCalls):
    """Does all calls below `root` for real and remembers them. What is there at the start is safe."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.calls: list[Call] = []
        self._marks: list[tuple[int, object]] = []
        self._inodes: dict[tuple[int, int], Inode] = {}
        self._next_inode: Inode = ROOT + 1
        self._lock = threading.RLock()
        self._inside_a_call = False
        self._initial = self._snapshot()
        self._live = self._initial.copy()

    def mark(self, value: object) -> None:
        """Note a promise that was made to the work under test after all calls so far."""
        with self._lock:
            self._marks.append((len(self.calls), value))

    # The seam

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        with self._lock:
            existed = os.path.lexists(path)
            fd = super().open(path, flags, mode)
            if not flags & (os.O_CREAT | os.O_TRUNC):
                return fd
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                inode = self._new_inode(fd)
                self._live.files[inode] = self._initial.files[inode] = Content()
            elif not existed:
                directory, name = self._entry(path)
                inode = self._new_inode(fd)
                change = (directory, name, inode)
                self._record(EntryCall(f"create {name}", directory, (change,), new_file=inode))
            elif flags & os.O_TRUNC:
                self._record(ContentCall(self._inode(fd), f"open {path} empty", size=0))
            return fd

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        with self._lock:
            super().pwrite(fd, data, offset)
            text = f"write {len(data)} bytes at {offset} of {self._name(fd)}"
            self._record(ContentCall(self._inode(fd), text, written=((offset, bytes(data)),)))

    def truncate(self, fd: int, size: int) -> None:
        with self._lock:
            super().truncate(fd, size)
            self._record(ContentCall(self._inode(fd), f"truncate {self._name(fd)} to {size}", size=size))

    def punch(self, fd: int, offset: int, length: int) -> None:
        with self._lock:
            with self._as_one_call():
                super().punch(fd, offset, length)
            text = f"punch {length} bytes at {offset} of {self._name(fd)}"
            self._record(ContentCall(self._inode(fd), text, punched=((offset, length),)))

    def copy_range(self, source_fd: int, source_offset: int, fd: int, offset: int, length: int) -> None:
        with self._lock:
            with self._as_one_call():
                super().copy_range(source_fd, source_offset, fd, offset, length)
            self._record_arrived(fd, offset, length, "copy")

    def clone(self, source_fd: int, fd: int) -> bool:
        with self._lock:
            done = super().clone(source_fd, fd)
            if done:
                self._record_arrived(fd, 0, os.fstat(fd).st_size, "clone")
            return done

    def datasync(self, fd: int) -> None:
        with self._lock:
            super().datasync(fd)
            self._record(SyncCall(self._inode(fd), f"datasync {self._name(fd)}"))

    def sync(self, fd: int) -> None:
        with self._lock:
            super().sync(fd)
            self._record(SyncCall(self._inode(fd), f"sync {self._name(fd)}"))

    def rename(self, source: str, target: str) -> None:
        with self._lock:
            super().rename(source, target)
            from_directory, from_name = self._entry(source)
            to_directory, to_name = self._entry(target)
            inode = self._live.directories[from_directory][from_name]
            if self._live.directories[to_directory].get(to_name) == inode:
                return  # two names of one file: rename(2) does nothing
            changes = ((from_directory, from_name, None), (to_directory, to_name, inode))
            self._record(EntryCall(f"rename {from_name} to {to_name}", to_directory, changes))

    def link(self, source: str, target: str) -> None:
        with self._lock:
            super().link(source, target)
            directory, name = self._entry(target)
            status = os.stat(target, follow_symlinks=False)
            inode = self._inodes[status.st_dev, status.st_ino]
            self._record(EntryCall(f"link {name}", directory, ((directory, name, inode),)))

    def unlink(self, path: str) -> None:
        with self._lock:
            super().unlink(path)
            directory, name = self._entry(path)
            self._record(EntryCall(f"unlink {name}", directory, ((directory, name, None),)))

    def mkdir(self, path: str, mode: int = 0o700) -> None:
        with self._lock:
            super().mkdir(path, mode)
            directory, name = self._entry(path)
            inode = self._take_number()
            change = (directory, name, inode)
            self._record(EntryCall(f"mkdir {name}", directory, (change,), new_directory=inode))

    def sync_directory(self, path: str) -> None:
        with self._lock:
            super().sync_directory(path)
            parts = self._parts(path)
            inode = self._live.find(parts)
            self._record(SyncCall(inode, f"sync directory {'/'.join(parts) or '.'}"))

    # The replay

    def check_complete(self) -> None:
        """Fail if the real directory isn't what the recorded calls make of it: the seam was bypassed."""
        real: dict[str, Content | None] = {}
        for path in sorted(self.root.rglob("*")):
            real[str(path.relative_to(self.root))] = None if path.is_dir() else read_content(str(path))
        names = self._live.names()
        assert real.keys() == names.keys(), f"names changed outside of the seam: {real.keys() ^ names.keys()}"
        for name, content in real.items():
            if content is not None:
                expected = self._live.files[names[name]]
                assert content.same_bytes(expected), f"{name} was changed outside of the seam"

    def kill_states(self, into: Path) -> Iterator[CrashState]:
        """The directory after no call, after each call, and in the middle of long writes, built in `into`."""
        self.check_complete()
        builder = Builder(into)
        tree = self._initial.copy()
        yield self._state(builder, tree, 0, "killed before the first call")
        for index, call in enumerate(self.calls):
            if isinstance(call, SyncCall):
                continue
            if isinstance(call, ContentCall) and (cut := call.cut_at_pages()) is not None:
                half = tree.branch({call.inode})
                cut.apply(half)
                yield self._state(builder, half, index, f"killed in call {index}: {cut.text}")
            call.apply(tree)
            yield self._state(builder, tree, index + 1, f"killed after call {index}: {call.text}")

    def power_states(self, into: Path, rng: "Random", per_point: int = 2) -> Iterator[CrashState]:
        """`per_point` directories, built in `into`, for a power failure after each call.

        One state is enough where everything is safe. Half of the states are the extremes that find most:
        all unsafe calls lost, only the last one there, only one of them lost.
        """
        self.check_complete()
        builder = Builder(into)
        safe = self._initial.copy()
        pending: list[UnsafeCall] = []
        for index, call in enumerate(self.calls):
            if isinstance(call, SyncCall):
                pending = make_safe(safe, pending, call.inode)
            else:
                if isinstance(call, EntryCall) and call.new_file is not None:
                    safe.files[call.new_file] = Content()
                if isinstance(call, EntryCall) and call.new_directory is not None:
                    safe.directories[call.new_directory] = {}
                pending.append(call)
            for _ in range(per_point if pending else 1):
                survivors = choose(pending, rng)
                tree = safe.branch({c.inode for c in survivors if isinstance(c, ContentCall)})
                for survivor in survivors:
                    survivor.apply(tree)
                lost = len(pending) - len(survivors)
                there = "; ".join(survivor.text for survivor in survivors[-8:])
                story = f"power failed after call {index}: {call.text}; {lost} calls lost, not lost: {there}"
                yield self._state(builder, tree, index + 1, story)

    def _state(self, builder: Builder, tree: Tree, calls: int, story: str) -> CrashState:
        builder.build(tree)
        marks = tuple(value for position, value in self._marks if position <= calls)
        return CrashState(builder.directory, calls, marks, story)

    # The record

    @contextmanager
    def _as_one_call(self) -> Iterator[None]:
        # FileCalls may carry out one call by others of its own; only the outer one is written down.
        outer, self._inside_a_call = self._inside_a_call, True
        try:
            yield
        finally:
            self._inside_a_call = outer

    def _record(self, call: Call) -> None:
        if self._inside_a_call:
            return
        if not isinstance(call, SyncCall):
            call.apply(self._live)
        self.calls.append(call)

    def _record_arrived(self, fd: int, offset: int, length: int, verb: str) -> None:
        # Whatever way the bytes came, they are written down as they stand now.
        inode = self._inode(fd)
        size = os.fstat(fd).st_size
        stop = min(offset + length, size)
        ranges = list(data_ranges(fd, offset, stop))
        edges = [offset, *(edge for data in ranges for edge in data), stop]
        holes = tuple((a, b - a) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)
        written = tuple((a, os.pread(fd, b - a, a)) for a, b in ranges)
        grown = size if size != self._live.files[inode].size else None
        text = f"{verb} {length} bytes to {offset} of {self._name(fd)}"
        self._record(ContentCall(inode, text, grown, holes, written))

    def _take_number(self) -> Inode:
        number = self._next_inode
        self._next_inode += 1
        return number

    def _new_inode(self, fd: int) -> Inode:
        # The kernel may give a deleted file's number again: a new file always gets a new one here.
        status = os.fstat(fd)
        inode = self._take_number()
        self._inodes[status.st_dev, status.st_ino] = inode
        return inode

    def _inode(self, fd: int) -> Inode:
        status = os.fstat(fd)
        return self._inodes[status.st_dev, status.st_ino]

    def _name(self, fd: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{fd}")).name

    def _parts(self, path: str) -> tuple[str, ...]:
        full = Path(os.path.abspath(path))
        try:
            return full.relative_to(self.root).parts
        except ValueError:
            return (full.parent.resolve() / full.name).relative_to(self.root).parts

    def _entry(self, path: str) -> tuple[Inode, str]:
        *parents, name = self._parts(path)
        return self._live.find(tuple(parents)), name

    def _snapshot(self) -> Tree:
        tree = Tree()
        for path in sorted(self.root.rglob("*")):
            status = path.lstat()
            *parents, name = path.relative_to(self.root).parts
            directory = tree.directories[tree.find(tuple(parents))]
            if stat.S_ISDIR(status.st_mode):
                directory[name] = self._take_number()
                tree.directories[directory[name]] = {}
                continue
            key = (status.st_dev, status.st_ino)
            if key not in self._inodes:
                self._inodes[key] = self._take_number()
                tree.files[self._inodes[key]] = read_content(str(path))
            directory[name] = self._inodes[key]
        return tree
