"""How a worker hangs on its supervisor: a thread in nbdkit that answers it, and notices when it has gone.

    supervisor: count        worker: ready, count N, draining
                drain
                stop

To drain is to accept nobody any more, serve those who are there, and end after the last. A worker drains when
it is told to (others with a new certificate take over) and when the supervisor has died, because a listening
socket that an orphan keeps can't be bound by the next one.

nbdkit can't stop listening without ending. So its listening sockets are replaced by descriptors on which
nothing ever happens, and its main thread is woken from poll or accept by a signal. The traps: a handler of
Python's would be seen by whoever watches Python's signals, so this one is a C function that does nothing.
And a worker that has no descriptor left has to obey as well, so what that takes is opened in advance.
"""

import contextlib
import ctypes
import os
import signal
import socket
import threading
import time
from typing import Final

from nbd_plugin.connections import count_clients, listening_descriptors, remember_listening

IDLE_SECONDS: Final = 1.0  # a client that has asked what there is comes back at once
GREETING_SECONDS: Final = 3.0  # one that was accepted just now is greeted first
_LOOK_SECONDS: Final = 0.2
_LOOK_AT_CLIENTS_SECONDS: Final = 1.0  # they may stay for days
_WAKE: Final = signal.SIGUSR2
_LONGEST: Final = 64

_listening: Final[list[int]] = []
_nothing: Final[list[int]] = []  # what takes their place


def follow(leash: int) -> None:
    """Obey the supervisor at the other end of descriptor `leash`, in a thread. On nbdkit's main thread."""
    link = socket.socket(fileno=leash)
    link.set_inheritable(False)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal(_WAKE, ctypes.cast(libc.abs, ctypes.c_void_p))
    remember_listening()
    _listening[:] = listening_descriptors()
    _nothing[:] = [os.eventfd(0, os.EFD_CLOEXEC)]
    threading.Thread(target=_obey, args=(link,), name="leash", daemon=True).start()


def stop_listening() -> None:
    """Accept nobody any more; connections stay. The addresses are free once all workers have done so."""
    for fd in _listening:
        os.dup2(_nothing[0], fd, inheritable=False)
    # It polls what was there before until it is woken, and may even be in accept.
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, _WAKE)


def _obey(link: socket.socket) -> None:
    _say(link, "ready")
    idle_from: float | None = None
    pause = _LOOK_SECONDS
    while True:
        link.settimeout(pause if idle_from is not None else None)
        try:
            order = link.recv(_LONGEST)
        except TimeoutError:
            order = b"look"
        except OSError:
            order = b""
        if order == b"count":
            with contextlib.suppress(OSError):  # nobody can count without a descriptor; the last count holds
                _say(link, f"count {count_clients()}")
        elif order == b"stop":
            stop_listening()
            os.kill(os.getpid(), signal.SIGTERM)
        elif order in {b"drain", b""} and idle_from is None:
            stop_listening()
            idle_from = time.monotonic() + GREETING_SECONDS
            _say(link, "draining")
        if order == b"" and idle_from is not None:
            time.sleep(pause)  # nobody is there to wait for
        if idle_from is not None:
            now = time.monotonic()
            pause = _LOOK_SECONDS
            if _has_clients():
                idle_from = max(idle_from, now + IDLE_SECONDS)
                pause = _LOOK_AT_CLIENTS_SECONDS
            elif now >= idle_from:
                os.kill(os.getpid(), signal.SIGTERM)
                return


def _has_clients() -> bool:
    try:
        return count_clients() > 0
    except OSError:  # no descriptor is left: somebody has them
        return True


def _say(link: socket.socket, text: str) -> None:
    with contextlib.suppress(OSError):
        link.settimeout(_LOOK_SECONDS)
        link.send(text.encode())
