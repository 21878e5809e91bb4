"""What there is to coalesce in an SR: a pure function of what a scan found.

Words: a chain reads leaf to root. Inline: a hidden node that is the only child of a hidden parent goes into
it, and its children are relinked. Leaf: a visible VDI without children goes into its hidden parent, of which
it is the only child. Garbage: hidden nodes that no visible VDI stands on (SM's rules, cleanup.py).

The trap: every answer holds for the moment of the scan only. Whoever acts on it takes the leases first and
looks again; and one file that cannot be read may be a child of anything, so then there is no plan at all.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from gateway.repository.journals import JournalKind, journal_name, parse_journal
from gateway.repository.scan import ScannedImage, ScanResult

_VISIBLE_PARENT: Final = "its parent {} is a VDI of its own"


class CoalesceKind(Enum):
    """Which of the two ways a child goes into its parent."""

    INLINE = "inline"
    LEAF = "leaf"


@dataclass(frozen=True, slots=True)
class Switches:
    """What SR.other_config lets be done. `coalesce` is for both kinds, `leaf_coalesce` for one of them."""

    gc: bool = True
    coalesce: bool = True
    leaf_coalesce: bool = True

    @classmethod
    def of(cls, other_config: Mapping[str, str]) -> "Switches":
        """SM's keys gc, coalesce and leaf-coalesce: "false" switches off, all else is on."""
        on = (other_config.get(key, "").lower() != "false" for key in ("gc", "coalesce", "leaf-coalesce"))
        return cls(*on)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A child that can go into its parent. Uuids; sizes are bytes.

    `children` stand on the child now (none for a leaf). `extra_bytes` is what the files may grow by.
    `grow_to`: so large the parent has to be made first. `tree_height` counts the levels of the tallest chain
    of its tree. `relink_only`: its copy was finished before a crash, and only the relinking is left.
    """

    kind: CoalesceKind
    child: str
    parent: str
    children: tuple[str, ...]
    extra_bytes: int
    tree_height: int
    grow_to: int | None = None
    relink_only: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """A node that would be coalesced or removed but for `reason`, half a sentence about it."""

    uuid: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do: `garbage` in the order to remove it, `candidates` in the order to try.

    With `problems` (sentences that name the file) nothing may be done in the SR, and the rest is empty.
    """

    garbage: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    refused: tuple[Refusal, ...] = ()
    problems: tuple[str, ...] = ()


def child_size(child: ScannedImage, _parent: ScannedImage) -> int:
    """The most that a parent can grow by, as far as a scan knows: all that the child takes."""
    return child.physical_utilisation


def make_plan(
    found: ScanResult,
    switches: Switches,
    free: int,
    *,
    skip: Mapping[str, str] | None = None,
    keep: frozenset[str] = frozenset(),
    extra_bytes: Callable[[ScannedImage, ScannedImage], int] = child_size,
) -> Plan:
    """Decide from a scan, whose journals are those that no running coalesce owns; `free` in bytes.

    `skip` holds children that are not to be tried, with the reason; what is in `keep` just stays.
    `extra_bytes` (child, parent) may know
    better than a scan by how much the parent grows; it is asked for what would be a candidate otherwise.
    """
    problems = tuple(_problems(found))
    if problems:
        return Plan(problems=problems)
    return _Planner(found, switches, free, skip or {}, keep, extra_bytes).plan()


