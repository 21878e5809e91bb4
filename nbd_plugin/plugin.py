"""The plugin that nbdkit loads: every VDI of a gateway as an NBD export.

    nbdkit -f -U SOCKET -t 4 python nbd_plugin/plugin.py control=STATE/access.sock private=true

Parameters: `control=PATH` (the gateway's access socket; needed), `private=true|false` (default false: only
names with a session_id are answered), `purpose=WORD` (default nbd; told to people who meet a lease),
`outlive=true|false` (default false: nbdkit ends with the thread that started it), `clients=N` (more are
turned away), `handshake=SECONDS` (default 30: clients that open nothing for so long are disconnected; 0:
none), `wait=SECONDS` (default 5: so long clients wait for a gateway that isn't there), `parallel=true|
false` (default false: several requests of a connection at a time only where no client can abort nbdkit by
that; see `thread_model`), `leash=DESCRIPTOR` (the supervisor's). No environment is needed: the repository's
root is put on sys.path here.

Under socket activation (LISTEN_FDS) `-U` is left out and nothing else changes. SIGTERM and SIGINT end nbdkit
at once, whoever is connected; requests in flight are answered, images closed and leases ended before.

nbdkit finds the callbacks by their names at every call and runs this file as `__main__`. What they do is in
`export`; here is what concerns nbdkit: errno, flags, threads. The traps: only True itself counts as true;
`buf` is nbdkit's memory and gone after the callback; live connections are not closed at shutdown.
"""

import contextlib
import ctypes
import errno
import math
import os
import sys
from collections.abc import Iterator
from functools import partial
from typing import Final, NoReturn

import nbdkit

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from gateway.access.client import list_vdis
from gateway.access.client_patience import patiently
from gateway.images import heap
from gateway.images.disk import ExtentKind
from gateway.images.errors import ImageError
from nbd_plugin import handshakes, leash, pinning, scheduling
from nbd_plugin.connections import Room, descriptors_run_short
from nbd_plugin.export import Export, Parameters
from nbd_plugin.export_name import ExportNameError
from nbd_plugin.failures import RequestFailed, has_remedy, nbd_errno
from nbd_plugin.pinning import local as this_thread
from nbd_plugin.stopping import PATIENCE_SECONDS, stop_at_signals

API_VERSION: Final = 2

_PREFERRED_BLOCK: Final = 64 << 10
_LARGEST_BLOCK: Final = 32 << 20
_LONGEST_LIST: Final = 10_000  # exports; nbdkit refuses a longer one as a whole
_TOO_MANY_FILES: Final = "too many files are open in this nbdkit: raise its limit (LimitNOFILE, ulimit -Hn)"
_SHARE_OF_SILENT: Final = 0.5  # of all clients; the others have a disk open
_PR_SET_PDEATHSIG: Final = 1
_TYPES: Final = {
    ExtentKind.DATA: 0,
    ExtentKind.ZERO: nbdkit.EXTENT_ZERO,
    ExtentKind.HOLE: nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO,
}

_FAILURES: Final = (OSError, ImageError, ValueError, MemoryError)

parameters = Parameters()
_open: Final[set[Export]] = set()
_room: Final = Room()


# The process


def thread_model() -> int:
    """Several threads for each connection, unless a client that goes while it is owed answers ends nbdkit.

    nbdkit 1.32.4 to 1.33.9 aborts then ("Assertion `sock >= 0' failed"), with all its clients, if it has
    several threads and the client doesn't use TLS. Later ones have `disconnect`.
    """
    if parameters.parallel or hasattr(nbdkit, "disconnect"):
        return int(nbdkit.THREAD_MODEL_PARALLEL)
    return int(nbdkit.THREAD_MODEL_SERIALIZE_REQUESTS)


def config(key: str, value: str) -> None:
    global parameters  # noqa: PLW0603 - nbdkit gives one at a time
    parameters = parameters.with_value(key, value)


def config_complete() -> None:
    if not parameters.control:
        raise ValueError("control=PATH is missing: access.sock in the state directory of the gateway")


def after_fork() -> None:
    if parameters.outlive:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)
    heap.use_one_heap()
    pinning.prepare()
    stop_at_signals(nbdkit.shutdown, None if parameters.leash else PATIENCE_SECONDS)
    handshakes.watch(parameters.handshake, math.ceil(parameters.clients * _SHARE_OF_SILENT))
    if parameters.leash:
        leash.follow(int(parameters.leash))


