"""A file on an HTTP server as a Body: fetched once, in order, gone on with where a connection broke.

An attempt that goes on asks for the rest by Range, if the server has said by which ETag or date it knows
the file (If-Range). Where it can't, the file comes again from its begin, and what was taken already is held
against its digest: so the bytes are those of one file in every case. The digest is that of the bytes as the
server has them, and is looked at when the last of them has come, before anybody believes them.

The trap: who reads may stop before the last byte, as at the end of an image; `finish` reads the rest.
"""

import hashlib
import re
import select
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Final

from gateway.core.errors import XenAPIError
from gateway.transfers.pull_connection import LEAST_BYTES, Answer, Client
from gateway.transfers.pull_socket import Broken, Unreachable
from gateway.transfers.pull_source import ImageURL

ALGORITHMS: Final = {"sha256": 64, "sha512": 128}
"""The digits of each."""

_DISCARD_BYTES: Final = 256 << 10
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
_UNSATISFIED: Final = re.compile(r"bytes \*/(\d{1,18})")
# A date has whole seconds: a file may have changed again within them (RFC 9110, section 8.8.2.2).
_DATE_SECONDS: Final = 2


@dataclass(frozen=True, slots=True)
class Checksum:
    """What the file has to have: `sha256:` or `sha512:` and digits in lower case."""

    algorithm: str
    digits: str

    @classmethod
    def parse(cls, text: str) -> "Checksum | None":
        """None if it isn't one."""
        algorithm, _, digits = text.strip().partition(":")
        algorithm, digits = algorithm.strip().lower(), digits.strip().lower()
        if len(digits) != ALGORITHMS.get(algorithm) or not re.fullmatch(r"[0-9a-f]+", digits):
            return None
        return cls(algorithm, digits)

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.digits}"


