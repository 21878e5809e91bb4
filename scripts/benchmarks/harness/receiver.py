"""The bare receiver: accepts one HTTP PUT after another and throws the body away.

What no server that receives a body with `recv_into` in one thread can beat. Run as a process of its own, so
that its interpreter lock is not the harness's. Prints its port and serves until its standard input ends.
"""

import re
import socket
import sys
import threading

BUFFER = 1 << 20


def receive(connection: socket.socket) -> None:
    with connection:
        buffer = bytearray(BUFFER)
        head = b""
        while b"\r\n\r\n" not in head:
            data = connection.recv(65536)
            if not data:
                return
            head += data
        head, _, rest = head.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        left = int(length[1]) if length else 0
        if re.search(rb"(?i)expect: *100-continue", head):
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        left -= len(rest)
        while left > 0:
            count = connection.recv_into(buffer, min(left, BUFFER))
            if not count:
                return
            left -= count
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


def main() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)

    def accept() -> None:
        while True:
            receive(listener.accept()[0])

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
