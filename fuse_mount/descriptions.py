"""How large the files of a VDI are, as the gateway says it without a lease, kept until the VDI changes.

The trap: an answer that is on its way when a VDI changes may be of before; who asks then asks anew.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import trio

from fuse_mount.questions import Questions
from gateway.access.client_describe import describe_vdi

_THREADS: Final = 4  # as many as the gateway answers at a time


@dataclass(frozen=True, slots=True)
class Description:
    """A VDI at one moment, in bytes. `stored_bytes` is how much of `size` is stored in any file of its chain.

    `vhd_size` and `qcow2_size` are 0 for a disk that the format can't hold.
    """

    content_id: str
    size: int
    stored_bytes: int
    vhd_size: int
    qcow2_size: int


class Descriptions:
    """What is known of the gateway's VDIs, by their uuids. `session` gives a session's reference or None."""

    def __init__(self, control_socket: str, session: Callable[[], str | None]) -> None:
        self._control_socket: Final = control_socket
        self._session: Final = session
        self._known: dict[str, Description] = {}
        self._last: dict[str, Description] = {}
        self._questions: Final = Questions(self._ask, self._keep)
        self._threads = trio.CapacityLimiter(_THREADS)

    def known(self, vdi: str) -> Description | None:
        """What is known of a VDI that hasn't changed since."""
        return self._known.get(vdi)

    def last_known(self, vdi: str) -> Description | None:
        """What was known last, though the VDI may have changed since."""
        return self._last.get(vdi)

    def forget(self, vdi: str) -> None:
        """The VDI has changed; what was known last is kept as that."""
        self._known.pop(vdi, None)
        self._questions.forget(vdi)

    def remove(self, vdi: str) -> None:
        """There is no such VDI any more."""
        self.forget(vdi)
        self._last.pop(vdi, None)

    async def describe(self, vdi: str) -> Description:
        """What is known, or what the gateway says; it is asked once for all who want to know.

        Raises AccessRefused, OSError.
        """
        return await self._questions.answer(vdi)

    async def _ask(self, vdi: str) -> Description:
        known = self._known.get(vdi)
        if known is not None:
            return known
        come = await trio.to_thread.run_sync(
            describe_vdi, self._control_socket, vdi, self._session(), limiter=self._threads
        )
        return Description(come.content_id, come.size, come.stored, come.vhd or 0, come.qcow2 or 0)

    def _keep(self, vdi: str, answer: Description) -> None:
        self._known[vdi] = self._last[vdi] = answer
