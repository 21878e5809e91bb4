"""An image on an HTTP server becoming a new VDI: fetched, unpacked, stored, all or nothing.

The import is that of an upload; here is only what makes a body of a URL. One thread after the other works
on it, and each can be woken by whoever cancels.

Of a VDI that was made so, other_config says from where, and the checksum of the file. The trap: clients
write other_config, too, and copies and clones take it over. So it has a proof that only the gateway can
make, of the VDI's own uuid and of its content id, which is another one after the first write and which
nobody is told.
"""

import hashlib
import hmac
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import structlog
import trio

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder, LeaseMode
from gateway.images.errors import ImageError
from gateway.transfers.body import BodyReader
from gateway.transfers.decompressed import COMPRESSION_BYTES, Decompressed, compression_of
from gateway.transfers.formats import BodyFormat, corrupt_image
from gateway.transfers.import_disk import IntoSR, Sent, fill_target
from gateway.transfers.pull import ALGORITHMS, Checksum, Pull
from gateway.transfers.pull_connection import Client
from gateway.transfers.pull_socket import Interrupt, Patience
from gateway.transfers.pull_source import ImageURL
from gateway.transfers.thread import run_abortable

if TYPE_CHECKING:
    from gateway.core.records import VDI
    from gateway.core.tasks import Operation
    from gateway.repository.inventory import Inventory
    from gateway.transfers.pull_source import PullRules

log = structlog.get_logger("gateway.transfers.pull")

FROM_KEY: Final = "pulled-from"
CHECKSUM_KEY: Final = "pulled-checksum"
PROOF_KEY: Final = "pulled-proof"
REUSED_KEY: Final = "reused"

FORMATS: Final = tuple(each for each in BodyFormat if each is not BodyFormat.CHUNKED)
"""Those that a file can have."""

