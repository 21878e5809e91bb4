"""What the records of an SR should say, given its files, the database and the copy of the records in the SR.

A pure function: it decides, and Inventory writes. The database is believed first, then the copy, then the
files alone; but for what a file is (sizes, parent, hidden or not) only the file is believed.

The trap: a file that changed while nobody looked is other content under an old name. Its stamp tells, and
then the VDI gets a new content id, or downloads that go on would be glued together from two disks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

from gateway.core.records import SR, VDI
from gateway.core.refs import is_ref, new_ref, new_uuid
from gateway.repository.records_file import STAMP_KEY, newer
from gateway.repository.scan import ScannedImage, ScanResult

CBT_METADATA: Final = "cbt_metadata"
"""The type of a snapshot whose data is destroyed: of its image at most a hidden, empty rest is there."""

PARENT_KEY: Final = "vhd-parent"
TYPE_KEY: Final = "vdi_type"
# Set on a VDI that is read-only only because its SR is attached so.
READ_ONLY_KEY: Final = "read-only-attach"


@dataclass(slots=True)
class Reconciled:
    """What to write: new records, changed fields by reference, and what is wrong, a sentence each."""

    add: list[VDI] = field(default_factory=list)
    change: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def reconcile(
    sr: SR,
    scan: ScanResult,
    database: Sequence[VDI],
    copy: Sequence[VDI] = (),
    *,
    writable: bool,
    elsewhere: Callable[[str], SR | None],
    is_written: Callable[[VDI], bool],
    ref_is_free: Callable[[str], bool],
) -> Reconciled:
    """Compare everything that is known of `sr`.

    `elsewhere` gives the other SR that has a VDI of this uuid; `is_written` says that somebody here writes to
    the VDI in place now, which changes its file without changing whose content it is.
    """
    result = Reconciled()
    known = {vdi.uuid: vdi for vdi in database}
    copies = {vdi.uuid: vdi for vdi in copy}
    given: set[str] = set()
    parents = {image.parent for image in scan.images.values()}

    def referred(kept: VDI) -> VDI:
        """References are kept where they can be, since clients have them and snapshots point to them."""
        free = is_ref(kept.ref) and kept.ref not in given and ref_is_free(kept.ref)
        ref = kept.ref if free else new_ref()
        given.add(ref)
        return replace(kept, ref=ref, sr=sr.ref)

    for uuid, image in scan.images.items():
        record = known.get(uuid)
        if image.error is not None:
            result.problems.append(f"{image.name}: {image.error}")
            continue
        if record is not None:
            wanted = record
            if uuid in copies:
                kept = newer(record, copies[uuid], image.stamp)
                wanted = replace(kept, ref=record.ref, uuid=record.uuid, sr=sr.ref)
            wanted = described(wanted, image, writable=writable, written=is_written(record))
            if wanted is not record and (changes := _differences(record, wanted)):
                result.change[record.ref] = changes
            continue
        other = elsewhere(uuid)
        if other is not None:
            result.problems.append(
                f"{image.name}: the VDI {uuid} is in the SR {other.uuid} ({other.name_label}) already; "
                "give one of the two files another uuid"
            )
            continue
        is_left = uuid in copies and copies[uuid].type == CBT_METADATA and uuid in scan.logs
        if image.hidden and not is_left and uuid not in parents:
            continue  # what SM has given up and not yet removed
        new = referred(copies[uuid]) if uuid in copies else VDI(ref=new_ref(), uuid=uuid, sr=sr.ref)
        result.add.append(described(new, image, writable=writable, written=False))
    for uuid, kept in copies.items():
        # A snapshot whose data is destroyed needs no image, but has a log.
        if (
            kept.type == CBT_METADATA
            and uuid in scan.logs
            and uuid not in known
            and uuid not in scan.images
            and elsewhere(uuid) is None
        ):
            result.add.append(referred(kept))
    result.problems.extend(scan.misnamed())
    for uuid, record in known.items():
        if uuid not in scan.images and not record.missing and record.type != CBT_METADATA:
            result.change[record.ref] = {"missing": True}
    return result


def described(vdi: VDI, image: ScannedImage, *, writable: bool, written: bool) -> VDI:
    """The record with everything that the file itself says; the same object if it says so already, as nearly
    all of thousands do.

    `written`: the file is being written to in place, so its stamp says nothing about the content id.
    """
    sm_config = dict(vdi.sm_config)
    sm_config[TYPE_KEY] = "vhd" if image.format == "vhd" else "aio"
    if image.parent is None:
        sm_config.pop(PARENT_KEY, None)
    else:
        sm_config[PARENT_KEY] = image.parent
    content_id = vdi.content_id
    if not written:
        if not content_id or sm_config.get(STAMP_KEY) != str(image.stamp):
            content_id = new_uuid()
        sm_config[STAMP_KEY] = str(image.stamp)
    read_only = vdi.read_only
    if not writable and not read_only:
        read_only = True
        sm_config[READ_ONLY_KEY] = "true"
    elif writable and sm_config.pop(READ_ONLY_KEY, None) is not None:
        read_only = False
    said: dict[str, Any] = {
        "virtual_size": image.virtual_size,
        "physical_utilisation": image.physical_utilisation,
        "image_format": image.format,
        "location": vdi.uuid,
        "managed": not image.hidden or vdi.type == CBT_METADATA,
        "missing": False,
        "read_only": read_only,
        "content_id": content_id,
        "sm_config": sm_config,
    }
    changes = {name: value for name, value in said.items() if getattr(vdi, name) != value}
    return replace(vdi, **changes) if changes else vdi


def _differences(before: VDI, after: VDI) -> dict[str, Any]:
    return {
        item.name: getattr(after, item.name)
        for item in fields(VDI)
        if getattr(after, item.name) != getattr(before, item.name)
    }
