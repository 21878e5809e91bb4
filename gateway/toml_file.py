"""Configuration files, of a size that somebody has written: a disk given by mistake isn't read wholly."""

import tomllib
from typing import Any, BinaryIO, Final

_LARGEST: Final = 1 << 20  # bytes


def read_toml(file: BinaryIO) -> dict[str, Any]:
    """The document of an open file. Raises ValueError for what is no TOML or larger than 1 MiB, OSError."""
    content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise ValueError(f"it is larger than {_LARGEST} bytes")
    try:
        return tomllib.loads(content.decode())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
