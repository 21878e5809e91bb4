"""A TCP proxy before a gateway that cuts connections, or holds them, after so many bytes of an answer."""

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self


class Proxy:
    """The first `cuts` answers longer than `cut_after` bytes are cut: by a reset near there, or, without
    `reset`, by an end exactly there. Those longer than `hold_after` stand still until the proxy ends."""

    def __init__(
        self,
        url: str,
        *,
        cut_after: int | None = None,
        cuts: int = 1,
        reset: bool = True,
        hold_after: int | None = None,
    ) -> None:
        self._reset = reset
        host, _, port = url.rpartition("/")[2].rpartition(":")
        self._target = (host, int(port))
        self._cut_after = cut_after
        self._cuts = cuts
        self._hold_after = hold_after
        self._ended = threading.Event()
        self.held = threading.Event()
        self.connections = 0
        self.cut = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(30)

    def _start(self, run: object, *arguments: object) -> None:
        assert callable(run)
        thread = threading.Thread(target=run, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            server = socket.create_connection(self._target)
            self._start(self._upwards, client, server)
            self._start(self._downwards, server, client)

    def _upwards(self, client: socket.socket, server: socket.socket) -> None:
        try:
            while data := client.recv(1 << 18):
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def _downwards(self, server: socket.socket, client: socket.socket) -> None:
        count = 0
        try:
            while data := server.recv(1 << 18):
                count += len(data)
                if self._cut_after is not None and count > self._cut_after and self.cut < self._cuts:
                    self.cut += 1
                    if self._reset:
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    else:
                        client.sendall(data[: self._cut_after - count])
                    break
                if self._hold_after is not None and count > self._hold_after:
                    self.held.set()
                    self._ended.wait()
                    break
                client.sendall(data)
        except OSError:
            pass
        for connected in (client, server):
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)
            connected.close()
