"""What can be wrong with an image file.

Every error names the file and says what is wrong with it in one sentence that a person can act on. Reading
a hostile file ends in one of these or in other bytes of the same disk, in nothing else. Failures of the
machine (a full disk, a bad sector) stay OSError.
"""


class ImageError(Exception):
    """Something about the image file at `path` keeps it from being used."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path = path
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


class CorruptImage(ImageError):  # noqa: N818 -- it says what the image is
    """The file contradicts its own format."""


class UnsupportedImage(ImageError):  # noqa: N818 -- it says what the image is
    """The file may be right, but it uses something that is not implemented here."""


class ImageTooLarge(ImageError):  # noqa: N818 -- it says what the image is
    """The virtual size is more than the format can hold."""


class MissingParent(ImageError):  # noqa: N818 -- it says what the image is
    """A differencing image names a parent that is not in its directory."""
