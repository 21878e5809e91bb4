"""What the kernel keeps of a file in memory. A tmpfs keeps all of it."""

import os
import subprocess
from pathlib import Path


def cached(path: Path) -> int:
    """How many bytes of a file are in the page cache."""
    fincore = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)]
    return int(subprocess.run(fincore, check=True, capture_output=True, text=True).stdout)


def drop(*paths: Path) -> None:
    """Have the page cache let go of the files."""
    for path in paths:
        with path.open("rb+") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
