"""POST requests that carry XML-RPC or JSON-RPC: a capped body in, an answer of the exact content type out.

What is called is injected; HTTP knows nothing of methods. The traps: clients compare the content type as a
whole string (xen-api does), so there is no charset in it; and a body comes before anybody can know who sends
it, so strangers may send as many large ones as they have connections.
"""

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Final
from weakref import WeakValueDictionary

import trio

from gateway.core.network import network_of
from gateway.core.threads import in_thread
from gateway.http.request import BadRequest

if TYPE_CHECKING:
    from gateway.http.connection import Connection
    from gateway.http.request import Request
    from gateway.http.routes import Handler

XML: Final = "text/xml"
JSON: Final = "application/json"

LARGE: Final = 64 << 10
"""Bodies from so many bytes on take turns. Hardly a call has one."""

# Gets the request (for the caller's address and transport) and the connection (to know when nobody waits any
# more), gives the answer's body.
Reply = Callable[["Request", "Connection"], Awaitable[bytes]]
# Takes a body apart, whatever is in it.
Read = Callable[[bytes], Reply]


class LargeBodies:
    """The turns of large bodies: of those from one network one at a time is received and taken apart, and of
    all one at a time is taken apart, in a thread. So they take little memory, and little of the interpreter.
    """

    def __init__(self) -> None:
        self._by_network: WeakValueDictionary[str, trio.Lock] = WeakValueDictionary()
        self._reading = trio.CapacityLimiter(1)

    async def read(self, connection: "Connection", address: str, read: Read) -> Reply:
        """What `read` makes of the body, once it is its turn. Raises as Connection.read_body, and BadRequest
        (503) when its turn doesn't come.
        """
        network = network_of(address)
        turn = self._by_network.setdefault(network, trio.Lock())
        with trio.move_on_after(connection.limits.transfer_idle) as waiting:
            await turn.acquire()
        if waiting.cancelled_caught:
            raise BadRequest(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "Other large requests from this address are being read; try again later.",
            )
        try:
            body = await connection.read_body(connection.limits.rpc_body_bytes)
            return await in_thread(read, body, limiter=self._reading)
        finally:
            turn.release()


def rpc_handler(read: Read, content_type: str, large: LargeBodies) -> "Handler":
    """A handler that has `read` take the body apart, and sends what that answers with status 200."""

    async def handle(connection: "Connection", request: "Request") -> None:
        limit = connection.limits.rpc_body_bytes
        if LARGE <= (request.content_length or 0) <= limit:
            answer = await large.read(connection, request.address, read)
        else:
            answer = read(await connection.read_body(limit))
        await connection.respond(HTTPStatus.OK, await answer(request, connection), content_type)

    return handle
