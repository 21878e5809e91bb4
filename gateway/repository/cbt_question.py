"""From one VDI to a later one: between which images the question has to be put, and which logs know the rest.

The trap: a log that says it is complete is believed only for a snapshot. That of a VDI which is written to
was complete once, perhaps, before this gateway wrote to it.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import structlog

from gateway.core.errors import XenAPIError
from gateway.core.records import VDI, Records
from gateway.images.cbtlog import CbtHeader, all_changed
from gateway.repository.cbt_logs import CbtLogs
from gateway.repository.reconcile import CBT_METADATA
from gateway.repository.scan import ScannedImage

log = structlog.get_logger("gateway.repository")


class KnownVDIs:
    """What records and images of one SR say about its VDIs, by uuid."""

    def __init__(self, records: Records, images: Mapping[str, ScannedImage]) -> None:
        self._records: Final = records
        self._images: Final = images

    def find(self, uuid: str) -> VDI | None:
        """The record, if there is one."""
        with suppress(XenAPIError):
            return self._records.vdis.by_uuid(uuid)
        return None

    def is_fixed(self, uuid: str) -> bool:
        """Whether nobody ever writes to it."""
        vdi = self.find(uuid)
        return vdi is not None and vdi.is_a_snapshot

    def is_complete(self, uuid: str, header: CbtHeader) -> bool:
        """Whether its log says all."""
        return header.consistent and self.is_fixed(uuid)

    def has_image(self, uuid: str) -> bool:
        """Whether it has one, be it empty."""
        image = self._images.get(uuid)
        return image is not None and image.error is None

    def is_whole(self, uuid: str) -> bool:
        """Whether it has an image with all of its data."""
        vdi = self.find(uuid)
        return self.has_image(uuid) and (vdi is None or vdi.type != CBT_METADATA)

    def size(self, uuid: str, headers: Mapping[str, CbtHeader] | None = None) -> int:
        """The size of the disk in bytes; 0 if nobody knows."""
        image = self._images.get(uuid)
        if image is not None and image.error is None:
            return image.virtual_size
        if headers is not None and uuid in headers:
            return headers[uuid].size
        vdi = self.find(uuid)
        return 0 if vdi is None else vdi.virtual_size


@dataclass(slots=True)
class Question:
    """Of a disk of `size` bytes: `bits` are known already, the differences of `pairs` have to be added."""

    size: int
    bits: list[bytes] = field(default_factory=list)
    pairs: list[tuple[str, str]] = field(default_factory=list)


def ask(known: KnownVDIs, way: Sequence[str], headers: Mapping[str, CbtHeader], logs: CbtLogs) -> Question:
    """How it can be told what has changed along a way from log to log, with as few images as possible.

    Blocks. Raises SR_BACKEND_FAILURE_459 if the disk became smaller on the way, OSError.
    """
    sizes = [known.size(uuid, headers) for uuid in way]
    if sizes != sorted(sizes):
        problem = "Changed block tracking log is in an inconsistent state."
        raise sm_error(459, problem, "Inconsistent bitmaps")
    question = Question(sizes[-1])
    position = 0
    while position + 1 < len(way):
        here, following = way[position], way[position + 1]
        ends = [end for end in range(position + 1, len(way)) if known.is_whole(way[end])]
        from_images = known.has_image(here) and bool(ends)
        if from_images:
            question.pairs.append((here, way[ends[-1]]))
            position = ends[-1]
        else:
            position += 1
        if from_images and known.is_whole(here):
            continue
        # An emptied image lacks what it had by itself, or the image is gone: the next log knows it.
        kept = logs.read(following)
        if kept is None or not (from_images or known.is_complete(following, kept.header)):
            log.warning("what has changed is not known, so all of it", vdi=following, since=here)
            question.bits.append(all_changed(question.size))
        else:
            question.bits.append(kept.bits)
    return question


def sm_error(code: int, description: str, problem: str) -> XenAPIError:
    """An error of SM (XE_SR_ERRORCODES.xml: 66 VDIType, 459 and 460 of changed block tracking)."""
    return XenAPIError(f"SR_BACKEND_FAILURE_{code}", "", f"{description} [opterr={problem}]", "")
