"""Which VDIs the gateway would let somebody open. Standard library only."""

from collections.abc import Iterator

from gateway.access.client_answer import answer
from gateway.access.client_link import ClientLink
from gateway.access.protocol import List, Listed, ProtocolError


def list_vdis(control_socket: str, session: str | None = None) -> list[tuple[str, str]]:
    """The VDIs that could be opened for reading: uuid and name, in the order of their names.

    `session` is a session's reference; without one the gateway asks the kernel who this process is. Names are
    cut at 255 characters. Raises AccessRefused, OSError (no gateway there, or it went away).
    """
    link = ClientLink.connect(control_socket)
    try:
        link.send(List(session))
        return [vdi for page in _pages(link) for vdi in page.vdis]
    except ProtocolError as error:
        raise ConnectionError(f"{control_socket}: the gateway was not understood: {error}") from error
    finally:
        link.close()


def _pages(link: ClientLink) -> Iterator[Listed]:
    while True:
        page = answer(link)
        if not isinstance(page, Listed):
            raise ProtocolError("a list was asked for and something else came")
        yield page
        if page.last:
            return