class Pull:
    """One file, from the first request to its last byte. One thread works on it; others may abort it."""

    def __init__(self, url: ImageURL, client: Client) -> None:
        self.url: Final = url
        self.length: int | None = None
        """Bytes of the file, None as long as nobody has said it."""
        self.end_is_told = False
        self.received = 0
        self.checksum: Checksum | None = None
        """That of all of the file, once it has come."""
        self._client: Final = client
        self._expected: Checksum | None = None
        self._algorithm = "sha256"
        self._digest = hashlib.sha256()
        self._answer: Answer | None = None
        self._validator: str | None = None
        self._ends_with_answer = True
        self._failures = 0
        self._mark = 0

    # --- for everybody

    def abort(self) -> None:
        """As Body.abort."""
        self._client.interrupt.abort()

    def fraction(self) -> float:
        """How much has come, from 0.0 to 1.0; 0.0 as long as nobody knows of how much."""
        return min(1.0, self.received / self.length) if self.length else 0.0

    def told(self) -> dict[str, str]:
        """What a task tells of it."""
        told = {"pulled-from": str(self.url), "bytes-pulled": str(self.received)}
        return told if self.length is None else {**told, "bytes-to-pull": str(self.length)}

    # --- for the thread

    def close(self) -> None:
        """Break off what is under way. Repeatable; the thread must have ended."""
        if self._answer is not None:
            self._answer.close()

    def open(self, expected: Checksum | None = None) -> None:
        """Ask for the file; what it has to be is known from here on.

        Raises XenAPIError (PULL_ERROR_*) and TransferAborted.
        """
        self._expected = expected
        if expected is not None:
            self._algorithm = expected.algorithm
            self._digest = hashlib.new(expected.algorithm)
        self._attempt(None)

    def recv_into(self, view: memoryview) -> int:
        """As Body.recv_into; what can't be had after several attempts is a XenAPIError."""
        if self.length is not None:
            # An answer may have more in it than the file.
            view = view[: self.length - self.received]
        if not view or self.checksum is not None:
            return 0
        while True:
            assert self._answer is not None
            try:
                count = self._answer.recv_into(view)
                if not count:
                    self._require_all()
            except Broken as broken:
                self._attempt(broken)
                if self.checksum is not None:
                    return 0
                continue
            self._digest.update(view[:count])
            self.received += count
            if self.received - self._mark >= LEAST_BYTES:
                self._failures, self._mark = 0, self.received
            if self.received == self.length:
                self._require_no_more()
            if not count or self.received == self.length:
                self._end()
            return count

    def more_within(self, _seconds: float) -> bool:
        """Whether there is a further byte, however long it takes: the end is known."""
        return self.recv_into(memoryview(bytearray(1))) > 0

    def finish(self) -> None:
        """Read what nobody has read, and look at the checksum. Raises as recv_into."""
        with memoryview(bytearray(_DISCARD_BYTES)) as view:
            while self.recv_into(view):
                pass

    def _require_all(self) -> None:
        """An answer with a part of the rest is no more than that, nor one whose end may be a cut."""
        if self.received != self.length and not (self.length is None and self._ends_with_answer):
            raise Broken(self._broken_off(f"only a part of what was asked for came from {self.url.host}"))

    def _require_no_more(self) -> None:
        """What comes again without a length may be a longer file than the one whose length is known."""
        answer = self._answer
        assert answer is not None
        if answer.status == 200 and answer.length is None:
            with suppress(Broken), memoryview(bytearray(1)) as view:
                if answer.recv_into(view):
                    raise self._changed()

    def _end(self) -> None:
        found = Checksum(self._algorithm, self._digest.hexdigest())
        if self._expected is not None and found != self._expected:
            raise XenAPIError("PULL_ERROR_CHECKSUM", str(self.url), str(self._expected), str(found))
        self.checksum = found
        if self._answer is not None:
            self._answer.close()

    def _broken_off(self, why: str) -> XenAPIError:
        return XenAPIError("PULL_ERROR_BROKEN_OFF", str(self.url), str(self.received), why)

    # --- attempts

    def _attempt(self, broken: Broken | None) -> None:
        """Get an answer that goes on where this has stopped, after one that broke off if one did."""
        pauses = self._client.patience.pauses
        while True:
            if broken is not None:
                if self._answer is not None:
                    self._answer.close()
                if self._failures >= len(pauses):
                    error = broken.error
                    if error.code == "PULL_ERROR_BROKEN_OFF":
                        error = self._broken_off(error.params[2])
                    raise error from broken
                self._client.interrupt.wait(None, select.POLLIN, pauses[self._failures])
                self._failures += 1
            try:
                if self.received:
                    self._go_on()
                else:
                    self._begin()
            except Unreachable as unreachable:
                # Who has never answered is more likely mistyped than ill.
                if broken is None:
                    raise unreachable.error from unreachable
                broken = unreachable
            except Broken as again:
                broken = again
            else:
                return

    def _begin(self) -> None:
        is_first = self._answer is None
        answer = self._get({})
        if answer.status != 200:
            raise XenAPIError("PULL_ERROR_STATUS", str(answer.url), str(answer.status))
        self._require_plain(answer)
        if not is_first and (answer.length, answer.end_is_told) != (self.length, self.end_is_told):
            # Who reads goes by what the first answer said.
            raise self._changed()
        self.length, self.end_is_told = answer.length, answer.end_is_told
        self._validator = _validator(answer)
        if self.length == 0:
            self._end()

    def _get(self, headers: dict[str, str]) -> Answer:
        self._answer = self._client.get(self.url, headers)
        return self._answer

    def _require_plain(self, answer: Answer) -> None:
        """Refuse what was encoded though nobody asked for it. Servers call a file's own form gzip, too."""
        coding = (answer.header("content-encoding") or "identity").strip().lower()
        if coding not in ("identity", "gzip", "x-gzip", "xz", "x-xz", "zstd"):
            raise XenAPIError("PULL_ERROR_NOT_HTTP", str(answer.url), f"it is encoded as {coding[:50]}")

    def _go_on(self) -> None:
        headers: dict[str, str] = {}
        if self._validator is not None:
            headers = {"Range": f"bytes={self.received}-", "If-Range": self._validator}
        answer = self._get(headers)
        if answer.status == 206:
            self._require_rest(answer)
        elif answer.status == 416:
            self._require_end(answer)
        else:
            self._require_same_begin(answer)

    def _require_rest(self, answer: Answer) -> None:
        found = _CONTENT_RANGE.fullmatch(answer.header("content-range") or "")
        if found is None or int(found[1]) != self.received:
            raise XenAPIError(
                "PULL_ERROR_NOT_HTTP", str(answer.url), "it sends another range than was asked for"
            )
        total = None if found[3] == "*" else int(found[3])
        if None not in (self.length, total) and total != self.length:
            raise self._changed()
        # Some servers do as Range says and don't know If-Range.
        known = self._validator
        named_by = "last-modified" if known is None or not known.startswith('"') else "etag"
        if known is not None and answer.header(named_by) not in (None, known):
            raise self._changed()
        if self.length is None:
            self.length = total
        # Without a total there may be more behind this part: who asks for that learns it.
        self._ends_with_answer = False

    def _require_end(self, answer: Answer) -> None:
        """There is nothing behind what has come: that is its end, unless more was promised."""
        found = _UNSATISFIED.fullmatch(answer.header("content-range") or "")
        if self.length is not None or found is None or int(found[1]) != self.received:
            raise self._changed()
        self._end()

    def _require_same_begin(self, answer: Answer) -> None:
        """The whole file came again; what was taken already has to be its begin. Raises Broken."""
        self._require_plain(answer)
        if answer.length is not None and self.length is not None and answer.length != self.length:
            raise self._changed()
        digest = hashlib.new(self._algorithm)
        left = self.received
        with memoryview(bytearray(_DISCARD_BYTES)) as view:
            while left:
                count = answer.recv_into(view[: min(left, len(view))])
                if not count:
                    raise self._changed()
                digest.update(view[:count])
                left -= count
        if digest.digest() != self._digest.digest():
            raise self._changed()
        self._validator = _validator(answer)
        self._ends_with_answer = answer.end_is_told or not self.end_is_told

    def _changed(self) -> XenAPIError:
        return XenAPIError("PULL_ERROR_CHANGED", str(self.url), str(self.received))


def _validator(answer: Answer) -> str | None:
    """What the server knows this state of the file by, as If-Range may have it; None if it says nothing."""
    tag = answer.header("etag")
    if tag is not None:
        return tag if re.fullmatch(r'"[!#-~]*"', tag) else None
    changed, now = answer.header("last-modified"), answer.header("date")
    try:
        if changed is None or now is None or not re.fullmatch(r"[ -~]+", changed):
            return None
        age = parsedate_to_datetime(now) - parsedate_to_datetime(changed)
    except (TypeError, ValueError):
        return None
    return changed if age.total_seconds() >= _DATE_SECONDS else None
