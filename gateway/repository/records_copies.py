"""Keeps `records.json` of every writable SR up to date, behind everybody's back.

Nobody who changes a record waits for this: it watches the events, and writes at most once a second. A copy
that cannot be written is tried again; the database has everything meanwhile.
"""

from collections.abc import Mapping

import structlog
import trio

from gateway.core.errors import XenAPIError
from gateway.core.events import Events
from gateway.core.records import SR, VDI, Records
from gateway.core.threads import in_thread
from gateway.repository.records_file import encode_records
from gateway.repository.repository import Repository

log = structlog.get_logger("gateway.repository")

_PAUSE_SECONDS = 1.0
_RETRY_SECONDS = 30.0
_CLASSES = frozenset({"SR", "VDI"})


class RecordsCopies:
    """`attached` is the live view of the SRs that are attached here, by reference."""

    def __init__(self, records: Records, events: Events, attached: Mapping[str, Repository]) -> None:
        self._records = records
        self._events = events
        self._attached = attached
        self._written: dict[str, tuple[SR, list[VDI]]] = {}
        self._writing = trio.Lock()

    async def run(self) -> None:
        """Write what changes, for ever."""
        counter = self._events.counter
        await self._write_all()
        while True:
            with trio.move_on_after(_RETRY_SECONDS):
                await self._events.wait_past(counter)
            changes = self._events.since(counter)
            counter = self._events.counter
            if changes is None or not changes or any(change.class_name in _CLASSES for change in changes):
                await self._write_all()
            await trio.sleep(_PAUSE_SECONDS)

    async def write(self, sr: str) -> None:
        """Write the copy of one SR now, if it is writable and its records differ from the copy."""
        repository = self._attached.get(sr)
        if repository is None or not repository.writable or sr not in self._records.srs:
            return
        async with self._writing:
            record, vdis = self._records.srs.get(sr), self._records.vdis_of_sr(sr)
            # Each lease of a VDI is an event, and changes no record: nothing is encoded to find that out.
            if self._written.get(sr) == (record, vdis):
                return
            try:
                await repository.write_records(await in_thread(encode_records, record, vdis))
            except (OSError, XenAPIError, MemoryError) as error:
                why = str(error) or "no memory"
                log.warning("the copy of the records was not written", sr=record.uuid, why=why)
                return
            self._written[sr] = record, vdis

    def forget(self, sr: str) -> None:
        """The SR was detached: what its copy says then is not known."""
        self._written.pop(sr, None)

    async def _write_all(self) -> None:
        for sr in list(self._attached):
            await self.write(sr)
