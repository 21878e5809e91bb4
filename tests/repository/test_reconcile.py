"""What reconciling does with very many images: it runs on the loop that serves everybody."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest

from gateway.core.records import SR, VDI
from gateway.repository.reconcile import Reconciled, reconcile
from gateway.repository.scan import FileStamp, ScannedImage, ScanResult

if TYPE_CHECKING:
    from _collections_abc import dict_values

PAIRS = 200


class Counting(dict[str, ScannedImage]):
    """Counts how often all images are gone through."""

    count = 0

    def values(self) -> "dict_values[str, ScannedImage]":
        self.count += 1
        return super().values()


def uuid(number: int) -> str:
    return f"{number:08d}-0000-4000-8000-000000000000"


def image(number: int, *, parent: int | None) -> ScannedImage:
    return ScannedImage(
        uuid=uuid(number),
        path=f"/sr/{uuid(number)}.vhd",
        format="vhd",
        stamp=FileStamp(number, 1, 1),
        virtual_size=2 << 20,
        hidden=parent is None,
        parent=None if parent is None else uuid(parent),
    )


def compared(images: dict[str, ScannedImage], known: Sequence[VDI]) -> Reconciled:
    return reconcile(
        SR(ref="OpaqueRef:sr", uuid=uuid(9999)),
        ScanResult(images),
        known,
        writable=True,
        elsewhere=lambda _uuid: None,
        is_written=lambda _vdi: False,
        ref_is_free=lambda _ref: True,
    )


def test_a_foreign_sr_is_gone_through_a_few_times_however_many_base_copies_it_has() -> None:
    images = Counting()
    for number in range(PAIRS):
        images[uuid(number)] = image(number, parent=None)
        images[uuid(PAIRS + number)] = image(PAIRS + number, parent=number)
    images[uuid(2 * PAIRS)] = image(2 * PAIRS, parent=None)
    found = compared(images, [])
    # The last one is hidden and nothing stands on it.
    assert {vdi.uuid for vdi in found.add} == images.keys() - {uuid(2 * PAIRS)}
    assert images.count < 5


def test_of_all_records_only_that_of_a_changed_file_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    images = {uuid(number): image(number, parent=number - 1 if number else None) for number in range(PAIRS)}
    known = compared(images, []).add
    made: list[VDI] = []

    def counting(vdi: VDI, **changes: object) -> VDI:
        made.append(vdi)
        return dataclasses.replace(vdi, **changes)  # type: ignore[arg-type]

    monkeypatch.setattr("gateway.repository.reconcile.replace", counting)
    changed = known[PAIRS // 2]
    images[changed.uuid] = dataclasses.replace(images[changed.uuid], stamp=FileStamp(0, 2, 2))
    assert compared(images, known).change.keys() == {changed.ref}
    assert made == [changed]