def garbage(found: ScanResult, keep: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """The hidden nodes on which no visible VDI stands nor one of `keep`, children before their parents."""
    children = _children(found)
    order: dict[str, None] = {}
    # From the leaves down to the roots, so that a node's children have been decided on before it.
    for uuid in sorted(found.images, key=lambda uuid: (-_depth(found, uuid), uuid)):
        if not found.images[uuid].hidden or uuid in keep:
            continue
        if journal_name(JournalKind.RELINK, uuid) in found.journals:
            continue
        if all(child in order for child in children.get(uuid, ())):
            order[uuid] = None
    return tuple(order)


@dataclass(slots=True)
class _Planner:
    found: ScanResult
    switches: Switches
    free: int
    skip: Mapping[str, str]
    keep: frozenset[str]
    extra_bytes: Callable[[ScannedImage, ScannedImage], int]
    candidates: list[Candidate] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)

    def plan(self) -> Plan:
        images = self.found.images
        children = _children(self.found)
        heights = _tree_heights(self.found)
        waste = garbage(self.found, self.keep)
        for uuid in sorted(set(images) - set(waste) - self.keep):
            self._consider(images[uuid], children, heights[uuid])
        if not self.switches.gc:
            self.refused += [Refusal(uuid, "the SR's other_config gc is false") for uuid in waste]
            waste = ()
        depth = {candidate.child: _depth(self.found, candidate.child) for candidate in self.candidates}
        self.candidates.sort(
            key=lambda candidate: (
                not candidate.relink_only,
                -candidate.tree_height,
                candidate.kind is CoalesceKind.LEAF,
                # From the root up, each byte is copied only once on its way down.
                depth[candidate.child],
                candidate.child,
            )
        )
        return Plan(waste, tuple(self.candidates), tuple(self.refused))

    def _consider(self, child: ScannedImage, children: Mapping[str, tuple[str, ...]], height: int) -> None:
        own = children.get(child.uuid, ())
        relink_only = journal_name(JournalKind.RELINK, child.uuid) in self.found.journals
        parent = self.found.images.get(child.parent or "")
        if parent is None or not (relink_only or children[parent.uuid] == (child.uuid,)):
            return
        if child.hidden:
            kind = CoalesceKind.INLINE
        elif own:
            return
        else:
            kind = CoalesceKind.LEAF
        grow_to = child.virtual_size if child.virtual_size > parent.virtual_size else None
        extra = 0
        reason = self._refusal(kind, child, parent, own, relink_only)
        if reason is None and not relink_only:
            # A parent that grows is copied first, in the worst case byte by byte.
            extra = self.extra_bytes(child, parent)
            extra += parent.physical_utilisation if grow_to is not None else 0
            if extra > self.free:
                reason = f"it may need {extra} more bytes, and the SR has {self.free} free"
        if reason is not None:
            self.refused.append(Refusal(child.uuid, reason))
            return
        self.candidates.append(
            Candidate(kind, child.uuid, parent.uuid, own, extra, height, grow_to, relink_only)
        )

    def _refusal(
        self,
        kind: CoalesceKind,
        child: ScannedImage,
        parent: ScannedImage,
        own: tuple[str, ...],
        relink_only: bool,
    ) -> str | None:
        images = self.found.images
        if not parent.hidden:
            return _VISIBLE_PARENT.format(parent.name)
        if not self.switches.gc:
            return "the SR's other_config gc is false"
        if not self.switches.coalesce:
            return "the SR's other_config coalesce is false"
        if kind is CoalesceKind.LEAF and not self.switches.leaf_coalesce:
            return "the SR's other_config leaf-coalesce is false"
        if child.uuid in self.skip:
            return self.skip[child.uuid]
        if relink_only:
            return None
        # Bytes that a shorter node hides today would come to light in a longer one.
        if child.virtual_size < parent.virtual_size:
            if kind is CoalesceKind.LEAF:
                return f"its parent {parent.name} is larger"
            for uuid in own:
                if images[uuid].virtual_size > child.virtual_size:
                    return (
                        f"it is smaller than its parent {parent.name} and than its child {images[uuid].name}"
                    )
        if child.virtual_size > parent.virtual_size and parent.parent is not None:
            below = images.get(parent.parent)
            if below is None:
                return f"its parent {parent.name} stands on a file that is no image of this SR"
            if below.virtual_size > parent.virtual_size:
                return f"its parent {parent.name} is smaller than it and than {below.name}"
        return None


def _problems(found: ScanResult) -> Iterator[str]:
    yield from found.errors()
    for image in found.images.values():
        if _depth(found, image.uuid) >= len(found.images):
            yield f"{image.name}: it is among its own parents"
    for name, sentence in zip(found.journals, found.unfinished(), strict=True):
        journal = parse_journal(name)
        # What is left to relink is work for a plan, unless the node is gone or a VDI: those never go so.
        node = None if journal is None else found.images.get(journal[1])
        if journal is None or journal[0] is not JournalKind.RELINK or node is None or not node.hidden:
            yield sentence


def _parent(found: ScanResult, uuid: str) -> str | None:
    """The parent, if it is an image of this SR and no file of a strange name."""
    parent = found.images[uuid].parent
    return parent if parent in found.images else None


def _children(found: ScanResult) -> dict[str, tuple[str, ...]]:
    children: dict[str, list[str]] = {}
    for image in found.images.values():
        if image.parent is not None:
            children.setdefault(image.parent, []).append(image.uuid)
    return {uuid: tuple(sorted(standing)) for uuid, standing in children.items()}


def _depth(found: ScanResult, uuid: str) -> int:
    """How many nodes are below this one; as many as there are images if it stands on itself."""
    depth = 0
    parent = _parent(found, uuid)
    while parent is not None and depth < len(found.images):
        depth += 1
        parent = _parent(found, parent)
    return depth


def _tree_heights(found: ScanResult) -> dict[str, int]:
    """For each image the levels of the tallest chain of its tree."""
    tallest: dict[str, int] = {}
    root_of: dict[str, str] = {}
    for uuid in found.images:
        root = uuid
        while (parent := _parent(found, root)) is not None:
            root = parent
        root_of[uuid] = root
        tallest[root] = max(tallest.get(root, 0), _depth(found, uuid) + 1)
    return {uuid: tallest[root] for uuid, root in root_of.items()}
