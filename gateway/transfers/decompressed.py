"""A body that is compressed with gzip, xz or zstd, as the body that is in it.

Recognised by its first bytes, never by a name. Several members of gzip, streams of xz or frames of zstd
behind each other are one body, as the programs of these names have it; what is cut off, damaged or followed
by something else is IMPORT_ERROR_BAD_COMPRESSION.

The trap is memory: a few bytes become any number of zeroes, and an image says itself how much memory
reading it takes. So output is made only as it is asked for (of zstd, whose library knows no such bound,
block by block, which are 128 KiB at most), and what wants more memory than the strongest usual settings do
is refused.
"""

import lzma
import zlib
from enum import StrEnum
from typing import Final, Protocol

import zstandard

from gateway.core.errors import XenAPIError
from gateway.transfers.body import BodyEnded, BodyReader, Bytes, TransferAborted

COMPRESSION_BYTES: Final = 6
"""So many bytes tell compressions apart."""

# `xz -9` takes 65 MiB, `zstd --ultra -22` and `zstd --long` 128 MiB.
_MEMORY_BYTES: Final = 192 << 20
_WINDOW_BYTES: Final = 128 << 20
_PIECE_BYTES: Final = 64 << 10
_ZSTD_MAGIC: Final = 0xFD2FB528
_SKIPPABLE: Final = range(0x184D2A50, 0x184D2A60)
_LARGEST_BLOCK: Final = 128 << 10


class Compression(StrEnum):
    """What a body may be compressed with."""

    GZIP = "gzip"
    XZ = "xz"
    ZSTD = "zstd"


_MAGIC: Final = {
    Compression.GZIP: b"\x1f\x8b\x08",
    Compression.XZ: b"\xfd7zXZ\0",
    Compression.ZSTD: b"\x28\xb5\x2f\xfd",
}


def compression_of(begin: bytes) -> Compression | None:
    """What a body that begins so is compressed with."""
    if len(begin) >= 4 and int.from_bytes(begin[:4], "little") in _SKIPPABLE:
        return Compression.ZSTD  # pzstd tells the lengths of its frames so, each before it.
    return next((each for each, magic in _MAGIC.items() if begin.startswith(magic)), None)


class _Source(Protocol):
    """What is inside, in pieces of any size."""

    def next(self, most: int) -> Bytes:
        """At most `most` bytes; none is the end. Raises XenAPIError and what the outer body raises."""
        ...


class Decompressed:
    """The body within `outer`, whose first bytes say that it is of this kind."""

    def __init__(self, outer: BodyReader, kind: Compression) -> None:
        self._outer: Final = outer
        self._kind: Final = kind
        self._source: Final[_Source] = _Frames(outer) if kind is Compression.ZSTD else _Members(outer, kind)
        self._aborted = False

    def recv_into(self, view: memoryview) -> int:
        """As Body.recv_into. 0 is an end that was told. Raises IMPORT_ERROR_BAD_COMPRESSION, too."""
        if self._aborted:
            # The outer body may not be asked for long: 64 KiB of it hold half a GiB of zeroes.
            raise TransferAborted
        if not view:
            return 0
        try:
            data = self._source.next(len(view))
        except BodyEnded as ended:
            raise _bad(self._kind, f"it is cut off after {ended.count} bytes") from ended
        except (zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError) as error:
            raise _bad(self._kind, _reason(error)) from error
        view[: len(data)] = data
        return len(data)

    def more_within(self, _seconds: float) -> bool:
        """Whether there is a further byte, however long it takes: the end is told."""
        return self.recv_into(memoryview(bytearray(1))) > 0

    def abort(self) -> None:
        """As Body.abort."""
        self._aborted = True
        self._outer.body.abort()


def _bad(kind: Compression, why: str) -> XenAPIError:
    return XenAPIError("IMPORT_ERROR_BAD_COMPRESSION", kind, why)


def _reason(error: Exception) -> str:
    text = str(error)
    if "emory usage limit" in text:
        return f"reading it takes more than {_MEMORY_BYTES >> 20} MiB of memory"
    return text.removeprefix("zstd decompress error: ")


class _Stream(Protocol):
    """One member of gzip or stream of xz; lzma.LZMADecompressor is one."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Inflate:
    """zlib's object in the form of lzma's."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)
        self._full = False

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._full and not self._inner.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        made = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        # More of it may wait within.
        self._full = len(made) == max_length
        return made


