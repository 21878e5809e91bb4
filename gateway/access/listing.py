"""The VDIs that a client of the control socket could open, as pages that are short enough for a message.

The trap: a name may be of any length and of any characters, which takes up to twelve bytes each in JSON.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from gateway.access.protocol import NAME_LENGTH, PAGE, Listed
from gateway.access.server_link import printable
from gateway.repository.inventory import Where

if TYPE_CHECKING:
    from gateway.repository.inventory import Inventory


def listed(inventory: "Inventory") -> Iterator[Listed]:
    """Pages of what could be opened for reading: in SRs that are attached here, and no hidden parents."""
    found = [
        (vdi.name_label, vdi.uuid)
        for vdi in inventory.records.vdis.all()
        if vdi.managed and not vdi.missing and inventory.where_is(vdi.sr) is Where.LOCAL
    ]
    entries = [(uuid, printable(name)[:NAME_LENGTH]) for name, uuid in sorted(found)]
    pages = [tuple(entries[at : at + PAGE]) for at in range(0, len(entries), PAGE)] or [()]
    for page in pages:
        yield Listed(page, page is pages[-1])