_CHECKSUM_FILE_BYTES: Final = 1 << 20
# Padding, and what programs append; more than that is not the end of an image.
_MOST_BEHIND: Final = 1 << 20
_PIECE_BYTES: Final = 64 << 10
_GNU_LINE: Final = re.compile(r"\\?([0-9A-Fa-f]+)(?:[ \t]+\*?(.*))?")
_BSD_LINE: Final = re.compile(r"(SHA256|SHA512) ?\((.*)\) ?= ?([0-9A-Fa-f]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is to be fetched, and what is to become of it.

    `checksum` None: whatever comes is taken. `reuse`: a VDI that was made of the same file before, and has
    not been written to since, is as good as a new one.
    """

    url: ImageURL
    sr: str
    name_label: str
    format: BodyFormat = BodyFormat.AUTO
    checksum: Checksum | ImageURL | None = None
    reuse: bool = False


@dataclass(frozen=True, slots=True)
class Terms:
    """Under which images are fetched: from where, how many at once, and within which limits."""

    rules: "PullRules"
    turns: trio.CapacityLimiter
    spool_bytes: int
    patience: Patience


async def pull_image(
    inventory: "Inventory", operation: "Operation", *, order: Order, who: str, terms: Terms
) -> str:
    """Make a VDI of the file, for `who`; its reference. All or nothing.

    As many images as `terms` has turns for are fetched at once; the others wait before they connect. Raises
    XenAPIError: PULL_ERROR_*, IMPORT_ERROR_*, SR_FULL, VDI_TOO_LARGE, SR_NOT_ATTACHED, OPERATION_NOT_ALLOWED.
    """
    if not inventory.repository(order.sr).writable:
        raise XenAPIError("OPERATION_NOT_ALLOWED", "the SR is attached read-only")
    async with terms.turns:
        interrupt = Interrupt()
        client = Client(terms.rules, terms.patience, interrupt)
        pull = Pull(order.url, client)
        operation.progress = lambda: pull.fraction() / 2
        operation.details = pull.told
        try:
            expected = await run_abortable(lambda: _expected(order, client), pull)
            if order.reuse and expected is not None:
                found = await _made_before(
                    inventory, order, expected, Holder(who, "import", "", operation.task)
                )
                if found is not None:
                    operation.details = lambda: {**pull.told(), REUSED_KEY: "true"}
                    return found
            sent = await run_abortable(lambda: _image(order, pull, expected), pull)

            def known(vdi: "VDI") -> dict[str, str]:
                assert pull.checksum is not None
                return {
                    FROM_KEY: str(order.url),
                    CHECKSUM_KEY: str(pull.checksum),
                    PROOF_KEY: _proof(vdi, pull.checksum, order.format),
                }

            target = IntoSR(
                inventory, order.sr, who, operation.task, name_label=order.name_label, known=known
            )
            ref = await fill_target(operation, sent=sent, target=target, spool_bytes=terms.spool_bytes)
            log.info("fetched", url=str(order.url), vdi=target.uuid, bytes=pull.received, task=operation.task)
        except XenAPIError as error:
            log.info("not fetched", url=str(order.url), task=operation.task, error=error.error_info)
            raise
        else:
            return ref
        finally:
            pull.close()
            interrupt.close()


# --- the file as a body


class _Unpacked(BodyReader):
    """A body within a file: nobody knows its length, so how far it is goes by the file."""

    def __init__(self, pull: Pull, body: Decompressed) -> None:
        super().__init__(body, None, end_is_told=True)
        self._pull = pull

    def fraction(self, expected: int) -> float:
        """As BodyReader.fraction."""
        return self._pull.fraction() if self._pull.length else super().fraction(expected)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Image(Sent):
    """The body, as an import takes it, and the file that it is in."""

    given: BodyReader
    pull: Pull

    @property
    def is_kept(self) -> bool:
        """As Sent.is_kept."""
        return True

    def reader(self) -> BodyReader:
        """As Sent.reader; there is one."""
        return self.given

    def finish(self) -> None:
        """As Sent.finish: what lies behind the image is read, too, since the checksum is of all of it."""
        left = _MOST_BEHIND
        with memoryview(bytearray(_PIECE_BYTES)) as view:
            while got := self.given.fill(view):
                left -= got
                if left < 0:
                    raise corrupt_image(self.format, f"more than {_MOST_BEHIND} bytes lie behind its end")
        self.pull.finish()


def _image(order: Order, pull: Pull, expected: Checksum | None) -> _Image:
    """Ask for the file, and look what it is compressed with. Blocks."""
    pull.open(expected)
    file = BodyReader(pull, pull.length, end_is_told=pull.end_is_told or expected is not None)
    begin = file.peek(COMPRESSION_BYTES)
    if not begin:
        raise XenAPIError("IMPORT_ERROR_PREMATURE_EOF", "1", "0")
    kind = compression_of(begin)
    # What is compressed may be several members, and a cut between two of them isn't seen.
    if not file.end_is_told:
        raise XenAPIError("PULL_ERROR_LENGTH_REQUIRED", str(order.url))
    given = file if kind is None else _Unpacked(pull, Decompressed(file, kind))
    return _Image(given.body, order.format, given.length, end_is_told=True, given=given, pull=pull)


# --- checksums


def _expected(order: Order, client: Client) -> Checksum | None:
    """The checksum that the file must have, from another file if need be. Blocks."""
    wanted = order.checksum
    if wanted is None or isinstance(wanted, Checksum):
        return wanted
    pull = Pull(wanted, client)
    try:
        pull.open()
        text = BodyReader(pull, None).peek(_CHECKSUM_FILE_BYTES + 1)
    finally:
        pull.close()
    name = order.url.name
    if len(text) > _CHECKSUM_FILE_BYTES:
        raise XenAPIError("PULL_ERROR_CHECKSUM_FILE", str(wanted), name, "it is too long for such a file")
    found = checksums_in(text.decode("utf-8", "replace"), name)
    if not found or len({each.algorithm for each in found}) < len(found):
        why = "there are several" if found else "none of its lines does"
        raise XenAPIError("PULL_ERROR_CHECKSUM_FILE", str(wanted), name, why)
    # Files with one of each kind are usual; the longer one says more.
    return max(found, key=lambda each: len(each.digits))


def checksums_in(text: str, name: str) -> set[Checksum]:
    """The checksums of the file `name` in what sha256sum and its kin, or BSD's programs, have written.

    Digits alone are those of the file if there is nothing else.
    """
    found: set[Checksum] = set()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in lines:
        if bsd := _BSD_LINE.fullmatch(line):
            checksum, of = Checksum.parse(f"{bsd[1]}:{bsd[3]}"), bsd[2]
        elif gnu := _GNU_LINE.fullmatch(line):
            algorithm = next((each for each, count in ALGORITHMS.items() if count == len(gnu[1])), "")
            checksum, of = Checksum.parse(f"{algorithm}:{gnu[1]}"), gnu[2]
            if of is None and len(lines) == 1:
                of = name
        else:
            continue
        if checksum is not None and of is not None and of.rpartition("/")[2] == name:
            found.add(checksum)
    return found


# --- VDIs that were made of the same file before


def _proof(vdi: "VDI", checksum: Checksum, name: BodyFormat) -> str:
    """What only who knows the content id can say of the VDI."""
    said = "\0".join((vdi.uuid, str(checksum), name))
    return hmac.new(vdi.content_id.encode(), said.encode(), hashlib.sha256).hexdigest()


async def _made_before(
    inventory: "Inventory", order: Order, checksum: Checksum, holder: Holder
) -> str | None:
    """A VDI of the SR that was made of this file and is as it was; None if there is none."""
    for vdi in inventory.records.vdis_of_sr(order.sr):
        if vdi.other_config.get(CHECKSUM_KEY) != str(checksum) or vdi.missing or not vdi.managed:
            continue
        proof = vdi.other_config.get(PROOF_KEY, "").encode()
        if not hmac.compare_digest(proof, _proof(vdi, checksum, order.format).encode()):
            continue
        try:
            lease = await inventory.lease(vdi, LeaseMode.READ, replace(holder, vdi=vdi.ref), 0)
        except (XenAPIError, ImageError, OSError):
            continue  # Somebody writes to it, or it can't be read: a new one does better.
        try:
            present = await inventory.vdi_under(vdi.ref, lease)
        finally:
            lease.release()
            with trio.CancelScope(shield=True):
                await lease.released()
        if present.content_id == vdi.content_id:
            return vdi.ref
    return None
