"""Inodes and directories over the catalogue. No pyfuse3 here, nothing waits.

    DIR/<SR>/<VDI>/disk.raw disk.vhd disk.qcow2 record.json partitions/<n>.raw snapshots/<snapshot>/…
    DIR/by-uuid/<uuid> -> the VDI's directory

Each SR and VDI is a node with a number of its own; an inode is that number and a place within the node, so
the files of a VDI cost nothing until somebody looks at them, and an inode means the same for the life of the
mount. The trap: the kernel goes on using an inode after its VDI has gone, until it forgets it; so a node
stays as long as the kernel has looked it up more often than it has forgotten.

The other trap: what is sent by sendfile(2) or mapped stays in the kernel's memory, by inode. So while files
are open on what a VDI was, those of what it is now get inodes of another number: see `Tree.renew`.
"""

import time
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import Final, NamedTuple

from fuse_mount.catalogue import Catalogue, Changes, Sr, Vdi
from fuse_mount.names import Names

ROOT_INODE: Final = 1
_PLACE_BITS: Final = 16
_BY_UUID: Final = b"by-uuid"


class Place(IntEnum):
    """What an inode is within its node. Partition n is FIRST_PARTITION + n."""

    DIRECTORY = 0
    ROOT = 1
    BY_UUID = 2
    RAW = 3
    VHD = 4
    QCOW2 = 5
    RECORD = 6
    PARTITIONS = 7
    SNAPSHOTS = 8
    LINK = 9
    FIRST_PARTITION = 16


LARGEST_PARTITION: Final = (1 << _PLACE_BITS) - 1 - Place.FIRST_PARTITION

FILES: Final = {
    b"disk.raw": Place.RAW,
    b"disk.vhd": Place.VHD,
    b"disk.qcow2": Place.QCOW2,
    b"record.json": Place.RECORD,
}
DIRECTORIES: Final = frozenset(
    {Place.DIRECTORY, Place.ROOT, Place.BY_UUID, Place.PARTITIONS, Place.SNAPSHOTS}
)

_CONTENT: Final = frozenset({Place.RAW, Place.VHD, Place.QCOW2})


class Siblings:
    """The nodes in one directory, by their names."""

    def __init__(self, reserved: Iterable[str] = ()) -> None:
        self.names: Final = Names(reserved)
        self.nodes: Final[dict[bytes, SrNode | VdiNode]] = {}


class SrNode:
    """An SR's directory."""

    def __init__(self, number: int, sr: Sr) -> None:
        self.number: Final = number
        self.sr = sr
        self.name = b""
        self.changed_ns = time.time_ns()
        self.children: Final = Siblings()
        self.lookups = 0
        self.gone = False

    @property
    def path(self) -> bytes:
        return self.name

    @property
    def numbers(self) -> list[int]:
        """All numbers that its inodes have."""
        return [self.number]


class VdiNode:
    """A VDI's directory and all that is in it. `changed_ns`: when its record was seen to change, in
    nanoseconds since 1970.

    To read a disk is no change of it: backup programs compare the time with that of their last copy, and with
    that before they began to read.
    """

    def __init__(self, number: int, vdi: Vdi, home: "SrNode | VdiNode") -> None:
        self.number: Final = number
        self.numbers: Final = [number]
        """All numbers that its inodes have or had; the last is that of the files with the disk's bytes."""
        self.content: object = None
        """What the files of the last number were opened on last."""
        self.vdi = vdi
        self.home = home
        self.name = b""
        self.changed_ns = time.time_ns()
        self.children: Final = Siblings()
        self.lookups = 0
        self.gone = False
        self._document: tuple[Vdi, bytes] | None = None

    @property
    def document(self) -> bytes:
        """The content of record.json."""
        if self._document is None or self._document[0] is not self.vdi:
            self._document = (self.vdi, self.vdi.document())
        return self._document[1]

    @property
    def path(self) -> bytes:
        """Where the directory is, from the top of the mount."""
        between = b"/snapshots/" if isinstance(self.home, VdiNode) else b"/"
        return self.home.path + between + self.name


class Found(NamedTuple):
    """What an inode stands for. The node is None for what isn't an SR's or a VDI's."""

    node: SrNode | VdiNode | None
    place: int


