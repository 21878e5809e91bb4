"""What the checker can find wrong with a VHD or a directory of them, as values and as sentences."""

from dataclasses import dataclass
from enum import Enum


class Severity(Enum):
    """How bad a problem is."""

    ERROR = "error"  # data is lost or wrong, or some program refuses the file
    WARNING = "warning"  # all data is there; something else is not as it should be


class ProblemKind(Enum):
    """What is wrong. The value is a short name for machines."""

    # The file as a whole
    IN_USE = "in-use"
    NOT_REGULAR = "not-a-regular-file"
    UNREADABLE = "unreadable"
    UNSUPPORTED = "unsupported"
    # Footers
    NO_FOOTER = "no-footer"
    FOOTER_DAMAGED = "footer-damaged"
    FOOTER_NOT_AT_END = "footer-not-at-end"
    FOOTER_COPY_DAMAGED = "footer-copy-damaged"
    FOOTERS_DIFFER = "footers-differ"
    FLAGS_DIFFER = "footer-flags-differ"
    LENGTH_WRONG = "file-length-wrong"
    TIMESTAMP_IN_FUTURE = "timestamp-in-future"
    GEOMETRY_TOO_LARGE = "geometry-too-large"
    # Header, block allocation table, blocks
    HEADER_WRONG = "header-wrong"
    METADATA_OVERLAPS = "metadata-overlaps"
    BLOCK_BEYOND_END = "block-beyond-end"
    BLOCK_CUT = "block-cut-by-end"
    BLOCK_IN_METADATA = "block-in-metadata"
    BLOCKS_OVERLAP = "blocks-overlap"
    BITS_BEYOND_DISK = "bits-beyond-disk"
    BATMAP_DAMAGED = "batmap-damaged"
    BATMAP_WRONG = "batmap-wrong"
    # Parents
    PARENT_UNNAMED = "parent-unnamed"
    PARENT_MISSING = "parent-missing"
    PARENT_ID_WRONG = "parent-id-wrong"
    PARENT_LOOP = "parent-loop"
    PARENT_UNREADABLE = "parent-unreadable"
    PARENT_LARGER = "parent-larger"
    PARENT_NAME_WRONG = "parent-name-wrong"
    LOCATOR_MISSING = "locator-missing"
    LOCATOR_OUTSIDE = "locator-outside-file"
    LOCATOR_ABSOLUTE = "locator-absolute"
    LOCATOR_WRONG = "locator-wrong"
    # Directories
    ORPHAN = "hidden-without-children"
    VISIBLE_PARENT = "visible-parent"
    CHAIN_TOO_DEEP = "chain-too-deep"
    SAME_ID = "same-id"
    STRANGE_NAME = "strange-name"
    INTERRUPTED = "interrupted-operation"

    @property
    def severity(self) -> Severity:
        """Return how bad it is."""
        return Severity.WARNING if self in _WARNINGS else Severity.ERROR


_WARNINGS = frozenset(
    {
        ProblemKind.IN_USE,
        ProblemKind.FLAGS_DIFFER,
        ProblemKind.LENGTH_WRONG,
        ProblemKind.TIMESTAMP_IN_FUTURE,
        ProblemKind.GEOMETRY_TOO_LARGE,
        ProblemKind.BITS_BEYOND_DISK,
        ProblemKind.BATMAP_DAMAGED,
        ProblemKind.BATMAP_WRONG,
        ProblemKind.PARENT_LARGER,
        ProblemKind.PARENT_NAME_WRONG,
        ProblemKind.LOCATOR_MISSING,
        ProblemKind.LOCATOR_OUTSIDE,
        ProblemKind.LOCATOR_ABSOLUTE,
        ProblemKind.LOCATOR_WRONG,
        ProblemKind.ORPHAN,
        ProblemKind.VISIBLE_PARENT,
        ProblemKind.CHAIN_TOO_DEEP,
        ProblemKind.INTERRUPTED,
    }
)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with the file at `path`: a sentence with the offset, and what to do."""

    kind: ProblemKind
    path: str
    detail: str
    repairable: bool = False

    @property
    def severity(self) -> Severity:
        """Return how bad it is."""
        return self.kind.severity

    def __str__(self) -> str:
        return f"{self.severity.value}: {self.path}: {self.detail}"


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What is wrong with one file, or with a directory, and what a repair did about it."""

    path: str
    problems: tuple[Problem, ...]
    repaired: tuple[str, ...] = ()

    @property
    def errors(self) -> tuple[Problem, ...]:
        """Return the problems that are no mere warnings."""
        return tuple(problem for problem in self.problems if problem.severity is Severity.ERROR)

    @property
    def repairable(self) -> bool:
        """Return whether `--repair` would change something."""
        return any(problem.repairable for problem in self.problems)
