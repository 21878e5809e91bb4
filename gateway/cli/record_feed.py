"""What changes at the gateway, for the mount: event.from over JSON-RPC through the Unix socket.

Blocking; runs in a thread of the mount. The first answer has every object, the following ones what has
changed. The trap: after a restart of the gateway, or when too much has happened, the answer to an old token
has all that is there and says nothing of what has gone; that shows in `valid_ref_counts`, and then everything
is asked for once more.
"""

import contextlib
import http.client
import socket
import threading
from typing import Any, Final

import msgspec

from fuse_mount.catalogue import Changes, Sr, Vdi
from gateway.cli.connection import DoorHTTPConnection, error_text
from gateway.cli.door import Door
from gateway.cli.output import CommandError

WAIT_SECONDS: Final = 30.0
"""How long the gateway waits for something to happen."""

ANSWER_SECONDS: Final = 60.0
CLASSES: Final = ("VDI", "SR", "PBD")
_NO_DATA: Final = "cbt_metadata"
_ENDED: Final = ("SESSION_INVALID", "SESSION_AUTHENTICATION_FAILED")


class FeedRefused(OSError):  # noqa: N818 - an answer, not a fault
    """The gateway refused a call: its code, and a sentence."""

    def __init__(self, method: str, code: str, details: list[str]) -> None:
        super().__init__(error_text(method, code, details))
        self.code: Final = code


class _Event(msgspec.Struct):
    class_name: str = msgspec.field(name="class")
    operation: str
    ref: str
    snapshot: msgspec.Raw = msgspec.Raw(b"{}")


class _Batch(msgspec.Struct):
    token: str
    events: list[_Event]
    valid_ref_counts: dict[str, int]


class _Error(msgspec.Struct):
    message: str
    data: list[str]


class _Answer(msgspec.Struct):
    result: msgspec.Raw = msgspec.Raw(b"null")
    error: _Error | None = None


class _VdiRecord(msgspec.Struct):
    uuid: str
    name_label: str
    sr: str = msgspec.field(name="SR")
    virtual_size: int
    physical_utilisation: int
    type: str
    managed: bool
    missing: bool
    snapshot_of: str


class _SrRecord(msgspec.Struct):
    uuid: str
    name_label: str


class _PbdRecord(msgspec.Struct):
    host: str
    sr: str = msgspec.field(name="SR")
    currently_attached: bool


class RecordFeed:
    """A `fuse_mount.catalogue.Feed`. Logs in when it is made: FeedRefused, OSError."""

    def __init__(self, door: Door, user: str, password: str) -> None:
        self._door = door
        self._user = user
        self._password = password
        self._connection = _Connection(door)
        self._token = ""
        # The references that are known, by class, since counts are all that tells of what has gone.
        self._known: dict[str, set[str]] = {name.lower(): set() for name in CLASSES}
        self._attached: dict[str, str] = {}  # SRs by the PBDs that attach them here
        self._session: str | None = None
        self._host = ""
        try:
            self._log_in()
        except BaseException:
            self._connection.end()
            raise

    @property
    def session(self) -> str | None:
        """The reference of the session; another one once it had ended and was begun anew."""
        return self._session

    def wait(self) -> Changes:
        """What has changed. OSError while the gateway is away, FeedRefused if it refuses."""
        try:
            batch = self._ask()
        except FeedRefused as refused:
            if refused.code not in _ENDED:
                raise
            self._log_in()
            batch = self._ask()
        changes = self._taken(batch, whole=not self._token)
        if {name: len(refs) for name, refs in self._known.items()} != batch.valid_ref_counts:
            batch = self._ask(anew=True)
            changes = self._taken(batch, whole=True)
        self._token = batch.token
        return changes

    def close(self) -> None:
        """Log out, once. A thread that is waiting is woken: its connection breaks."""
        self._connection.end()
        session, self._session = self._session, None
        if session is not None:
            last = _Connection(self._door)
            with contextlib.suppress(OSError):
                last.call("session.logout", session)
            last.end()

    def _ask(self, *, anew: bool = False) -> _Batch:
        token = "" if anew else self._token
        seconds = WAIT_SECONDS if token else 0.0
        answer = self._call("event.from", self._session, list(CLASSES), token, seconds)
        return msgspec.json.decode(answer, type=_Batch)

    def _taken(self, batch: _Batch, *, whole: bool) -> Changes:
        vdis: dict[str, Vdi | None] = {}
        srs: dict[str, Sr | None] = {}
        if whole:
            for refs in self._known.values():
                refs.clear()
            self._attached.clear()
        for event in batch.events:
            gone = event.operation == "del"
            if gone:
                self._known[event.class_name].discard(event.ref)
            else:
                self._known[event.class_name].add(event.ref)
            match event.class_name:
                case "vdi":
                    vdis[event.ref] = None if gone else _vdi(event)
                case "sr":
                    srs[event.ref] = None if gone else _sr(event)
                case "pbd":
                    self._attached.pop(event.ref, None)
                    if not gone:
                        pbd = msgspec.json.decode(event.snapshot, type=_PbdRecord)
                        if pbd.currently_attached and pbd.host == self._host:
                            self._attached[event.ref] = pbd.sr
        return Changes(vdis, srs, frozenset(self._attached.values()), whole)

    def _log_in(self) -> None:
        self._session = msgspec.json.decode(
            self._call("session.login_with_password", self._user, self._password, "1.0", "vdi-gateway mount"),
            type=str,
        )
        self._host = msgspec.json.decode(
            self._call("session.get_this_host", self._session, self._session), type=str
        )

    def _call(self, method: str, *parameters: Any) -> msgspec.Raw:
        return self._connection.call(method, *parameters)