class Tree:
    """The directories, and which of them the kernel knows."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._root = Siblings((_BY_UUID.decode(),))
        self._srs: dict[str, SrNode] = {}
        self._vdis: dict[str, VdiNode] = {}
        self._by_uuid: dict[bytes, VdiNode] = {}
        # Also nodes that have gone and that the kernel has not forgotten yet.
        self._numbered: dict[int, SrNode | VdiNode] = {}
        self._last_number = 0
        self.changed_ns = time.time_ns()

    # What the gateway says

    def apply(self, changes: Changes) -> dict[str, bool]:
        """Take over what has changed; the uuids of the VDIs that may have changed, and whether they went."""
        touched = self._catalogue.apply(changes)
        uuids = {self._vdis[ref].vdi.uuid: ref for ref in touched.vdis if ref in self._vdis}
        # First everything goes that goes or moves, so that its name is free for what comes.
        homeless: dict[str, VdiNode | None] = {}
        for ref in touched.vdis:
            self._update_vdi(ref, homeless)
        for ref in touched.srs:
            self._update_sr(ref)
        new = (ref for ref in touched.srs if self._catalogue.shows_sr(ref) and ref not in self._srs)
        self._name(self._root, [self._new_sr(ref) for ref in new])
        self._settle(homeless)
        return {uuid: ref not in self._vdis for uuid, ref in uuids.items()}

    def _update_vdi(self, ref: str, homeless: dict[str, VdiNode | None]) -> None:
        """A new record for a node that stays where it is; else it is taken out, to stand elsewhere or go."""
        node = self._vdis.get(ref)
        home = self._catalogue.home_of(ref)
        if node is None:
            if home is not None:
                homeless[ref] = None
            return
        if home is not None:
            vdi = self._catalogue.vdis[ref]
            before, node.vdi = node.vdi, vdi
            if not vdi.lasts_as(before):
                node.changed_ns = time.time_ns()
            stays = self._ref_of(node.home) == home and not node.home.gone
            if stays and (vdi.label, vdi.uuid) == (before.label, before.uuid):
                return
            homeless[ref] = node
            uuid = before.uuid
        else:
            uuid = node.vdi.uuid
            del self._vdis[ref]
            self._by_uuid.pop(uuid.encode(), None)
            self._leave(node)
        self._take_out(node.home.children, node, uuid)
        node.home.changed_ns = time.time_ns()

    def _update_sr(self, ref: str) -> None:
        node = self._srs.get(ref)
        if node is None:
            return
        before = node.sr
        stays = self._catalogue.shows_sr(ref)
        if stays:
            node.sr = self._catalogue.srs[ref]
            if (node.sr.label, node.sr.uuid) == (before.label, before.uuid):
                return
        self._take_out(self._root, node, before.uuid)
        self.changed_ns = node.changed_ns = time.time_ns()
        if stays:
            self._name(self._root, [node])
        else:
            del self._srs[ref]
            self._leave(node)

    def _settle(self, homeless: dict[str, VdiNode | None]) -> None:
        """Places for those that have none, those above first."""
        while homeless:
            homes: dict[str, list[str]] = {}
            for ref in homeless:
                home = self._catalogue.home_of(ref)
                assert home is not None
                if home not in homeless:
                    homes.setdefault(home, []).append(ref)
            for home_ref, refs in homes.items():
                home_node = self._srs.get(home_ref) or self._vdis[home_ref]
                nodes = [self._moved(homeless.pop(ref), ref, home_node) for ref in refs]
                self._name(home_node.children, nodes)
                home_node.changed_ns = time.time_ns()

    def _moved(self, node: VdiNode | None, ref: str, home: SrNode | VdiNode) -> VdiNode:
        vdi = self._catalogue.vdis[ref]
        if node is None:
            node = self._vdis[ref] = VdiNode(self._new_number(), vdi, home)
            self._numbered[node.number] = node
            self._by_uuid[vdi.uuid.encode()] = node
        node.home = home
        return node

    def _new_sr(self, ref: str) -> SrNode:
        node = self._srs[ref] = SrNode(self._new_number(), self._catalogue.srs[ref])
        self._numbered[node.number] = node
        self.changed_ns = node.changed_ns
        return node

    def _new_number(self) -> int:
        self._last_number += 1
        return self._last_number

    @staticmethod
    def _name(siblings: Siblings, nodes: list[SrNode] | list[VdiNode]) -> None:
        labels: dict[str, str] = {}
        for node in nodes:
            told = node.sr if isinstance(node, SrNode) else node.vdi
            labels[told.uuid] = told.label
        names = siblings.names.give(labels)
        for node in nodes:
            told = node.sr if isinstance(node, SrNode) else node.vdi
            node.name = names[told.uuid].encode()
            siblings.nodes[node.name] = node

    @staticmethod
    def _take_out(siblings: Siblings, node: SrNode | VdiNode, uuid: str) -> None:
        siblings.names.take_back(uuid)
        del siblings.nodes[node.name]

    @staticmethod
    def _ref_of(node: SrNode | VdiNode) -> str:
        return node.sr.ref if isinstance(node, SrNode) else node.vdi.ref

    def _leave(self, node: SrNode | VdiNode) -> None:
        node.gone = True
        if not node.lookups:
            self._drop(node)

    def _drop(self, node: SrNode | VdiNode) -> None:
        for number in node.numbers:
            del self._numbered[number]

    # What the kernel asks

    def find(self, inode: int) -> Found:
        """What an inode is; KeyError if it was forgotten and its VDI has gone."""
        if inode in (Place.ROOT, Place.BY_UUID):
            return Found(None, inode)
        return Found(self._numbered[inode >> _PLACE_BITS], inode & ((1 << _PLACE_BITS) - 1))

    @staticmethod
    def inode(node: SrNode | VdiNode, place: int) -> int:
        """The inode of a place within a node."""
        number = node.numbers[-1] if place in _CONTENT or place >= Place.FIRST_PARTITION else node.number
        return number << _PLACE_BITS | place

    def renew(self, node: VdiNode) -> None:
        """The files with the bytes of the disk are others from now on, and have other inodes."""
        node.numbers.append(self._new_number())
        node.content = None
        self._numbered[node.numbers[-1]] = node

    def looked_up(self, inode: int) -> None:
        """The kernel was told of this inode, once more."""
        if (node := self._numbered.get(inode >> _PLACE_BITS)) is not None:
            node.lookups += 1

    @property
    def lookups(self) -> int:
        """How many lookups the kernel has not taken back."""
        return sum(node.lookups for node in set(self._numbered.values()))

    def forget(self, inode: int, times: int) -> None:
        """The kernel takes back that many lookups."""
        node = self._numbered.get(inode >> _PLACE_BITS)
        if node is None:
            return
        node.lookups = max(node.lookups - times, 0)
        if node.gone and not node.lookups:
            self._drop(node)

    def child(self, inode: int, name: bytes) -> int:
        """The inode of an entry of a directory, all but partitions/; KeyError if there is none."""
        node, place = self.find(inode)
        match place:
            case Place.ROOT:
                if name == _BY_UUID:
                    return Place.BY_UUID
                return self.inode(self._root.nodes[name], Place.DIRECTORY)
            case Place.BY_UUID:
                return self.inode(self._by_uuid[name], Place.LINK)
            case Place.SNAPSHOTS:
                assert node is not None
                return self.inode(node.children.nodes[name], Place.DIRECTORY)
        if isinstance(node, SrNode):
            return self.inode(node.children.nodes[name], Place.DIRECTORY)
        if node is None or place != Place.DIRECTORY:
            raise KeyError(name)
        return dict(self._within(node))[name]

    def entries(self, inode: int) -> list[tuple[bytes, int]]:
        """Names and inodes in a directory, all but partitions/."""
        node, place = self.find(inode)
        match place:
            case Place.ROOT:
                return [(_BY_UUID, Place.BY_UUID), *self._directories(self._root)]
            case Place.BY_UUID:
                return [(uuid, self.inode(each, Place.LINK)) for uuid, each in self._by_uuid.items()]
            case Place.SNAPSHOTS:
                assert node is not None
                return self._directories(node.children)
        if isinstance(node, SrNode):
            return self._directories(node.children)
        assert node is not None
        return list(self._within(node))

    def _directories(self, siblings: Siblings) -> list[tuple[bytes, int]]:
        return [(name, self.inode(node, Place.DIRECTORY)) for name, node in siblings.nodes.items()]

    def _within(self, node: VdiNode) -> Iterator[tuple[bytes, int]]:
        if node.gone:
            return
        if node.vdi.has_data:
            for name, place in FILES.items():
                yield name, self.inode(node, place)
            yield b"partitions", self.inode(node, Place.PARTITIONS)
        else:
            yield b"record.json", self.inode(node, Place.RECORD)
        if node.children.nodes:
            yield b"snapshots", self.inode(node, Place.SNAPSHOTS)

    def directories_in(self, inode: int) -> int:
        """How many directories stand in a directory."""
        node, place = self.find(inode)
        match place:
            case Place.ROOT:
                return 1 + len(self._root.nodes)
            case Place.DIRECTORY if isinstance(node, VdiNode):
                return int(node.vdi.has_data) + bool(node.children.nodes)
            case Place.DIRECTORY | Place.SNAPSHOTS:
                assert node is not None
                return len(node.children.nodes)
        return 0

    def target(self, node: VdiNode) -> bytes:
        """What the symbolic link in by-uuid/ says."""
        return b"../" + node.path
