"""What nbdkit is told where it would take one failure for that of everything."""

import errno
from types import SimpleNamespace
from typing import Any

import pytest

from tests.nbd_plugin.conftest import MAY_TRIM


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


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOSPC, "free space"), (errno.EDQUOT, "quota"), (errno.EIO, "kernel's log")]
)
def test_what_storage_fails_names_the_disk_and_the_remedy(
    plugin: Any, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    told: list[int] = []
    monkeypatch.setattr(plugin.nbdkit, "set_error", told.append)

    def fail(*_: object, trim: bool = False) -> None:
        raise OSError(number, "it failed")

    export = SimpleNamespace(vdi="1234", disk=SimpleNamespace(flush=fail, pwrite=fail, zero=fail))
    requests = (
        (plugin.flush, (0,)),
        (plugin.pwrite, (b"x", 0, 0)),
        (plugin.zero, (512, 0, MAY_TRIM)),
        (plugin.trim, (512, 0, 0)),
    )
    for request, arguments in requests:
        with pytest.raises(OSError, match=f"the VDI 1234: it failed; .*{remedy}") as failed:
            request(export, *arguments)
        assert type(failed.value).__name__ == "RequestFailed"
    assert told == [errno.EIO if number == errno.EIO else errno.ENOSPC] * 4


def test_a_disk_for_which_files_run_short_is_closed_and_its_client_not_waited_for_without_end(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = Closing(fails=False)
    turns: list[str] = []
    plugin.nbdkit.export_name = lambda: "any"
    monkeypatch.setattr(plugin, "Export", lambda *_: export)
    monkeypatch.setattr(plugin, "descriptors_run_short", lambda: True)
    monkeypatch.setattr(plugin.handshakes, "our_turn", lambda: turns.append("ours"))
    monkeypatch.setattr(plugin.handshakes, "clients_turn", lambda: turns.append("the client's"))
    with pytest.raises(ConnectionRefusedError, match="too many files"):
        plugin.open(readonly=False)
    assert export.closed
    assert export not in plugin._open
    assert turns == ["ours", "the client's"]
