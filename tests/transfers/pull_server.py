"""A web server for tests of those who fetch from it: each answer is what a test wants it to be."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import repeat

LOOPBACK = ["127.0.0.1"]


@dataclass
class Request:
    """What came."""

    target: str
    headers: dict[str, str]


class Connection:
    """The server's end of one connection."""

    def __init__(self, sock: socket.socket, ending: threading.Event) -> None:
        self.sock = sock
        self.ending = ending

    def head(self, status: int = 200, **headers: str | int) -> None:
        lines = [f"HTTP/1.1 {status} So"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.send(("\r\n".join(lines) + "\r\n\r\n").encode())

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def chunk(self, data: bytes) -> None:
        self.send(b"%x\r\n%s\r\n" % (len(data), data))

    def wait_for_end(self) -> None:
        """Until the client has gone or the server ends."""
        while not self.ending.is_set():
            self.sock.settimeout(0.05)
            with suppress(TimeoutError):
                if not self.sock.recv(1):
                    return


Handler = Callable[[Request, Connection], None]


@dataclass
class Server:
    """A running server. `requests` are those that have come."""

    url: str
    requests: list[Request] = field(default_factory=list)


@contextmanager
def serving(handler: Handler, context: ssl.SSLContext | None = None) -> Iterator[Server]:
    """Serve with this handler on a port of the loopback."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = Server(f"http{'' if context is None else 's'}://127.0.0.1:{port}")
    ending = threading.Event()
    threads: list[threading.Thread] = []

    def answer(sock: socket.socket) -> None:
        with suppress(OSError, ssl.SSLError):
            if context is not None:
                sock = context.wrap_socket(sock, server_side=True)
            with sock:
                request = _read(sock)
                if request is not None:
                    server.requests.append(request)
                    handler(request, Connection(sock, ending))
        sock.close()

    def accept() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=answer, args=(sock,), daemon=True))
            threads[-1].start()

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    try:
        yield server
    finally:
        ending.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        accepting.join()
        for thread in threads:
            thread.join()


def _read(sock: socket.socket) -> Request | None:
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(65536)
        if not more:
            return None
        data += more
    first, *lines = data.partition(b"\r\n\r\n")[0].decode().split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return Request(first.split(" ")[1], {name.lower(): value.strip() for name, _, value in pairs})


def file_of(
    data: bytes,
    *,
    tag: str | None = '"v1"',
    ranges: bool = True,
    cuts: Iterator[int] | None = None,
    chunked: bool = False,
    **headers: str | int,
) -> Handler:
    """A file with an ETag. Each answer breaks off after as many bytes as `cuts` says next."""
    cuts = cuts or repeat(len(data) + 1)

    def handler(request: Request, connection: Connection) -> None:
        told: dict[str, str | int] = dict(headers)
        if tag is not None:
            told["ETag"] = tag
        first, status = 0, 200
        wanted = request.headers.get("range")
        if wanted is not None and ranges and request.headers.get("if-range") in (None, tag):
            first, status = int(wanted.removeprefix("bytes=").rstrip("-")), 206
            if first >= len(data):
                connection.head(416, Content_Range=f"bytes */{len(data)}", Content_Length=0)
                return
            told["Content_Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        body = data[first:]
        cut = next(cuts)
        if chunked:
            connection.head(status, Transfer_Encoding="chunked", **told)
            for start in range(0, min(cut, len(body)), 70_000):
                connection.chunk(body[start : min(cut, start + 70_000)])
            if cut >= len(body):
                connection.send(b"0\r\n\r\n")
        else:
            connection.head(status, Content_Length=len(body), **told)
            connection.send(body[:cut])

    return handler
