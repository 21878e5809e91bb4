"""Which handler answers which request: the longest prefix of the path, at a slash, then the method.

xapi matches by longest prefix too (http_svr.ml), and clients rely on it: `curl -T disk.raw URL/` appends the
file's name to the path. Unlike xapi, an unknown path is 404, not 403.
"""

from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from gateway.http.connection import Connection
    from gateway.http.request import Request

Handler = Callable[["Connection", "Request"], Awaitable[None]]


class Routes:
    """A table of prefix -> method -> handler. HEAD goes to GET's handler, which sees the method."""

    def __init__(self, table: Mapping[str, Mapping[str, Handler]]) -> None:
        self._table: Final = sorted(table.items(), key=lambda entry: len(entry[0]), reverse=True)

    async def handle(self, connection: "Connection", request: "Request") -> None:
        """Let the right handler answer, or answer 404 or 405."""
        allowed: set[str] = set()
        for prefix, methods in self._table:
            if not _is_below(request.path, prefix):
                continue
            handler = methods.get("GET" if request.method == "HEAD" else request.method)
            if handler is not None:
                await handler(connection, request)
                return
            # The root's prefix fits every path; for methods it doesn't have, those paths simply don't exist.
            if prefix != "/" or request.path == "/":
                allowed.update(methods)
                break
        if not allowed:
            await connection.respond(
                HTTPStatus.NOT_FOUND,
                f"There is nothing at {_shown(request.path)}; check the path.\n".encode(),
            )
            return
        if "GET" in allowed:
            allowed.add("HEAD")
        names = ", ".join(sorted(allowed))
        await connection.respond(
            HTTPStatus.METHOD_NOT_ALLOWED,
            f"{request.method} is not possible at {_shown(request.path)}; use {names}.\n".encode(),
            headers=[("allow", names)],
        )


def _is_below(path: str, prefix: str) -> bool:
    return prefix in {"/", path} or path.startswith(prefix + "/")


def _shown(path: str) -> str:
    """The path on one line, never longer than a line."""
    return "".join(letter if letter.isprintable() else "?" for letter in path[:100])
