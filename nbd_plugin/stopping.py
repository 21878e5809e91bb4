"""Ending nbdkit although clients stay connected.

At SIGTERM nbdkit accepts nobody any more and waits for each connection until its client sends another request
or goes; an idle one can take forever. Here the signal is caught instead, nbdkit is told to shut down, and the
read sides of the clients' sockets are: requests in flight are answered, nothing further is read, and nbdkit
ends after its `cleanup`. Who doesn't take his answers is disconnected after a while, unless a supervisor is
there, which has a patience of its own.

The traps: only the sockets that nbdkit has accepted may be touched, not those to the gateway. And it takes a
descriptor to find them, of which none may be left by then; so some are kept for that.
"""

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Final

from nbd_plugin.connections import client_sockets

PATIENCE_SECONDS: Final = 10.0
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_SPARE: Final = 4  # one at a time is needed; whoever is accepted in that moment may take others


def stop_at_signals(shutdown: Callable[[], None], patience: float | None = PATIENCE_SECONDS) -> None:
    """Have SIGTERM and SIGINT end nbdkit at once; to be called on its main thread, after it has forked.

    Clients have `patience` seconds to take their answers; None: any time.
    """
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(reading, True)
    spare = [os.dup(reading) for _ in range(_SPARE)]
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in _SIGNALS:
        # Python's own handler never runs: the main thread is in nbdkit's code. The byte in the pipe is all.
        signal.signal(number, lambda *_: None)

    def wait() -> None:
        os.read(reading, 1)
        until = None if patience is None else time.monotonic() + patience
        while True:
            shutdown()
            while spare:
                os.close(spare.pop())
            end_clients(socket.SHUT_RD)
            left = None if until is None else max(until - time.monotonic(), 0)
            if not select.select([reading], [], [], left)[0]:
                end_clients(socket.SHUT_RDWR)
                return
            os.read(reading, 1)

    threading.Thread(target=wait, name="stopping", daemon=True).start()


def end_clients(how: int) -> None:
    """With SHUT_RD end every client's connection as soon as what it has asked is answered; SHUT_RDWR: now."""
    for each in client_sockets():
        with each, contextlib.suppress(OSError):  # it may have ended by itself
            each.shutdown(how)
