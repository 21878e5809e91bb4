"""What the gateway and those who hold disks beside it say to each other over the control socket.

A message is a JSON object after its length in four bytes, big-endian. Descriptors (SCM_RIGHTS) travel with
the first byte of `Granted` and of `Announce`, one for each file of the chain, leaf first; no other message
has any. The first message of a connection carries the version. Nothing is sent or read here; standard library
only. The invariant: whatever bytes come, they are messages or a ProtocolError, and no unfinished one is
longer than MAX_MESSAGE.
"""

import array
import contextlib
import json
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, TypeAlias

from gateway.images.files import FileIdentity
from gateway.images.vhd.image import MAX_DEPTH

VERSION: Final = 1
MAX_MESSAGE: Final = 64 << 10  # bytes; 64 files with names of 255 bytes take a third of it
MAX_DESCRIPTORS: Final = MAX_DEPTH  # the kernel lets 253 pass in one message
MAX_COUNT: Final = 1 << 64
PURPOSE_LENGTH: Final = 32
# A page of a list and its names are so short that it is a message, whatever the names are.
PAGE: Final = 16
NAME_LENGTH: Final = 255
_LENGTH: Final = struct.Struct(">I")
_DESCRIPTOR: Final = array.array("i").itemsize
# Room for the descriptors of one message.
ANCILLARY_SPACE: Final = socket.CMSG_SPACE(MAX_DESCRIPTORS * _DESCRIPTOR)

Ancillary: TypeAlias = list[tuple[int, int, bytes]]


class ProtocolError(Exception):
    """The other side said what this side doesn't understand; the connection is of no use any more."""


@dataclass(frozen=True, slots=True)
class Open:
    """Asks for a VDI by its uuid. Without a session the kernel says who asks."""

    vdi: str
    write: bool
    purpose: str
    session: str | None


@dataclass(frozen=True, slots=True)
class Announce:
    """Says after a restart of the gateway what is held since before; the descriptors prove it."""

    vdi: str
    write: bool
    purpose: str
    session: str | None
    lease: str
    task: str | None
    read: int
    written: int
    files: tuple[FileIdentity, ...]


@dataclass(frozen=True, slots=True)
class List:
    """Asks which VDIs could be opened for reading."""

    session: str | None


@dataclass(frozen=True, slots=True)
class Listed:
    """A page of the answer: uuids with names, which may be shortened. The last page is followed by none."""

    vdis: tuple[tuple[str, str], ...]
    last: bool


@dataclass(frozen=True, slots=True)
class Describe:
    """Asks what a VDI is, by its uuid, without a lease."""

    vdi: str
    session: str | None


@dataclass(frozen=True, slots=True)
class Described:
    """What the VDI's files were at one moment. All sizes are bytes.

    `content_id` names the bytes of whoever holds `leaf`, the VDI's own file, while nobody writes. `stored` is
    how much of `size` lies in blocks that any file of the chain has. `vhd` and `qcow2` are the sizes of whole
    exports; None where the format can't hold the disk.
    """

    content_id: str
    leaf: FileIdentity
    size: int
    stored: int
    vhd: int | None
    qcow2: int | None


@dataclass(frozen=True, slots=True)
class File:
    """One file of a chain, as images.chain.OpenNode has it."""

    path: str
    kind: str
    parent: str | None


@dataclass(frozen=True, slots=True)
class Granted:
    """The VDI is leased; the descriptors that come along hold the locks."""

    lease: str
    files: tuple[File, ...]


@dataclass(frozen=True, slots=True)
class Adopted:
    """The announced lease is in the table again."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A XenAPI error: its code and parameters, and the sentence for people."""

    code: str
    params: tuple[str, ...]
    message: str


@dataclass(frozen=True, slots=True)
class Moved:
    """How many bytes were read and written through this lease so far."""

    read: int
    written: int


@dataclass(frozen=True, slots=True)
class Closed:
    """The disk was closed as it should be: an end without this is that of a process that died."""


@dataclass(frozen=True, slots=True)
class Working:
    """The task (a reference) under which the bytes move; to be announced after a restart."""

    task: str


@dataclass(frozen=True, slots=True)
class Revoke:
    """The lease has ended: give the files up at once and close the connection."""

    reason: str


Message: TypeAlias = (
    Open
    | Announce
    | List
    | Describe
    | Granted
    | Adopted
    | Listed
    | Described
    | Refused
    | Moved
    | Closed
    | Working
    | Revoke
)
First: TypeAlias = Open | Announce | List | Describe

_KINDS: Final[dict[str, type[Message]]] = {
    "open": Open,
    "announce": Announce,
    "list": List,
    "describe": Describe,
    "granted": Granted,
    "adopted": Adopted,
    "listed": Listed,
    "described": Described,
    "refused": Refused,
    "moved": Moved,
    "closed": Closed,
    "working": Working,
    "revoke": Revoke,
}
_NAMES: Final = {kind: name for name, kind in _KINDS.items()}


