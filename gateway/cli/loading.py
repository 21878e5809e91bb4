"""What is loaded stays: Python needn't look for garbage among modules while they are loaded.

It would hundreds of times, a fifth of what a short command takes, and more of the start of serve.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """Imports, and nothing else, go in here: the collector rests for the whole process."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