class _Members:
    """Members of gzip, or streams of xz, one behind the other."""

    def __init__(self, outer: BodyReader, kind: Compression) -> None:
        self._outer = outer
        self._kind = kind
        self._stream: _Stream | None = self._begun()
        self._left = b""
        self._piece = memoryview(bytearray(_PIECE_BYTES))

    def _begun(self) -> _Stream:
        if self._kind is Compression.GZIP:
            return _Inflate()
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY_BYTES)

    def next(self, most: int) -> bytes:
        while self._stream is not None:
            stream = self._stream
            data = b""
            if stream.needs_input:
                data = self._left or self._input()
                self._left = b""
                if not data:
                    raise BodyEnded(self._outer.position + 1, self._outer.position)
            made = stream.decompress(data, most)
            if stream.eof:
                self._left = stream.unused_data
                self._stream = self._following()
            if made:
                return made
        return b""

    def _input(self) -> bytes:
        return bytes(self._piece[: self._outer.fill(self._piece)])

    def _following(self) -> _Stream | None:
        """The member behind this one; None at the end. Zeroes may lie between: tapes and xz's own padding."""
        magic, padding = _MAGIC[self._kind], 0
        while True:
            stripped = self._left.lstrip(b"\0")
            padding += len(self._left) - len(stripped)
            self._left = stripped
            if len(stripped) >= len(magic):
                break
            more = self._input()
            if not more:
                break
            self._left += more
        if self._kind is Compression.XZ and padding % 4:
            raise _bad(self._kind, "its padding is no multiple of 4 bytes")
        if not self._left:
            return None
        if not self._left.startswith(magic):
            raise _bad(self._kind, "there is something else behind its end")
        return self._begun()


class _Frames:
    """Frames of zstd, one behind the other, fed to the library block by block (RFC 8878, section 3.1)."""

    def __init__(self, outer: BodyReader) -> None:
        self._outer = outer
        self._library = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES)
        self._frame = self._library.decompressobj()
        self._has_checksum = False
        self._in_frame = False
        self._made = memoryview(b"")

    def next(self, most: int) -> Bytes:
        while not self._made:
            if self._in_frame:
                self._next_block()
            elif not self._begin_frame():
                return b""
        data, self._made = self._made[:most], self._made[most:]
        return data

    def _begin_frame(self) -> bool:
        """Whether there was another one."""
        outer = self._outer
        begin = outer.peek(4)
        if not begin:
            return False
        if len(begin) < 4:
            raise _bad(Compression.ZSTD, "there is something else behind its end")
        magic = int.from_bytes(outer.read(4), "little")
        if magic in _SKIPPABLE:
            outer.skip(int.from_bytes(outer.read(4), "little"))
            return True
        if magic != _ZSTD_MAGIC:
            raise _bad(Compression.ZSTD, "there is something else behind its end")
        descriptor = outer.read(1)
        flags = descriptor[0]
        is_single = bool(flags & 0x20)
        if flags & 3:
            raise _bad(Compression.ZSTD, "it needs a dictionary")
        size_bytes = (1 if is_single else 0, 2, 4, 8)[flags >> 6]
        rest = outer.read((not is_single) + size_bytes)
        size = int.from_bytes(rest[not is_single :], "little") + (256 if size_bytes == 2 else 0)
        if is_single:
            window = size
        else:
            base = 1 << (10 + (rest[0] >> 3))
            window = base + (base >> 3) * (rest[0] & 7)
        if window > _WINDOW_BYTES:
            raise _bad(Compression.ZSTD, f"reading it takes more than {_WINDOW_BYTES >> 20} MiB of memory")
        self._has_checksum = bool(flags & 4)
        self._frame = self._library.decompressobj()
        self._in_frame = True
        self._feed(begin + descriptor + rest)
        return True

    def _next_block(self) -> None:
        head = self._outer.read(3)
        number = int.from_bytes(head, "little")
        is_last, kind, size = number & 1, number >> 1 & 3, number >> 3
        if kind == 3 or size > _LARGEST_BLOCK:
            raise _bad(Compression.ZSTD, "there is no such block")
        data = head + self._outer.read(1 if kind == 1 else size)
        if is_last and self._has_checksum:
            data += self._outer.read(4)
        self._feed(data)
        if is_last:
            if not self._frame.eof:
                raise _bad(Compression.ZSTD, "a frame doesn't end with its last block")
            self._in_frame = False

    def _feed(self, data: bytes) -> None:
        made = self._frame.decompress(data)
        if made:
            self._made = memoryview(made)
