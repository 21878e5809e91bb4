"""What the gateway has: its SRs and VDIs as they were told last, and which of them are shown where.

Changes come from a `Feed`, which asks the gateway; here nothing waits and nothing is asked. A VDI is shown
if it is a disk of its own (managed), its image is there (not missing) and its SR is attached on this machine.
A snapshot stands with the VDI it was taken of as long as that is shown beside it, else in its SR. The trap:
what one record says may move other VDIs, so a change names all whose place has to be looked at again.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

_MOMENTARY: Final = frozenset({"allowed_operations", "current_operations"})


@dataclass(frozen=True, slots=True)
class Sr:
    """An SR; `ref` is its XenAPI reference."""

    ref: str
    uuid: str
    label: str


@dataclass(frozen=True, slots=True)
class Vdi:
    """A VDI as its record has it. Sizes in bytes; `sr` and `snapshot_of` are references, that of a VDI which
    is no snapshot names nothing. `record` is the whole XenAPI record as JSON.

    `has_data` is false for a snapshot whose data was destroyed: it has a record alone.
    """

    ref: str
    uuid: str
    label: str
    sr: str
    size: int
    stored: int
    snapshot_of: str = ""
    managed: bool = True
    missing: bool = False
    has_data: bool = True
    record: bytes = field(default=b"{}", repr=False)

    def lasts_as(self, other: "Vdi") -> bool:
        """Whether nothing is different but what is being done with the VDI."""
        if replace(self, record=other.record) != other:
            return False
        return self.record == other.record or _lasting(self.record) == _lasting(other.record)

    def document(self) -> bytes:
        """The content of record.json: the lasting record and its reference, keys in order.

        To read the disks beside it, as who copies the directory does, changes nothing in it.
        """
        content = {**_lasting(self.record), "ref": self.ref}
        return json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False).encode() + b"\n"


def _lasting(record: bytes) -> dict[str, Any]:
    """Without what changes whenever somebody begins or ends to use a VDI."""
    return {name: value for name, value in json.loads(record).items() if name not in _MOMENTARY}


@dataclass(frozen=True, slots=True)
class Changes:
    """What is new since the last time, by reference; None for what has gone.

    With `whole` it is everything there is, and what isn't named has gone. `attached` are the SRs that are
    attached on this machine now.
    """

    vdis: Mapping[str, Vdi | None]
    srs: Mapping[str, Sr | None]
    attached: frozenset[str]
    whole: bool = False


class Feed(Protocol):
    """Where changes come from."""

    @property
    def session(self) -> str | None:
        """The reference of the session in which disks are opened."""

    def wait(self) -> Changes:
        """Wait until something has changed; at first, and after anything was missed, all that there is.

        Blocks, in a thread. Returns now and then without a change. OSError while the gateway is away.
        """

    def close(self) -> None:
        """End the session. Blocks; called once `wait` isn't called any more, and raises nothing."""


@dataclass(frozen=True, slots=True)
class Touched:
    """References of what has to be looked at again."""

    srs: frozenset[str]
    vdis: frozenset[str]


class Catalogue:
    """The SRs and VDIs that are known. With `only`, uuids, no other VDIs than these and their snapshots."""

    def __init__(self, only: Iterable[str] | None = None) -> None:
        self.srs: Final[dict[str, Sr]] = {}
        self.vdis: Final[dict[str, Vdi]] = {}
        self._attached: frozenset[str] = frozenset()
        self._only = None if only is None else frozenset(only)
        self._by_sr: defaultdict[str, set[str]] = defaultdict(set)
        self._snapshots: defaultdict[str, set[str]] = defaultdict(set)

    def apply(self, changes: Changes) -> Touched:
        """Take over what has changed."""
        srs: dict[str, Sr | None] = dict(changes.srs)
        vdis: dict[str, Vdi | None] = dict(changes.vdis)
        if changes.whole:
            srs = {**dict.fromkeys(self.srs), **srs}
            vdis = {**dict.fromkeys(self.vdis), **vdis}
        changed_srs = {ref for ref, sr in srs.items() if self.srs.get(ref) != sr}
        changed_vdis = {ref for ref, vdi in vdis.items() if self.vdis.get(ref) != vdi}
        for ref in changed_srs:
            if (sr := srs[ref]) is None:
                del self.srs[ref]
            else:
                self.srs[ref] = sr
        changed_srs |= changes.attached ^ self._attached
        self._attached = changes.attached
        for ref in changed_vdis:
            self._replace(ref, vdis[ref])
        for sr_ref in changed_srs:
            changed_vdis |= self._by_sr.get(sr_ref, set())
        return Touched(frozenset(changed_srs), self._with_snapshots(changed_vdis))

    def _replace(self, ref: str, vdi: Vdi | None) -> None:
        before = self.vdis.pop(ref, None)
        if before is not None:
            _remove(self._by_sr, before.sr, ref)
            _remove(self._snapshots, before.snapshot_of, ref)
        if vdi is not None:
            self.vdis[ref] = vdi
            self._by_sr[vdi.sr].add(ref)
            self._snapshots[vdi.snapshot_of].add(ref)

    def _with_snapshots(self, refs: set[str]) -> frozenset[str]:
        found: set[str] = set()
        more = set(refs)
        while more:
            found |= more
            more = set().union(*(self._snapshots.get(ref, set()) for ref in more)) - found
        return frozenset(found)

    def shows_sr(self, ref: str) -> bool:
        """Whether this SR has a directory."""
        return ref in self.srs and ref in self._attached

    def home_of(self, ref: str) -> str | None:
        """Where the VDI's directory stands: the reference of its SR, or of the VDI that it is a snapshot of.
        None if it isn't shown.
        """
        if not self._shows(ref):
            return None
        vdi = self.vdis[ref]
        above = vdi.snapshot_of
        if self._shows(above) and self.vdis[above].sr == vdi.sr and ref not in self._line(above):
            return above
        return vdi.sr

    def _shows(self, ref: str) -> bool:
        vdi = self.vdis.get(ref)
        if vdi is None or not vdi.managed or vdi.missing or not self.shows_sr(vdi.sr):
            return False
        if self._only is None:
            return True
        return any(self.vdis[each].uuid in self._only for each in self._line(ref))

    def _line(self, ref: str) -> list[str]:
        """The VDI, what it is a snapshot of, and so on; records may be wrong and go round in a circle."""
        line: list[str] = []
        while ref in self.vdis and ref not in line:
            line.append(ref)
            ref = self.vdis[ref].snapshot_of
        return line


def _remove(index: defaultdict[str, set[str]], key: str, ref: str) -> None:
    index[key].discard(ref)
    if not index[key]:
        del index[key]
