"""Keeping the Python thread state of nbdkit's threads from one request to the next.

nbdkit calls PyGILState_Ensure and PyGILState_Release around each callback. On a thread that Python has not
started, the last Release destroys the thread's state, so each request pays for a new one: about 50 µs. A
thread that holds one reference more keeps its state, and a request costs what it costs in C.

Nobody gives that reference back when the thread ends, and the state would leak. So three pthread keys, with C
functions as destructors, take the GIL with the ended thread's state, clear it, and delete it. glibc runs
destructors by ascending key, which is what orders the three. None of them is Python code: by then
PyGILState_Ensure doesn't find the thread's state any more and would make another one.

The trap: once the interpreter is finalized these functions must not run. `unpin_all` belongs right before.
"""

import ctypes
import os
import threading
import time
from typing import Final

from nbd_plugin.proc import running_threads

PATIENCE_SECONDS: Final = 5.0
_MANY: Final = 1024

# Calls through PyDLL keep the GIL.
_python: Final = ctypes.pythonapi
_python.PyThreadState_Get.restype = ctypes.c_void_p
_pthread: Final = ctypes.PyDLL(None)
_pthread.pthread_setspecific.argtypes = (ctypes.c_uint, ctypes.c_void_p)

local: Final = threading.local()
"""`local.pinned` exists on pinned threads; look before calling `pin`, which costs more than that."""

_keys: list[int] = []
_threads: set[int] = set()  # native ids of pinned threads, some of which have ended


def prepare() -> None:
    """Make the keys, once per process; without them `pin` does nothing. Raises OSError."""
    keys: list[int] = []
    # The last takes no argument; the one that it gets lies in a register that it doesn't look at.
    for function in (
        _python.PyEval_AcquireThread,
        _python.PyThreadState_Clear,
        _python.PyThreadState_DeleteCurrent,
    ):
        key = ctypes.c_uint()
        code = _pthread.pthread_key_create(ctypes.byref(key), function)
        if code:
            raise OSError(code, os.strerror(code))
        keys.append(key.value)
    if keys == sorted(keys):
        _keys[:] = keys


def pin() -> None:
    """Keep the state of this thread, which Python has not started, until the thread ends."""
    local.pinned = True
    if not _keys:
        return
    state = _python.PyThreadState_Get()
    for key in _keys:
        if _pthread.pthread_setspecific(key, state):
            raise MemoryError
    _python.PyGILState_Ensure()
    _threads.add(threading.get_native_id())
    if len(_threads) > _MANY:
        _threads.intersection_update(running_threads())


def unpin_all() -> None:
    """Wait for pinned threads that are about to end; those that don't in time keep their state for good."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while _threads & running_threads() and time.monotonic() < deadline:
        time.sleep(0.001)  # gives the GIL to the threads that are waited for
    while _keys:
        _pthread.pthread_key_delete(_keys.pop())