def cleanup() -> None:
    """The server ends: connections that live are not closed by nbdkit, and threads may still be ending."""
    try:
        with contextlib.ExitStack() as closing:
            for export in list(_open):
                closing.callback(close, export)  # each, also if another can't be closed
    finally:
        pinning.unpin_all()


# Exports


def preconnect(readonly: bool) -> None:
    most = parameters.clients
    try:
        if most and not _room.is_there(most) and not handshakes.make_room():
            raise ConnectionRefusedError("too many clients are connected")
        if descriptors_run_short() and not handshakes.make_room():
            raise ConnectionRefusedError(_TOO_MANY_FILES)
        handshakes.clients_turn()
    except OSError as error:
        if error.errno == errno.EMFILE:
            raise ConnectionRefusedError(_TOO_MANY_FILES) from None
        raise


def list_exports(readonly: bool, is_tls: bool) -> list[tuple[str, str]]:
    # Who may see what is known only of a private socket: a list is asked for without a session.
    if not parameters.private:
        return []
    return patiently(partial(list_vdis, parameters.control), parameters.wait)[:_LONGEST_LIST]


def open(readonly: bool) -> Export:  # noqa: A001 - nbdkit wants it so
    handshakes.our_turn()
    try:
        export = _opened()
    except BaseException:
        handshakes.clients_turn()
        raise
    _open.add(export)
    scheduling.opened(export.vdi, export)
    return export


def _opened() -> Export:
    export = Export(_asked_name(), parameters)
    if descriptors_run_short():
        export.close()
        raise ConnectionRefusedError(_TOO_MANY_FILES)
    return export


def _asked_name() -> str:
    try:
        name: str = nbdkit.export_name()
    except UnicodeDecodeError:
        raise ExportNameError("the export name is no UTF-8") from None
    return name


def close(export: Export) -> None:
    _open.discard(export)
    scheduling.closed(export)
    try:
        with _told(export):
            export.close()
    finally:
        heap.give_back_soon()
        # After NBD_OPT_INFO the connection goes on; after requests its thread ends.
        handshakes.clients_turn()


def get_size(export: Export) -> int:
    return export.size


def block_size(export: Export) -> tuple[int, int, int]:
    return 1, _PREFERRED_BLOCK, _LARGEST_BLOCK


def is_rotational(export: Export) -> bool:
    return False


def can_write(export: Export) -> bool:
    return export.writable


def can_multi_conn(export: Export) -> bool:
    # A second connection to a disk that is written to is refused anyway.
    return not export.writable


def can_fast_zero(export: Export) -> bool:
    return True


# Requests


def pread(export: Export, buf: memoryview, offset: int, flags: int) -> None:
    try:
        this_thread.pinned  # noqa: B018 - the cheapest question there is
    except AttributeError:
        pinning.pin()
        scheduling.reads(export)
    try:
        export.read(buf, offset)
    except _FAILURES as error:
        _fail(export, error)


def pwrite(export: Export, buf: memoryview, offset: int, flags: int) -> None:
    try:
        this_thread.pinned  # noqa: B018
    except AttributeError:
        pinning.pin()
    try:
        export.disk.pwrite(buf, offset)
    except _FAILURES as error:
        _fail(export, error)


def flush(export: Export, flags: int) -> None:
    with _told(export):
        export.disk.flush()


def zero(export: Export, count: int, offset: int, flags: int) -> None:
    trim = bool(flags & nbdkit.FLAG_MAY_TRIM)
    if flags & nbdkit.FLAG_FAST_ZERO and not trim:
        # Space that has to stay reserved is written to.
        nbdkit.set_error(errno.EOPNOTSUPP)
        return
    with _told(export):
        export.disk.zero(offset, count, trim=trim)


def trim(export: Export, count: int, offset: int, flags: int) -> None:
    with _told(export):
        export.disk.zero(offset, count, trim=True)


def cache(export: Export, count: int, offset: int, flags: int) -> None:
    with _told(export):
        export.prefetch(offset, count)


def extents(export: Export, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    with _told(export):
        found = export.extents(offset, count, first_only=bool(flags & nbdkit.FLAG_REQ_ONE))
        return [(start, length, _TYPES[kind]) for start, length, kind in found]


@contextlib.contextmanager
def _told(export: Export) -> Iterator[None]:
    try:
        yield
    except _FAILURES as error:
        _fail(export, error)


def _fail(export: Export, error: Exception) -> NoReturn:
    """Let the client know; nbdkit logs the exception itself, and the supervisor wants one, not its causes."""
    nbdkit.set_error(nbd_errno(error))
    if isinstance(error, OSError) and has_remedy(error):
        raise RequestFailed(export.vdi, error) from None
    raise error from None
