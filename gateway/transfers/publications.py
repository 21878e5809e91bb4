"""Which VDIs are getting new content at this moment: between the rename of the file and the new content id.

A reader that opens the new file in this moment would send its bytes under the old ETag, and a client that
resumes its download later would glue two disks together. So a commit says which file it replaces, and a
reader that holds another one waits for the new content id.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import trio

from gateway.images.files import FileIdentity


@dataclass(frozen=True, slots=True)
class _Publication:
    replaced: FileIdentity
    done: trio.Event = field(default_factory=trio.Event)


class Publications:
    """The commits under way, by the VDI's reference; a lease lets one VDI have one at a time."""

    def __init__(self) -> None:
        self._running: Final[dict[str, _Publication]] = {}

    @contextmanager
    def publishing(self, vdi: str, replaced: FileIdentity) -> Iterator[None]:
        """From before the rename until the new content id is known; `replaced` is the file until then."""
        publication = self._running[vdi] = _Publication(replaced)
        try:
            yield
        finally:
            del self._running[vdi]
            publication.done.set()

    async def settled(self, vdi: str, leaf: FileIdentity) -> None:
        """Wait until the VDI's content id is that of `leaf`, which was opened by the VDI's name, or newer."""
        while (publication := self._running.get(vdi)) is not None and publication.replaced != leaf:
            await publication.done.wait()
