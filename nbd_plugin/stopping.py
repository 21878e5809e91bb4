"""Ending nbdkit although clients stay connected.

At SIGTERM nbdkit accepts nobody any more and waits for each connection until its client sends another request
or goes; an idle one can take forever. Here the signal is caught instead, nbdkit is told to shut down, and the
read sides of the clients' sockets are: requests in flight are answered, nothing further is read, and nbdkit
ends after its `cleanup`.

The trap: of the process's sockets only those that nbdkit has accepted may be touched. They are the ones with
the local address of a socket that listens.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Final

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def stop_at_signals(shutdown: Callable[[], None]) -> None:
    """Have SIGTERM and SIGINT end nbdkit at once; to be called on its main thread, after it has forked."""
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(reading, True)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in _SIGNALS:
        # Python's own handler never runs: the main thread is in nbdkit's code. The byte in the pipe is all.
        signal.signal(number, lambda *_: None)

    def wait() -> None:
        while os.read(reading, 1):
            shutdown()
            stop_reading_from_clients()

    threading.Thread(target=wait, name="stopping", daemon=True).start()


def stop_reading_from_clients() -> None:
    """Let every client's connection end as soon as what it has asked is answered."""
    connections = list(_sockets())
    try:
        listening = {_local(each) for each in connections if _is(each, socket.SO_ACCEPTCONN)}
        for each in connections:
            if not _is(each, socket.SO_ACCEPTCONN) and _local(each) in listening:
                with contextlib.suppress(OSError):  # it has ended by itself
                    each.shutdown(socket.SHUT_RD)
    finally:
        for each in connections:
            each.close()


def _sockets() -> Iterator[socket.socket]:
    """Duplicates of all stream sockets of this process, the caller's to close."""
    for name in os.listdir("/proc/self/fd"):
        try:
            each = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # no socket, or closed by now
            continue
        if each.type == socket.SOCK_STREAM:
            yield each
        else:
            each.close()


def _is(each: socket.socket, option: int) -> bool:
    return bool(each.getsockopt(socket.SOL_SOCKET, option))


def _local(each: socket.socket) -> object:
    """The address that clients connect to; of TCP the port, since one may listen on all interfaces."""
    address = each.getsockname()
    return (each.family, address[1] if isinstance(address, tuple) else address)
