"""One run of vdi-backup: a snapshot, what it has that the last one hadn't, and the last one's data can go.

The last generation's snapshot stays on the gateway with its data until the next generation is durable, for
the gateway makes the delta of the two. Whatever ends a run, the next one finds in the manifest what was
begun: a download that has some of its bytes is finished first, everything else is removed.

The traps: a snapshot may have been taken though its answer never came, so it has a mark of ours from its
first moment on; and nothing without such a mark is ever destroyed, whatever a manifest says. And a delta is
right only over what was backed up last: what the gateway says of changed blocks has to fit, or there is none.
"""

import base64
import contextlib
import os
import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from gateway.cli.backup_directory import Attempt, BackupDirectory, Generation, image_name
from gateway.cli.backup_image import DamagedError, ImageFile, check_tables, is_untouched
from gateway.cli.changed_blocks import changed_ranges
from gateway.cli.connection import CallRefusedError, Connection
from gateway.cli.download import Wanted, download
from gateway.cli.export_target import HashedFile
from gateway.cli.output import CommandError, size_text
from gateway.cli.progress import Display, Transfer
from gateway.cli.transfer_task import RefusedError
from gateway.images.qcow2.layout import BLOCK_SIZE

if TYPE_CHECKING:
    from array import array

MARK_KEY: Final = "vdi-gateway-backup"


class BrokenChainError(CommandError):
    """The last generation can't be gone on from, for this reason; a whole backup can still be made."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}; begin a new chain with --full")
        self.reason: Final = reason


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked of a run. With `full` a new chain is begun, with `or_full` if the last one is broken.

    With `keep` a chain ends with so many generations, and older chains go once there are so many without.
    """

    full: bool = False
    or_full: bool = False
    keep: int | None = None


