"""Ending nbdkit although clients stay connected.

At SIGTERM nbdkit accepts nobody any more and waits for each connection until its client sends another request
or goes; an idle one can take forever. Here the signal is caught instead, nbdkit is told to shut down, and the
read sides of the clients' sockets are: requests in flight are answered, nothing further is read, and nbdkit
ends after its `cleanup`.

The trap: only the sockets that nbdkit has accepted may be touched, not those to the gateway.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Final

from nbd_plugin.connections import client_sockets

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
    for each in client_sockets():
        with each, contextlib.suppress(OSError):  # it may have ended by itself
            each.shutdown(socket.SHUT_RD)
