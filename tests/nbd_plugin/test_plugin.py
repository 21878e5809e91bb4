"""What nbdkit is told where it would take one failure for that of everything."""

from typing import Any

import pytest


class Closing:
    """An open export; it may not be possible to make durable what was written to it."""

    def __init__(self, *, fails: bool) -> None:
        self.fails = fails
        self.closed = False

    def close(self) -> None:
        self.closed = True
        if self.fails:
            raise OSError("no space left")


def test_at_the_end_every_image_is_closed_also_if_others_cannot_be(plugin: Any) -> None:
    exports = [Closing(fails=fails) for fails in (True, False, True)]
    plugin._open.update(exports)
    with pytest.raises(OSError, match="no space left"):
        plugin.cleanup()
    assert [each.closed for each in exports] == [True] * 3


def test_of_more_disks_than_nbdkit_can_list_the_first_are_listed(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    disks = [(f"uuid {number}", "a name") for number in range(10_001)]
    monkeypatch.setattr(plugin, "list_vdis", lambda _control: disks)
    plugin.parameters = plugin.Parameters(control="/access.sock", private=True)
    assert plugin.list_exports(True, False) == disks[:10_000]