class BackupRun:
    """Backups of one disk (`vdi`: its reference) into a directory that is locked."""

    def __init__(
        self,
        connection: Connection,
        vdi: str,
        directory: BackupDirectory,
        display: Display,
        transfer: Transfer,
        *,
        quiet: bool,
    ) -> None:
        self._connection = connection
        self._vdi = vdi
        self._directory = directory
        self._display = display
        self._transfer = transfer
        self._quiet = quiet

    def run(self, wish: Wish) -> list[Generation]:
        """What was made: one generation, and before it one that an earlier run had begun.

        Raises CommandError, BrokenChainError among them; KeyboardInterrupt leaves things as a crash does.
        """
        made = self._go_on(wish)
        self._discard_all()
        made.append(self._next(wish, begun=any(generation.base is None for generation in made)))
        self._release(wish)
        return made

    def _next(self, wish: Wish, *, begun: bool) -> Generation:
        """The disk as it is now; as a new chain if that is wanted and hasn't `begun`."""
        if not begun and (wish.full or self._is_long_enough(wish)):
            return self._take(None)
        try:
            newest = self._directory.manifest.newest
            return self._take(None if newest is None else self._sound(newest))
        except BrokenChainError as broken:
            if not wish.or_full:
                raise
            self._note(f"{broken.reason}: a new chain begins")
            return self._take(None)

    # What earlier runs left

    def _go_on(self, wish: Wish) -> list[Generation]:
        """Finish what was begun, if some of it is there; else it is to be discarded."""
        attempt = self._directory.manifest.attempt
        if attempt is None:
            return []
        snapshot = self._marked(attempt.mark)
        base = None if attempt.base is None else self._directory.manifest.newest
        fits = attempt.base is None or (not wish.full and base is not None and base.number == attempt.base)
        if fits and snapshot is not None and self._directory.has_part(snapshot["uuid"]):
            self._say(f"going on with the backup of {_time_of(snapshot)}, which was interrupted")
            with contextlib.suppress(BrokenChainError):
                return [self._fetch(snapshot, None if base is None else self._sound(base))]
        self._abandon(attempt, None if snapshot is None else snapshot["uuid"])
        return []

    def _marked(self, mark: str) -> dict[str, Any] | None:
        marked = (record for _, record in self._ours().values() if record["other_config"][MARK_KEY] == mark)
        return next(marked, None)

    def _ours(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """References and records, by uuid, of the disk's snapshots that a vdi-backup has taken."""
        return {
            record["uuid"]: (ref, record)
            for ref, record in self._records().items()
            if record["is_a_snapshot"]
            and record["snapshot_of"] == self._vdi
            and MARK_KEY in record["other_config"]
        }

    def _abandon(self, attempt: Attempt, snapshot: str | None) -> None:
        """Nothing comes of an attempt: what there is of it is to be discarded."""
        manifest = self._directory.manifest
        gone = [each for each in dict.fromkeys((attempt.snapshot, snapshot)) if each is not None]
        for each in gone:
            # At once: it may be what leaves no room for the manifest.
            self._directory.remove_files(each)
        # A snapshot that nobody knows may still be made, when those who write to the disk let it.
        discarded = (*manifest.discarded, *(gone or [attempt.mark]))
        self._directory.write(replace(manifest, attempt=None, discarded=discarded))

    def _discard_all(self, *, last: bool = False) -> None:
        """Remove what is to go, here and at the gateway; what can't be goes the next time.

        What the gateway doesn't know (yet) is looked for once more behind our own snapshot, which is made
        after all that were asked for before: that is the `last` time.
        """
        manifest = self._directory.manifest
        if not manifest.discarded:
            return
        ours, left = self._ours(), []
        marked = {record["other_config"][MARK_KEY]: uuid_ for uuid_, (_, record) in ours.items()}
        for each in manifest.discarded:
            snapshot = marked.get(each, each)
            self._directory.remove_files(snapshot)
            if snapshot not in ours:
                left += [] if last else [each]
            else:
                try:
                    self._connection.call("VDI.destroy", ours[snapshot][0])
                except CallRefusedError as refused:
                    self._note(f"the snapshot {snapshot} stays for now: {refused}")
                    left.append(snapshot)
        self._directory.write(replace(manifest, discarded=tuple(left)))

    # What a backup stands on

    def _is_long_enough(self, wish: Wish) -> bool:
        newest = self._directory.manifest.newest
        if wish.keep is None or newest is None:
            return False
        return len(self._directory.manifest.chain(newest.number)) >= wish.keep

    def _sound(self, newest: Generation) -> Generation:
        """The generation, if a delta may stand on it. BrokenChainError."""
        for generation in self._directory.manifest.chain(newest.number):
            self._check_file(generation)
        records = self._records()
        snapshots = [record for record in records.values() if record["uuid"] == newest.snapshot]
        what = f"the snapshot {newest.snapshot} of generation {newest.number}"
        if not snapshots:
            raise BrokenChainError(f"{what} is no longer on the gateway")
        if snapshots[0]["type"] == "cbt_metadata":
            raise BrokenChainError(f"the data of {what} was destroyed")
        if not records[self._vdi]["cbt_enabled"]:
            raise BrokenChainError(
                f"the disk's changes were no longer tracked after generation {newest.number}"
            )
        return newest

    def _check_file(self, generation: Generation) -> None:
        """Whether a file is as it was written. One that somebody has touched since is read."""
        path = os.path.join(self._directory.path, generation.file)
        if is_untouched(path, generation):
            return
        try:
            with ImageFile(path) as image:
                self._say(f"{generation.file} was copied or touched since it was backed up; it is read once")
                image.check(generation)
                modified = image.modified_ns
        except DamagedError as damaged:
            raise BrokenChainError(str(damaged)) from None
        except OSError as error:
            raise CommandError(f"{path}: {error.strerror}") from None
        manifest = self._directory.manifest
        same = replace(generation, modified_ns=modified)
        known = tuple(same if each is generation else each for each in manifest.generations)
        self._directory.write(replace(manifest, generations=known))

    # A generation

    def _take(self, base: Generation | None) -> Generation:
        if base is None:
            # A snapshot tells what has changed since the one before only if both were tracked.
            self._connection.call("VDI.enable_cbt", self._vdi)
        attempt = Attempt(str(uuid.uuid4()), None if base is None else base.number)
        self._directory.write(replace(self._directory.manifest, attempt=attempt))
        try:
            reference = self._connection.call("VDI.snapshot", self._vdi, {MARK_KEY: attempt.mark})
        except CallRefusedError:
            self._directory.write(replace(self._directory.manifest, attempt=None))
            raise
        snapshot: dict[str, Any] = self._connection.call("VDI.get_record", reference)
        attempt = replace(attempt, snapshot=snapshot["uuid"])
        self._directory.write(replace(self._directory.manifest, attempt=attempt))
        try:
            return self._fetch(snapshot, base)
        except BrokenChainError:
            self._abandon(attempt, None)
            self._discard_all()
            raise

    def _fetch(self, snapshot: dict[str, Any], base: Generation | None) -> Generation:
        """Download the image of a snapshot, and make it a generation."""
        uuid_, size = snapshot["uuid"], int(snapshot["virtual_size"])
        newest = self._directory.manifest.newest
        number = 1 if newest is None else newest.number + 1
        # Called like the disk, it would make the disk's name ambiguous.
        label = f"{self._directory.manifest.vdi.name_label} (generation {number})"
        self._connection.call("VDI.set_name_label", self._reference(uuid_), label)
        changed = [] if base is None else self._changed(base, snapshot)
        path = self._directory.image_path(uuid_)
        wanted = Wanted(uuid_, "qcow2", None if base is None else base.snapshot)
        try:
            with contextlib.closing(HashedFile(path, uuid_)) as target:
                download(self._connection, wanted, target, self._display, self._transfer)
                digest, etag = target.digest, target.etag or ""
        except RefusedError as refused:
            if base is None or refused.code != "EXPORT_ERROR_BASE_UNRELATED":
                raise
            raise BrokenChainError(
                f"the whole disk was replaced after generation {base.number}, as by an import"
            ) from None
        except OSError as error:
            raise CommandError(f"{path}: {error.strerror}") from None
        with ImageFile(path) as image:
            tables = image.tables()
            check_tables(image, tables, size, None if base is None else base.snapshot)
            file_size, modified = image.size, image.modified_ns
        if not _covers(tables.blocks, changed):
            raise BrokenChainError("the gateway's delta lacks blocks that it says have changed; report this")
        manifest = self._directory.manifest
        generation = Generation(
            number=number,
            time=_time_of(snapshot),
            snapshot=uuid_,
            file=image_name(uuid_),
            base=None if base is None else base.number,
            virtual_size=size,
            file_size=file_size,
            sha256=digest,
            etag=etag,
            modified_ns=modified,
        )
        known = (*manifest.generations, generation)
        self._directory.write(replace(manifest, generations=known, attempt=None))
        kind = "the whole disk" if base is None else f"what has changed since generation {base.number}"
        self._say(f"generation {generation.number}: {kind}, {size_text(file_size)} in {generation.file}")
        return generation

    def _changed(self, base: Generation, snapshot: dict[str, Any]) -> list[tuple[int, int]]:
        """The ranges of bytes that may differ from the base. BrokenChainError if the gateway can't say."""
        if int(snapshot["virtual_size"]) < base.virtual_size:
            raise BrokenChainError(f"the disk is smaller than in generation {base.number}; it was reverted")
        older, newer = self._reference(base.snapshot), self._reference(snapshot["uuid"])
        try:
            bits = self._connection.call("VDI.list_changed_blocks", older, newer)
        except CallRefusedError as refused:
            if refused.code == "SR_BACKEND_FAILURE_460":
                raise BrokenChainError(
                    f"the disk's changes were not tracked all the time since generation {base.number}"
                ) from None
            if refused.code == "SR_BACKEND_FAILURE_459":
                raise BrokenChainError(
                    f"the disk has been smaller since generation {base.number}; it was reverted"
                ) from None
            raise
        return changed_ranges(base64.b64decode(bits))

    # What can go

    def _release(self, wish: Wish) -> None:
        """Let go of older snapshots, and of chains that nobody asked to keep.

        The backup is made by then, so what can't be done is said, and tried the next time.
        """
        try:
            self._release_snapshots()
            self._drop_chains(wish)
            self._discard_all(last=True)
        except CommandError as error:
            self._note(f"the backup is made, but what is no longer needed stays for now: {error}")

    def _release_snapshots(self) -> None:
        """Of older snapshots the data goes, of those before the last also what is known of their changes."""
        *older, _ = self._directory.manifest.generations
        ours = self._ours()
        for generation in older:
            if generation.snapshot not in ours:
                continue
            reference, record = ours[generation.snapshot]
            if generation is not older[-1]:
                self._connection.call("VDI.destroy", reference)
            elif record["type"] != "cbt_metadata":
                try:
                    self._connection.call("VDI.data_destroy", reference)
                except CallRefusedError as refused:
                    if refused.code != "VDI_NO_CBT_METADATA":
                        raise
                    self._connection.call("VDI.destroy", reference)

    def _drop_chains(self, wish: Wish) -> None:
        manifest = self._directory.manifest
        if wish.keep is None:
            return
        generations = manifest.generations
        begins = [place for place, generation in enumerate(generations) if generation.base is None]
        kept = max((place for place in begins if len(generations) - place >= wish.keep), default=0)
        if kept:
            gone = tuple(generation.snapshot for generation in generations[:kept])
            self._say(f"generations {generations[0].number} to {generations[kept - 1].number} are removed")
            self._directory.write(
                replace(manifest, generations=generations[kept:], discarded=(*manifest.discarded, *gone))
            )

    def _reference(self, uuid_: str) -> str:
        reference: str = self._connection.call("VDI.get_by_uuid", uuid_)
        return reference

    def _records(self) -> dict[str, dict[str, Any]]:
        records: dict[str, dict[str, Any]] = self._connection.call("VDI.get_all_records")
        return records

    def _note(self, text: str) -> None:
        """What people have to know."""
        self._display.note(text)

    def _say(self, text: str) -> None:
        """What people may want to know."""
        if not self._quiet:
            self._display.note(text)


def _time_of(snapshot: dict[str, Any]) -> str:
    """When it was taken, in ISO 8601; XML-RPC has no dashes in it."""
    text = str(snapshot["snapshot_time"])
    if len(text) > 8 and text[:8].isdecimal():
        text = f"{text[:4]}-{text[4:6]}-{text[6:]}"
    return text if text.endswith("Z") else f"{text}Z"


def _covers(blocks: "array[int]", changed: list[tuple[int, int]]) -> bool:
    """Whether all changed ranges (bytes) lie in these blocks."""
    there = set(blocks) if changed else set()
    return all(
        number in there
        for start, stop in changed
        for number in range(start // BLOCK_SIZE, -(-stop // BLOCK_SIZE))
    )
