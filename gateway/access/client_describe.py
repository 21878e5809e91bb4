"""What a VDI is and how large its exports are, asked of the gateway. Standard library only."""

from gateway.access.client_answer import answer
from gateway.access.client_link import ClientLink
from gateway.access.protocol import Describe, Described, Message, ProtocolError


def describe_vdi(control_socket: str, vdi: str, session: str | None = None) -> Described:
    """What the VDI with this uuid is now; nothing keeps it from being another a moment later.

    `session` is a session's reference; without one the gateway asks the kernel who this process is. Raises
    AccessRefused, OSError (no gateway there, or it went away).
    """
    link = ClientLink.connect(control_socket)
    try:
        link.send(Describe(vdi, session))
        return _described(answer(link))
    except ProtocolError as error:
        raise ConnectionError(f"{control_socket}: the gateway was not understood: {error}") from error
    finally:
        link.close()


def _described(come: Message) -> Described:
    if not isinstance(come, Described):
        raise ProtocolError("a description was asked for and something else came")
    return come
