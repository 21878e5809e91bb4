"""Refusals that tests expect."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gateway.core.errors import XenAPIError


@contextmanager
def refused(*error_info: str) -> Iterator[None]:
    """What is inside raises XenAPIError with this code and these first parameters."""
    with pytest.raises(XenAPIError) as refusal:
        yield
    assert tuple(refusal.value.error_info[: len(error_info)]) == error_info
