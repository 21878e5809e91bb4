"""VDI.revert through the API says, while it renames, that the VDI's content id isn't known yet."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gateway.images.files import FileIdentity

from .estate_for_tests import ADMIN, Site, sr_of, vdi_of


async def test_a_revert_keeps_readers_until_the_content_id_is_known(
    live: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vdi = await vdi_of(live, await sr_of(live, tmp_path / "sr"))
    taken = await live.call("VDI.snapshot", ADMIN, vdi)
    publishing = live.estate.publications.publishing
    told: list[str] = []

    @contextmanager
    def noted(ref: str, replaced: FileIdentity) -> Iterator[None]:
        with publishing(ref, replaced):
            yield
        told.append(ref)

    monkeypatch.setattr(live.estate.publications, "publishing", noted)
    await live.call("VDI.revert", ADMIN, taken, {})
    assert told == [vdi]