def encode(message: Message) -> bytes:
    """The bytes of a message. Raises ProtocolError when it is too long."""
    body = {each.name: _plain(getattr(message, each.name)) for each in fields(message)}
    body["kind"] = _NAMES[type(message)]
    if isinstance(message, First):
        body["version"] = VERSION
    data = json.dumps(body).encode()
    if len(data) > MAX_MESSAGE:
        raise ProtocolError(f"a message of {len(data)} bytes is too long")
    return _LENGTH.pack(len(data)) + data


def decode(data: bytes) -> Message:
    """The message in the bytes after a length. Raises ProtocolError for everything else."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"this is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise ProtocolError("a message is a JSON object")
    name = body.get("kind")
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ProtocolError("there is no message of that name")
    if kind in (Open, Announce, List, Describe) and body.get("version") != VERSION:
        raise ProtocolError(f"this gateway speaks version {VERSION} of the protocol alone")
    return kind(**{each.name: _read(body, each.name, _READERS[each.name, kind]) for each in fields(kind)})


def pack_descriptors(descriptors: Sequence[int]) -> Ancillary:
    """What `sendmsg` takes to send descriptors along."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors).tobytes())]


def unpack_descriptors(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors that `recvmsg` brought, which are the caller's to close."""
    found = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) - len(data) % _DESCRIPTOR])
    return list(found)


def close_descriptors(descriptors: Iterable[int]) -> None:
    """Close what came and nobody takes. What a file system says at that is not meant for who closes here."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


class Decoder:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yield the messages that `data` completes. Raises ProtocolError, and is then of no use any more."""
        self._pending += data
        while len(self._pending) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._pending)
            if length > MAX_MESSAGE:
                raise ProtocolError(f"a message of {length} bytes is too long")
            stop = _LENGTH.size + length
            if len(self._pending) < stop:
                return
            message = bytes(self._pending[_LENGTH.size : stop])
            del self._pending[:stop]
            yield decode(message)

    @property
    def is_empty(self) -> bool:
        """Whether the stream could end here."""
        return not self._pending


def _plain(value: Any) -> Any:
    if isinstance(value, FileIdentity):
        return list(value)
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, File):
        return {each.name: getattr(value, each.name) for each in fields(value)}
    return value


def _read(body: Mapping[str, Any], name: str, reader: Any) -> Any:
    if name not in body:
        raise ProtocolError(f"{name} is missing")
    try:
        return reader(body[name])
    except (TypeError, ValueError, KeyError) as error:
        raise ProtocolError(f"{name} is not what it should be") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # a lone surrogate is no text, and nothing that is told further may hold one
    return value


def _path(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise TypeError
    return value  # of a file system, whose names need not be UTF-8


def _purpose(value: Any) -> str:
    text = _text(value)
    if not (0 < len(text) <= PURPOSE_LENGTH and text.isprintable()):
        raise ValueError
    return text


def _optional_text(value: Any) -> str | None:
    return None if value is None else _text(value)


def _optional_path(value: Any) -> str | None:
    return None if value is None else _path(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError
    if not 0 <= value < MAX_COUNT:
        raise ValueError
    return value


def _optional_count(value: Any) -> int | None:
    return None if value is None else _count(value)


def _few(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > MAX_DESCRIPTORS:
        raise TypeError
    return value


def _identities(value: Any) -> tuple[FileIdentity, ...]:
    return tuple(_identity(pair) for pair in _few(value))


def _identity(value: Any) -> FileIdentity:
    device, inode = _few(value)
    return FileIdentity(_count(device), _count(inode))


def _files(value: Any) -> tuple[File, ...]:
    return tuple(
        File(_path(each["path"]), _text(each["kind"]), _optional_path(each["parent"])) for each in _few(value)
    )


def _vdis(value: Any) -> tuple[tuple[str, str], ...]:
    return tuple((_text(uuid), _text(name)) for uuid, name in map(_few, _few(value)))


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(_text(each) for each in _few(value))


_BY_NAME: Final = {
    "vdi": _text,
    "write": _flag,
    "purpose": _purpose,
    "session": _optional_text,
    "lease": _text,
    "read": _count,
    "written": _count,
    "code": _text,
    "params": _texts,
    "message": _text,
    "reason": _text,
    "vdis": _vdis,
    "last": _flag,
    "content_id": _text,
    "leaf": _identity,
    "size": _count,
    "stored": _count,
    "vhd": _optional_count,
    "qcow2": _optional_count,
}
_READERS: Final[dict[tuple[str, type[Message]], Any]] = {
    **{(each.name, kind): _BY_NAME.get(each.name) for kind in _KINDS.values() for each in fields(kind)},
    ("files", Announce): _identities,
    ("files", Granted): _files,
    ("task", Announce): _optional_text,
    ("task", Working): _text,
}