class _Connection:
    """One connection, opened when it is needed. One thread calls; another one may end it meanwhile."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._guard = threading.Lock()
        self._http: DoorHTTPConnection | None = None
        self._calling = False
        self._ended = False

    def call(self, method: str, *parameters: Any) -> msgspec.Raw:
        """The result of one call as JSON. FeedRefused, ConnectionError."""
        body = msgspec.json.encode({"jsonrpc": "2.0", "id": 1, "method": method, "params": parameters})
        http_connection = self._begin()
        try:
            http_connection.request("POST", "/jsonrpc", body, {"Content-Type": "application/json"})
            self._expect_answer()
            answer = msgspec.json.decode(http_connection.getresponse().read(), type=_Answer)
        except (http.client.HTTPException, OSError, CommandError, msgspec.DecodeError) as error:
            self._finish(broken=True)
            text = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ConnectionError(text) from error
        except BaseException:
            self._finish(broken=True)
            raise
        self._finish(broken=False)
        if answer.error is not None:
            raise FeedRefused(method, answer.error.message, answer.error.data)
        return answer.result

    def end(self) -> None:
        """Close it; if a thread waits for an answer, that one closes it, and gets a ConnectionError."""
        with self._guard:
            self._ended = True
            if self._http is None:
                return
            if not self._calling:
                self._http.close()
            elif self._http.sock is not None:
                with contextlib.suppress(OSError):
                    self._http.sock.shutdown(socket.SHUT_RDWR)

    def _expect_answer(self) -> None:
        """ConnectionError if it was ended, maybe before there was a socket to shut down."""
        if self._ended:
            raise ConnectionError("the connection was ended")

    def _begin(self) -> DoorHTTPConnection:
        with self._guard:
            self._expect_answer()
            if self._http is None:
                self._http = DoorHTTPConnection(self._door, ANSWER_SECONDS)
            self._calling = True
            return self._http

    def _finish(self, *, broken: bool) -> None:
        with self._guard:
            self._calling = False
            if self._http is not None and (broken or self._ended):
                self._http.close()
                self._http = None


def _vdi(event: _Event) -> Vdi:
    record = msgspec.json.decode(event.snapshot, type=_VdiRecord)
    return Vdi(
        event.ref,
        record.uuid,
        record.name_label,
        record.sr,
        record.virtual_size,
        record.physical_utilisation,
        record.snapshot_of,
        record.managed,
        record.missing,
        record.type != _NO_DATA,
        bytes(event.snapshot),
    )


def _sr(event: _Event) -> Sr:
    record = msgspec.json.decode(event.snapshot, type=_SrRecord)
    return Sr(event.ref, record.uuid, record.name_label)
