import contextlib
import json
import os
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.access.protocol import (
    ANCILLARY_SPACE,
    MAX_MESSAGE,
    Adopted,
    Announce,
    Closed,
    Decoder,
    Describe,
    Described,
    File,
    Granted,
    List,
    Listed,
    Message,
    Moved,
    Open,
    ProtocolError,
    Refused,
    Revoke,
    Working,
    decode,
    encode,
    pack_descriptors,
    unpack_descriptors,
)
from gateway.images.files import FileIdentity

ANNOUNCE = Announce(
    "vdi", True, "nbd", None, "lease", "OpaqueRef:task", 1, 1 << 40, (FileIdentity(1, (1 << 64) - 1),)
)
MESSAGES: list[Message] = [
    Open("vdi", False, "access", "OpaqueRef:session"),
    ANNOUNCE,
    Granted("lease", (File("/sr/a\udcff.vhd", "vhd", "b.vhd"), File("/sr/b.vhd", "vhd", None))),
    Adopted(),
    List(None),
    Listed((("vdi", "a name"), ("other", "")), last=False),
    Describe("vdi", None),
    Described("content", FileIdentity(1, 2), 1 << 42, 1 << 21, None, 1 << 41),
    Refused("VDI_IN_USE", ("a", "b"), "The VDI is in use."),
    Moved(0, 5),
    Closed(),
    Working("OpaqueRef:task"),
    Revoke("why"),
]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_sent_in_pieces_of_any_size(message: Message) -> None:
    data = encode(message) + encode(Closed())
    decoder = Decoder()
    come = [each for byte in data for each in decoder.feed(bytes([byte]))]
    assert come == [message, Closed()]
    assert decoder.is_empty


@given(st.lists(st.binary(max_size=200), max_size=8))
def test_any_bytes_are_messages_or_a_protocol_error(pieces: list[bytes]) -> None:
    decoder = Decoder()
    try:
        for piece in pieces:
            list(decoder.feed(piece))
    except ProtocolError:
        pass


@given(json_values)
def test_any_json_is_a_message_or_a_protocol_error(value: object) -> None:
    with pytest.raises(ProtocolError):
        decode(json.dumps(value).encode())


@given(st.sampled_from(MESSAGES), st.data(), json_values)
def test_a_message_with_any_other_value_in_one_field_is_a_message_or_a_protocol_error(
    message: Message, data: st.DataObject, value: object
) -> None:
    body = json.loads(encode(message)[4:])
    body[data.draw(st.sampled_from(sorted(body)))] = value
    with contextlib.suppress(ProtocolError):
        decode(json.dumps(body).encode())


@pytest.mark.parametrize("data", [b"[" * 60000, b'{"a":' * 12000, b"1" * 5000, b"\xff", b"", b"[NaN]"])
def test_what_breaks_json_parsers_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)


def test_a_length_beyond_the_limit_is_refused_before_the_message_comes() -> None:
    with pytest.raises(ProtocolError, match="too long"):
        list(Decoder().feed(struct.pack(">I", MAX_MESSAGE + 1)))
    with pytest.raises(ProtocolError, match="too long"):
        encode(Revoke("x" * MAX_MESSAGE))


@pytest.mark.parametrize("version", [None, 0, 2, "1", True])
def test_another_version_is_refused(version: object) -> None:
    body = {**json.loads(encode(ANNOUNCE)[4:]), "version": version}
    if version is True:
        body["version"] = [1]
    with pytest.raises(ProtocolError, match="version"):
        decode(json.dumps(body).encode())


def test_descriptors_travel_with_a_message() -> None:
    here, there = socket.socketpair()
    with here, there, open("/dev/null", "rb") as null:
        here.sendmsg([encode(Closed())], pack_descriptors([null.fileno(), null.fileno()]))
        _, ancillary, _, _ = there.recvmsg(100, ANCILLARY_SPACE)
        fds = unpack_descriptors(ancillary)
        assert len(fds) == 2
        for fd in fds:
            assert os.path.sameopenfile(fd, null.fileno())
            os.close(fd)
