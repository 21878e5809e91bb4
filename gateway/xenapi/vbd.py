"""The class VBD: a virtual machine's use of a disk. No machine runs here, so there is none.

Clients that look after disks ask for them all the same, and learn that nothing is plugged. What uses a disk
here shows in VDI.current_operations.
"""

from __future__ import annotations

from typing import Any, Final

from gateway.core.errors import XenAPIError
from gateway.core.refs import NULL_REF
from gateway.xenapi.datamodel import ApiClass, fixed
from gateway.xenapi.types import BOOL, INT, STRING, STRING_MAP, Choice, MapOf, Reference, SetOf

MODE: Final = Choice("vbd_mode", ("RO", "RW"))
TYPE: Final = Choice("vbd_type", ("CD", "Disk", "Floppy"))
OPERATIONS: Final = Choice(
    "vbd_operations",
    ("attach", "eject", "insert", "plug", "unplug", "unplug_force", "pause", "unpause"),
)

FIELDS = (
    fixed("uuid", STRING, "", "unique identifier"),
    fixed("allowed_operations", SetOf(OPERATIONS), (), "what may be started now"),
    fixed("current_operations", MapOf(OPERATIONS, STRING), {}, "what is being done, by task"),
    fixed("VM", Reference("VM"), NULL_REF, "the virtual machine"),
    fixed("VDI", Reference("VDI"), NULL_REF, "the disk"),
    fixed("device", STRING, "", "the device that the machine sees"),
    fixed("userdevice", STRING, "", "its position among the machine's devices"),
    fixed("bootable", BOOL, False, "whether the machine may boot from it"),
    fixed("mode", MODE, "RO", "how the disk is mounted"),
    fixed("type", TYPE, "Disk", "how it appears to the machine"),
    fixed("unpluggable", BOOL, False, "whether it can be unplugged while the machine runs"),
    fixed("storage_lock", BOOL, False, "whether the storage has locked it"),
    fixed("empty", BOOL, False, "whether it is a drive without a medium"),
    fixed("other_config", STRING_MAP, {}, "additional configuration"),
    fixed("currently_attached", BOOL, False, "whether it is plugged now"),
    fixed("status_code", INT, 0, "error or success code of the last attach"),
    fixed("status_detail", STRING, "", "error or success information of the last attach"),
    fixed("runtime_properties", STRING_MAP, {}, "device properties"),
    fixed("qos_algorithm_type", STRING, "", "how it shares the storage"),
    fixed("qos_algorithm_params", STRING_MAP, {}, "parameters of that"),
    fixed("qos_supported_algorithms", SetOf(STRING), (), "what could be chosen for that"),
    fixed("metrics", Reference("VBD_metrics"), NULL_REF, "its metrics"),
)


class NoObjects:
    """The objects of a class that has none."""

    def __init__(self, class_name: str) -> None:
        self._class_name = class_name

    def __len__(self) -> int:
        return 0

    def all(self) -> list[Any]:
        return []

    def get(self, ref: str) -> Any:
        raise XenAPIError("HANDLE_INVALID", self._class_name, ref)

    def by_uuid(self, uuid: str) -> Any:
        raise XenAPIError("UUID_INVALID", self._class_name, uuid)


_NONE: Final = NoObjects("VBD")

VBD = ApiClass(
    name="VBD",
    doc="A virtual machine's use of a disk. There are none: no machine runs here.",
    fields=FIELDS,
    objects=lambda _estate: _NONE,
    named=False,
)
