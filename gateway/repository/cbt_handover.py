"""Before an SR is detached: its logs of changed blocks get all that the images say, for who reads only them.

XenServer ORs the logs from one VDI to a later one and looks at no image, so a log whose bits stayed here
would tell it too little. Those of snapshots become complete. That of a VDI gets what has changed so far, and
goes on saying that it isn't complete: whoever attaches the SR next may write before he looks.

The trap: the SR's own lock is held here, so nobody may wait for that one under the lock on its logs.
"""

import structlog

from gateway.core.errors import XenAPIError
from gateway.core.leases import Holder
from gateway.core.threads import in_thread
from gateway.images.errors import ImageError
from gateway.repository.cbt_logs import CbtLogs
from gateway.repository.changed_blocks import ChangedBlocks
from gateway.repository.repository import Repository

log = structlog.get_logger("gateway.repository")


class CbtHandover(ChangedBlocks):
    """The part of the inventory that leaves the logs of changed blocks to others."""

    async def _hand_over(self, sr: str) -> None:
        await super()._hand_over(sr)
        repository = self._attached.get(sr)
        if repository is not None and repository.writable:
            async with self._logs_of(sr):
                await self._complete_logs(repository)

    async def _complete_logs(self, repository: Repository) -> None:
        known = self._known(repository)
        headers = await in_thread(CbtLogs(repository.directory, repository.files).headers)
        for uuid, header in headers.items():
            vdi = known.find(uuid)
            if vdi is None or header.consistent:
                continue
            holder = Holder("the gateway", "detach", vdi.ref)
            try:
                if known.is_fixed(uuid):
                    await self._seal(repository, uuid, holder, None)
                elif header.parent is not None and header.parent in headers:
                    await self._note(repository, uuid, header.parent, holder)
            except (XenAPIError, ImageError, OSError) as error:
                log.warning("the log of changed blocks tells others too little", vdi=uuid, why=str(error))

    async def _note(self, repository: Repository, uuid: str, since: str, holder: Holder) -> None:
        """Add what has changed so far to the log of a VDI that may go on changing."""
        logs = CbtLogs(repository.directory, repository.files)
        kept = await in_thread(logs.read, uuid)
        if kept is None:
            return
        more = kept.add(await self._bits_between(repository, since, uuid, holder, None))
        if more != kept:
            await in_thread(logs.write, uuid, more)
