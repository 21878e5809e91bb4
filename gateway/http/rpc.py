"""POST requests that carry XML-RPC or JSON-RPC: a capped body in, an answer of the exact content type out.

What is called is injected; HTTP knows nothing of methods. The trap: clients compare the content type as a
whole string (xen-api does), so there is no charset in it.
"""

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from gateway.http.connection import Connection
    from gateway.http.request import Request
    from gateway.http.routes import Handler

XML: Final = "text/xml"
JSON: Final = "application/json"

# Gets the body, the request it came with (for the caller's address and transport) and the connection (to
# know when nobody waits any more), gives the answer's body.
Answer = Callable[[bytes, "Request", "Connection"], Awaitable[bytes]]


def rpc_handler(answer: Answer, content_type: str) -> "Handler":
    """A handler that reads the body, lets `answer` make the answer, and sends it with status 200."""

    async def handle(connection: "Connection", request: "Request") -> None:
        body = await connection.read_body(connection.limits.rpc_body_bytes)
        await connection.respond(HTTPStatus.OK, await answer(body, request, connection), content_type)

    return handle
